"""Every shipped kernel configuration compiles for sm_80, sm_90 and sm_100 within its budget; no GPU takes part."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    # In a process of its own: here kernels may be interpreted, and an interpreted kernel cannot be compiled.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "personvit.kernels.aot", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_configuration_keeps_to_its_budget(rows: list[dict]) -> None:
    over = {f"{row['name']} sm_{row['sm']}": row["over"] for row in rows if row["over"]}
    assert not over


def test_every_architecture_is_covered(rows: list[dict]) -> None:
    names = {row["name"] for row in rows}
    assert {(row["name"], row["sm"]) for row in rows} == {(name, sm) for name in names for sm in (80, 90, 100)}
    for operator in ("attention", "assemble", "norm", "gather", "distill", "adamw"):
        assert any(operator in name for name in names), operator


def test_attention_runs_on_tensor_cores(rows: list[dict]) -> None:
    assert all(row["matmul"] for row in rows if "attention" in row["name"] and "bf16" in row["name"])
