from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tables"]


def kernel_row(backend: str, seconds: float, **more) -> dict:
    row = {"op": "attention forward", "backend": backend, "shape": [8, 129], "dtype": "bfloat16", "p50": seconds}
    return {**row, "floor_s": 1e-5, "peak_bytes": None, "device": "GPU", "cuda": "13", "commit": "abc", **more}


def test_page_in_docs_is_what_the_rows_say(tables) -> None:
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page(), "run python benchmarks/tables.py"


def test_latest_row_of_a_kind_counts_and_ratios_are_computed(tables, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [kernel_row("eager", 9e-5), kernel_row("triton", 3e-5), kernel_row("eager", 6e-5)]
    (tmp_path / "attention.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for line in tables.page().splitlines() if line.startswith("| attention forward")]
    assert len(lines) == 2
    assert "| triton | 30 us | 2.00x | 33 % | abc |" in next(line for line in lines if "triton" in line)


def test_what_was_not_measured_is_called_so(tables, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.page().count("Not measured") == len(tables.SECTIONS)


def test_check_fails_on_a_stale_page(tables, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert "run python benchmarks/tables.py" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 0
