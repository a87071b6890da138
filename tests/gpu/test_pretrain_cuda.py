"""The pre-training loop on a CUDA device."""

from __future__ import annotations

import math

import numpy as np
import pytest
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
    cfg = tiny_config(crops, "optim.eps=1e-3", "data.loader=torchvision")  # a GPU's JPEG decoder rounds otherwise
    pretrain(cfg, tmp_path / "cpu", ranks=CPU)
    pretrain(cfg, tmp_path / "cuda", ranks=CUDA)
    cpu, cuda = (read_metrics(tmp_path / name / "metrics.jsonl", "train") for name in ("cpu", "cuda"))
    for a, b in zip(cpu, cuda, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-3), (a, b)


def test_a_run_begun_on_the_cpu_goes_on_here(tmp_path):
    crops = write_crops(tmp_path / "crops")
    pretrain(tiny_config(crops, "train.max_steps=3"), tmp_path / "run", ranks=CPU)
    assert pretrain(tiny_config(crops), tmp_path / "run", resume="auto", ranks=CUDA).step == 8


def losses(cfg, folder):
    pretrain(cfg, folder, ranks=CUDA)
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl", "train")]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_fused_losses_equal_plain_torch_and_repeat_to_the_bit(tmp_path, precision, tolerance):
    crops = write_crops(tmp_path / "crops")
    common = ("optim.eps=1e-3", "model.drop_path=0.1", f"train.precision={precision}")
    plain = losses(tiny_config(crops, *common, "kernels.backend=reference"), tmp_path / "plain")
    fused = losses(tiny_config(crops, *common, "kernels.backend=fused"), tmp_path / "fused")
    again = losses(tiny_config(crops, *common, "kernels.backend=fused"), tmp_path / "again")
    np.testing.assert_allclose(fused, plain, rtol=tolerance)
    assert fused == again


def test_fused_and_compiled(tmp_path):
    crops = write_crops(tmp_path / "crops")
    common = ("optim.eps=1e-3", "kernels.backend=fused")
    eager = losses(tiny_config(crops, *common), tmp_path / "eager")
    compiled = losses(tiny_config(crops, *common, "train.compile=true"), tmp_path / "compiled")
    np.testing.assert_allclose(compiled, eager, rtol=1e-3)


def test_an_interrupted_fused_run_goes_on_to_the_bit(tmp_path):
    crops = write_crops(tmp_path / "crops")
    whole = losses(tiny_config(crops, "kernels.backend=fused"), tmp_path / "whole")
    pretrain(tiny_config(crops, "kernels.backend=fused", "train.max_steps=3"), tmp_path / "part", ranks=CUDA)
    pretrain(tiny_config(crops, "kernels.backend=fused"), tmp_path / "part", resume="auto", ranks=CUDA)
    assert [row["loss"] for row in read_metrics(tmp_path / "part/metrics.jsonl", "train")] == whole
