"""What of this installation is on, what is off, why, and how to switch it on.

Usage: `python -m personvit.env`. Always exits with 0: an accelerator that is missing is a fact, not a failure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import logging
import platform
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple

INSTALL_GPU = 'pip install -e ".[gpu]"'
INSTALL = "pip install -e ."
NEEDS_GPU = "run on a machine with an NVIDIA GPU and its driver (nvidia-smi must list it)"


class Row(NamedTuple):
    """One part of the installation."""

    part: str
    on: bool
    version: str
    reason: str = ""
    """What limits it or switches it off."""
    remedy: str = ""
    """What to type or do."""


def collect() -> list[Row]:
    """Look at every part. A probe that fails becomes a row, never an exception."""
    probes: tuple[tuple[str, Callable[[], Row]], ...] = (
        ("Python", lambda: Row("Python", True, platform.python_version())),
        ("torch", _torch),
        ("CUDA device", _cuda_device),
        ("Triton", _triton),
        ("xformers", _xformers),
        ("DALI", _dali),
        ("extension CPU", _extension_cpu),
        ("extension CUDA", _extension_cuda),
        ("NVML", _nvml),
    )
    rows = []
    for part, probe in probes:
        try:
            rows.append(probe())
        except Exception as error:  # a broken installation is exactly what this command is asked about
            rows.append(Row(part, False, _version(part.lower()), f"{type(error).__name__}: {error}", INSTALL))
    return rows


def format_table(rows: list[Row], width: int = 110) -> str:
    """The rows as text: one line each, reason and remedy indented below where there are any."""
    name = max(len(row.part) for row in rows)
    version = max(len(row.version) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.part:<{name}}  {'on ' if row.on else 'off'}  {row.version:<{version}}".rstrip())
        for label, text in (("", row.reason), ("remedy: ", row.remedy)):
            if text:
                lines += textwrap.wrap(
                    f"{label}{text}", width, initial_indent=" " * (name + 7), subsequent_indent=" " * (name + 9),
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
    return "\n".join(lines)


def operators() -> str:
    """Which backend computes each operator here, as text."""
    from personvit import ops

    rows = ops.report()
    name = max(len(row.op) for row in rows)
    backend = max(len(row.backend) for row in rows)
    return "\n".join(f"{row.op:<{name}}  {row.backend:<{backend}}  {row.reason}" for row in rows)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _torch() -> Row:
    import torch

    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return Row("torch", True, torch.__version__, f"{build}, {torch.get_num_threads()} threads")


def _cuda_device() -> Row:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in devices)
        return Row("CUDA device", True, str(torch.version.cuda), names)
    if torch.version.cuda is None:
        return Row("CUDA device", False, "-", "torch is a CPU build", "pip install --force-reinstall torch, on Linux")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "no device is visible"
    except (RuntimeError, AssertionError) as error:
        reason = _first_line(error).partition(". ")[0]
    return Row("CUDA device", False, "-", reason, f"{NEEDS_GPU}; check CUDA_VISIBLE_DEVICES")


def _triton() -> Row:
    if importlib.util.find_spec("triton") is None:
        return Row(
            "Triton", False, "-", "not installed", "pip install triton (it comes with torch's CUDA wheels, Linux)"
        )
    triton = importlib.import_module("triton")
    if not _has_cuda():
        return Row(
            "Triton", False, triton.__version__, "installed, but there is no CUDA device to run kernels", NEEDS_GPU
        )
    return Row("Triton", True, triton.__version__)


def _xformers() -> Row:
    # At import it warns on its logger when its own C++ part was built for another torch; the attention operators that
    # it takes from torch work all the same.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    if importlib.util.find_spec("xformers") is None:
        return Row("xformers", False, "-", "not installed", INSTALL_GPU)
    importlib.import_module("xformers.ops")
    version = _version("xformers")
    if not _has_cuda():
        return Row("xformers", False, version, "installed, but its attention needs a CUDA device", NEEDS_GPU)
    return Row("xformers", True, version)


def _dali() -> Row:
    # A namespace package: to ask for nvidia.dali where nothing of nvidia is installed is an error, not None.
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return Row("DALI", False, "-", "not installed", f"{INSTALL_GPU} (Linux)")
    dali = importlib.import_module("nvidia.dali")
    where = "decodes on CPU and GPU" if _has_cuda() else "decodes on the CPU: there is no CUDA device"
    return Row("DALI", True, str(dali.__version__), where)


def _extension_cpu() -> Row:
    from personvit import __version__
    from personvit.ops import native

    reason = native.load_cpu()
    return Row("extension CPU", reason is None, __version__, reason or "", native.BUILD_COMMAND if reason else "")


def _extension_cuda() -> Row:
    from personvit import __version__
    from personvit.ops import native

    obstacle = native.why_not("cuda")
    if obstacle is not None:
        return Row("extension CUDA", False, "-", *obstacle)
    if not _has_cuda():
        return Row("extension CUDA", False, __version__, "built and loads, but there is no CUDA device", NEEDS_GPU)
    return Row("extension CUDA", True, __version__)


def _nvml() -> Row:
    from personvit.runtime.telemetry import GpuTelemetry

    telemetry = GpuTelemetry()
    sample = telemetry.sample()
    version = _version("nvidia-ml-py")
    if sample is None:
        remedy = INSTALL if version == "-" else NEEDS_GPU
        return Row("NVML", False, version, telemetry.reason or "no reading", remedy)
    reading = ", ".join(f"{name.removeprefix('gpu_')} {value:g}" for name, value in sample.as_row().items())
    return Row("NVML", True, version, reading)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    """Print the table. Returns 0."""
    argparse.ArgumentParser(prog="personvit env", description=__doc__).parse_args(argv)
    print(format_table(collect()))  # noqa: T201
    print("\nOperators (kernels.backend=auto)")  # noqa: T201
    try:
        print(operators())  # noqa: T201
    except Exception as error:  # as in collect()
        print(f"not available: {_first_line(error)}")  # noqa: T201
    return 0


if __name__ == "__main__":
    # Not through runtime.entry.run: that imports torch, and a torch that does not import is a row of the table.
    raise SystemExit(main(sys.argv[1:]))
