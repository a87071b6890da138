"""Fine-tuning on a CUDA device: the CPU's figures, fused kernels, and the loader that decodes there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_finetune import tiny_config, write_persons

from personvit.data.finetune_loader import build_finetune_loader
from personvit.data.reid_sets import open_reid_set
from personvit.finetune import finetune
from personvit.runtime.distributed import Ranks
from personvit.runtime.runlog import read_metrics

CPU = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
CUDA = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cuda", 0))


@pytest.fixture
def persons(tmp_path):
    return write_persons(tmp_path / "persons")


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl", "train")]


def test_fp32_losses_and_figures_equal_the_cpu(tmp_path, persons):
    cfg = tiny_config(persons, "model.drop_path=0.0", "optim.lr=1e-3")
    cpu = finetune(cfg, tmp_path / "cpu", ranks=CPU)
    cuda = finetune(cfg, tmp_path / "cuda", ranks=CUDA)
    np.testing.assert_allclose(losses(tmp_path / "cuda"), losses(tmp_path / "cpu"), rtol=1e-3)
    for one, other in zip(cpu.evaluations, cuda.evaluations, strict=True):
        assert math.isclose(one.result.mAP, other.result.mAP, abs_tol=0.02)
        assert one.reranked is not None
        assert other.reranked is not None
        assert math.isclose(one.reranked.result.mAP, other.reranked.result.mAP, abs_tol=0.05)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_fused_losses_equal_plain_torch_and_repeat_to_the_bit(tmp_path, persons, precision, tolerance):
    common = (f"train.precision={precision}", "optim.lr=1e-3", "eval.every_epochs=0")
    for name, backend in (("plain", "reference"), ("fused", "fused"), ("again", "fused")):
        finetune(tiny_config(persons, *common, f"kernels.backend={backend}"), tmp_path / name, ranks=CUDA)
    np.testing.assert_allclose(losses(tmp_path / "fused"), losses(tmp_path / "plain"), rtol=tolerance)
    assert losses(tmp_path / "fused") == losses(tmp_path / "again")


def test_camera_vectors_train(tmp_path, persons):
    result = finetune(tiny_config(persons, "model.camera_embed=true"), tmp_path / "run", ranks=CUDA)
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    assert result.evaluations


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, persons):
    cfg = tiny_config(persons, "kernels.backend=fused")
    finetune(cfg, tmp_path / "whole", ranks=CUDA)
    finetune(tiny_config(persons, "kernels.backend=fused", "train.max_steps=3"), tmp_path / "part", ranks=CUDA)
    finetune(cfg, tmp_path / "part", resume="auto", ranks=CUDA)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_images_decoded_on_the_gpu_are_those_of_the_cpu(persons):
    pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    train = open_reid_set("auto", persons).train
    cpu, cuda = (
        list(build_finetune_loader(tiny_config(persons, f"data.loader={name}"), train, 0, 1, 0))
        for name in ("dali-cpu", "dali-gpu")
    )
    assert len(cpu) == len(cuda) > 0
    for one, other in zip(cpu, cuda, strict=True):
        assert other.images.is_cuda
        assert one.positions.tolist() == other.positions.tolist()
        assert one.pids.tolist() == other.pids.tolist()
        difference = (one.images - other.images.cpu()).abs() * 127.5  # levels of 8 bits
        assert difference.mean() < 1.0  # two JPEG decoders and two resizers; erased noise is the same
        assert difference.max() < 24
