"""The pre-training loop on a CUDA device."""

from __future__ import annotations

import math

import torch
from tiny_runs import tiny_config, write_crops

from personvit.engine.checkpoint import read_checkpoint
from personvit.models.weights import load_model
from personvit.pretrain import pretrain
from personvit.runtime.distributed import Ranks
from personvit.runtime.runlog import read_metrics

CPU = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
CUDA = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cuda", 0))


def test_bf16_run(tmp_path):
    crops = write_crops(tmp_path / "crops")
    result = pretrain(tiny_config(crops, "train.precision=bf16", "train.accumulate=2"), tmp_path / "run", ranks=CUDA)
    rows = read_metrics(tmp_path / "run/metrics.jsonl", "train")
    assert len(rows) == 8
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "grad_norm", "memory_gb"))
    assert next(load_model(result.backbone).parameters()).device.type == "cpu"
    assert all(tensor.device.type == "cpu" for tensor in read_checkpoint(result.checkpoint)["teacher"].values())


def test_fp32_losses_equal_the_cpu(tmp_path):
    crops = write_crops(tmp_path / "crops")
    cfg = tiny_config(crops, "optim.eps=1e-3")
    pretrain(cfg, tmp_path / "cpu", ranks=CPU)
    pretrain(cfg, tmp_path / "cuda", ranks=CUDA)
    cpu, cuda = (read_metrics(tmp_path / name / "metrics.jsonl", "train") for name in ("cpu", "cuda"))
    for a, b in zip(cpu, cuda, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-3), (a, b)


def test_a_run_begun_on_the_cpu_goes_on_here(tmp_path):
    crops = write_crops(tmp_path / "crops")
    pretrain(tiny_config(crops, "train.max_steps=3"), tmp_path / "run", ranks=CPU)
    assert pretrain(tiny_config(crops), tmp_path / "run", resume="auto", ranks=CUDA).step == 8
