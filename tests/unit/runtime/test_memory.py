from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from personvit.runtime import memory

CODE = """
import resource, sys
from personvit.runtime.memory import keep_freed_memory
import torch
assert sys.argv[1] == "default" or keep_freed_memory()
for _ in range(12):  # until every block has found its place
    torch.ones(12 << 20)  # 48 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(12 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def has_mallopt() -> bool:
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not has_mallopt(), reason="the C library has no mallopt")
def test_large_blocks_are_used_again_without_page_faults() -> None:
    faults = {}
    for mode in ("default", "keep"):
        run = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(run.stdout)
    assert faults["default"] > 2000  # otherwise there is nothing to be won
    assert faults["keep"] < 0.1 * faults["default"]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert not memory.keep_freed_memory()
