"""Builds csrc/core with the address and undefined-behaviour sanitizers and runs its C++ tests through CTest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def tool(name: str) -> str | None:
    """Beside this Python (from pip) or on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def test_core_under_sanitizers(tmp_path: Path) -> None:
    cmake, ctest, ninja = tool("cmake"), tool("ctest"), tool("ninja")
    if not (cmake and ctest and ninja):
        pytest.skip("cmake, ctest or ninja was not found: pip install cmake ninja")
    if not (os.environ.get("CXX") or tool("c++") or tool("g++")):
        pytest.skip("no C++ compiler was found")
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (
        [*configure, "-DPERSONVIT_SANITIZE=ON"],
        [cmake, "--build", str(tmp_path)],
        [ctest, "--test-dir", str(tmp_path), "--output-on-failure"],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    assert "100% tests passed" in result.stdout
    assert "out of 18" in result.stdout
