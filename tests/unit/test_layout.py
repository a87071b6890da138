"""The traffic rules of the package: imports go down the floors, and only personvit.ops reaches compiled code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "personvit"

FLOORS = {
    "errors": 0,
    "config": 1,
    "runtime": 2,
    "kernels": 3,
    "ops": 4,
    "data": 5,
    "models": 5,
    "losses": 6,
    "optim": 6,
    "retrieval": 7,
    "engine": 8,
    "visualization": 9,
}
ENTRY_FLOOR = 10  # pretrain.py, evaluate.py, ...: every other module of the package
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """`personvit.data.masks` -> `data`; `personvit` -> ``."""
    return [*module.split("."), ""][1]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """(line, absolute name) of everything of personvit that a file imports, at any depth of the code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_of(path).split(".")
                if path.name != "__init__.py":
                    package = package[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            # `from personvit import ops` names a room in its alias
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "personvit"]


def violations(path: Path) -> list[str]:
    room = room_of(module_of(path))
    floor = ENTRY_FLOOR if path.name == "__main__.py" else FLOORS.get(room, ENTRY_FLOOR)
    broken = []
    for line, name in imported_modules(path):
        target = room_of(name)
        if target in ("", "__version__") or target == room:
            continue
        if target in ("_C", "_C_cuda", "kernels") and room != "ops":
            broken.append(f"{path.relative_to(ROOT)}:{line} imports {name}: only personvit.ops may")
        elif floor != ENTRY_FLOOR and FLOORS.get(target, ENTRY_FLOOR) >= floor:
            broken.append(f"{path.relative_to(ROOT)}:{line} (floor {floor}) imports {name}, which is not below it")
    return broken


def test_imports_go_down() -> None:
    assert len(SOURCES) > 20
    assert not [line for path in SOURCES for line in violations(path)]


def test_a_violation_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "personvit" / "runtime" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("import personvit.kernels.attention\nfrom personvit import ops\nfrom ..data import masks\n")
    assert [line.split(" imports ")[1].split(",")[0].split(":")[0] for line in violations(bad)] == [
        "personvit.kernels.attention",
        "personvit.ops",
        "personvit.data.masks",
    ]


def test_only_ops_calls_registered_operators() -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if room_of(module_of(path)) != "ops" and "torch.ops.personvit" in path.read_text(encoding="utf-8")
    ]
    assert not guilty


def test_package_import_is_light() -> None:
    """The version is read from here by the build, and `personvit --help` should not wait for torch."""
    code = "import sys, personvit; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_kernels_refuse_their_bare_name() -> None:
    code = "import kernels"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode != 0
    assert "import personvit.kernels" in result.stderr
    assert subprocess.run([sys.executable, "-c", "import personvit.kernels"], cwd=ROOT, check=False).returncode == 0


def test_version_is_said_once() -> None:
    import personvit

    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {personvit.__version__}" in (ROOT / "CITATION.cff").read_text()
