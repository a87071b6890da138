"""Compile every shipped kernel configuration for GPUs that need not be here, and report what it takes.

python -m personvit.kernels.aot                      the table, for sm_80, sm_90 and sm_100
python -m personvit.kernels.aot --sm 90 --match bwd  some of it
python -m personvit.kernels.aot --json               a row a line

Registers, stack and shared memory come from cuobjdump, spills are local loads and stores counted in the disassembly
(both tools come with Triton). Leaves with 1 if a configuration exceeds its budget.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULES = ("attention", "tokens", "norm", "distill", "adamw")
"""Kernel modules; each has `builds() -> list[Build]`."""
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Build:
    """One shipped configuration of a kernel, and what it may take."""

    name: str
    kernel: Any
    """Function under @triton.jit."""
    signature: dict[str, str]
    """Type of every argument that is no constexpr: "*bf16", "*fp32", "i32", "fp32" ..."""
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    """Budget per thread."""
    shared: int
    """Budget of shared memory in bytes."""
    spills: dict[int, int] = field(default_factory=dict)
    """Spill instructions allowed by architecture: none, unless `reason` says why."""
    reason: str = ""


def all_builds() -> Iterator[tuple[int, Build]]:
    """Every configuration of every module, numbered."""
    number = 0
    for module in MODULES:
        for build in importlib.import_module(f"personvit.kernels.{module}").builds():
            yield number, build
            number += 1


def compile_build(number: int, sm: int) -> dict[str, Any]:
    """Compile configuration `number` for an architecture; a row with what it takes and what exceeds the budget."""
    build = next(b for n, b in all_builds() if n == number)
    row = usage(build, sm)
    allowed = build.spills.get(sm, 0)
    limits = {"registers": build.registers, "shared": build.shared, "spills": allowed}
    row["over"] = {name: limit for name, limit in limits.items() if row[name] > limit}
    if allowed and not build.reason:
        row["over"]["reason"] = "spills are allowed without a reason"
    return row


def usage(build: Build, sm: int) -> dict[str, Any]:
    """Compile a configuration for an architecture; a row with what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    # Pointers are multiples of 16 bytes, as `inputs.layout` demands and the launcher would specialise them.
    pointers = [i for i, n in enumerate(names) if build.signature.get(n, "").startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(
        fn=build.kernel,
        signature={n: build.signature.get(n, "constexpr") for n in names},
        constexprs=build.constexprs,
        attrs=aligned,
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {build.name}: {resources[:200]}")
    count = {word: len(re.findall(rf"\b{word}", code)) for word in ("STL", "LDL", "HMMA", "HGMMA", "UTCHMMA")}
    return {
        "name": build.name,
        "sm": sm,
        "warps": build.num_warps,
        "stages": build.num_stages,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": count["STL"] + count["LDL"],
        "shared": compiled.metadata.shared,
        "matmul": "/".join(word for word in ("HMMA", "HGMMA", "UTCHMMA") if count[word]),
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Print the table. Returns 1 if a budget is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--match", default="", help="only configurations whose name contains this")
    parser.add_argument("--json", action="store_true", help="a JSON row a line")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels are interpreted then, not compiled. Unset it.")
    work = [(n, sm) for n, build in all_builds() if options.match in build.name for sm in options.sm]
    over = 0
    if not options.json:
        print(f"{'configuration':<52} sm warps regs stack spills  shared  matmul")  # noqa: T201
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(compile_build, *zip(*work, strict=True)):
            over += bool(row["over"])
            if options.json:
                print(json.dumps(row), flush=True)  # noqa: T201
                continue
            numbers = "{registers:>4} {stack:>5} {spills:>6} {shared:>7}  {matmul}".format(**row)
            excess = f"  OVER {row['over']}" if row["over"] else ""
            print(f"{row['name']:<52} {row['sm']:>3} {row['warps']:>4} {numbers}{excess}", flush=True)  # noqa: T201
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
