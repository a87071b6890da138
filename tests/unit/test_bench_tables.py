from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("tables")
    for name in ("tables", "goals", "bench_attention", "harness"):
        sys.modules.pop(name, None)


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
    assert tables.page().count("Not measured") == len(tables.SECTIONS) + 1  # and the goals


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


def test_rows_of_cold_and_warm_caches_both_count(tables, tmp_path, monkeypatch) -> None:
    bench = importlib.import_module("bench_attention")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rates = bench.Rates(bytes=1e9, flops=1e12)
    rows = bench.measure_case(bench.Case("ViT-S", 1, 19), {"eager": bench.eager}, torch.float32, "cpu", rates)
    facts = {"device": "GPU", "cuda": "13", "commit": "abc", "threads": 1}
    (tmp_path / "attention.jsonl").write_text("".join(json.dumps({**row, **facts}) + "\n" for row in rows))
    shown = [line.split(" | ")[:4] for line in tables.page().splitlines() if line.startswith("| attention")]
    works = {(line[0].removeprefix("| attention ").removesuffix(" ViT-S"), line[3]) for line in shown if len(line) > 3}
    assert {("forward", "cold"), ("forward", "warm")} <= works
    assert {("forward+backward", "cold"), ("forward+backward", "warm")} <= works


def attention_rows(backend: str, forward: float, both: float, tokens: int = 129) -> list[dict]:
    wanted = {"model": "ViT-S", "images": 128, "tokens": tokens}
    return [
        kernel_row(backend, seconds + (0 if cold else -1e-6), op=f"attention {work}", cold=cold, **wanted)
        for work, seconds in (("forward", forward), ("forward+backward", both))
        for cold in (True, False)
    ]


def verdicts(tables, tmp_path, monkeypatch, **files: list[dict]) -> dict[str, list[str]]:
    """Lines of the table of goals by their first column."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = tables.page().partition("## Goals on a GPU")[2]
    cells = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {line[0]: [cell.strip() for cell in line[1:]] for line in cells}


def test_goals_are_compared_with_cold_rows_of_a_gpu(tables, tmp_path, monkeypatch) -> None:
    rows = [
        *attention_rows("eager", 60e-6, 180e-6), *attention_rows("sdpa-flash", 30e-6, 75e-6),
        *attention_rows("sdpa-cudnn", 18e-6, 52e-6), *attention_rows("triton", 12e-6, 40e-6),
    ]  # fmt: skip
    found = verdicts(tables, tmp_path, monkeypatch, attention=rows)
    assert found["attention 129 tokens, forward, over eager"] == ["4x", "6x", "5x", "met"]
    assert found["attention 129 tokens, backward, over eager"] == ["3x", "4x", "4.29x", "reached"]
    assert found["attention 129 tokens, backward, over SDPA flash"] == ["2x", "2.5x", "1.61x", "**missed**"]
    assert found["attention 129 tokens, both, over the best stock kernel"] == ["1.2x", "1.5x", "1.3x", "met"]
    assert found["attention 129 tokens, forward, of floor"] == ["65 %", "", "83.3 %", "met"]
    assert found["attention 129 tokens, both, over xformers"][-1] == "not measured"


def test_goals_of_a_step_take_the_fastest_and_its_own_baseline(tables, tmp_path, monkeypatch) -> None:
    def step(backend: str, images: int, per_s: float, gib: float) -> dict:
        row = {"op": "pretrain_step", "backend": backend, "shape": [images], "dtype": "bfloat16", "p50": images / per_s}
        more = {"recipe": "vit_small_luperson", "images_per_s": per_s, "mfu": 0.4, "ratio": None, "loss": 1.0}
        facts = {"device": "GPU", "cuda": "13", "commit": "abc", "flops_per_image": 1e9}
        return {**row, **more, **facts, "peak_bytes": int(gib * 2**30)}

    rows = [
        step("eager-ibot", 64, 900.0, 5), step("eager-ibot", 128, 1000.0, 10),
        step("fused", 64, 4100.0, 3), step("fused", 128, 4200.0, 6),
    ]  # fmt: skip
    found = verdicts(tables, tmp_path, monkeypatch, pretrain=rows)
    assert found["pre-training step, ViT-S"] == ["4,000 images/s", "4,600 images/s", "4,200 images/s", "met"]
    assert found["pre-training step, ViT-S, over eager iBOT"] == ["3.5x", "", "4.2x", "met"]
    assert found["pre-training step, ViT-S, peak memory of eager iBOT"] == ["0.55x", "0.4x", "0.6x", "**missed**"]
    assert found["pre-training step, ViT-B"][-1] == "not measured"


def test_goals_of_retrieval_know_nothing_of_cpus(tables, tmp_path, monkeypatch) -> None:
    row = {"op": "rerank 20/6/0.3", "backend": "native", "shape": [3368, 15913, 384], "dtype": "float32", "p50": 5e-3}
    row |= {"scale": "market", "peak_bytes": 1, "floor_s": 1e-3, "commit": "abc", "threads": 2}
    cpu = {**row, "device": "CPU", "p50": 1e-3}
    name = "re-ranking, Market-1501 scale"
    assert verdicts(tables, tmp_path, monkeypatch, retrieval=[cpu])[name][-1] == "not measured"
    gpu = {**row, "device": "GPU", "cuda": "13"}
    assert verdicts(tables, tmp_path, monkeypatch, retrieval=[cpu, gpu])[name] == ["6 ms", "4 ms", "5 ms", "met"]
