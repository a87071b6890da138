"""The training step through the Triton kernels (interpreted) against the step in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_runs import one_thread, tiny_config, write_crops

from personvit import ops
from personvit.data.loaders import CropBatch, build_pretrain_loader
from personvit.data.sources import FolderSource
from personvit.engine.step import PretrainStep, StepResult
from personvit.runtime.distributed import Ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted beside a CUDA device")

CPU = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
STEPS = 3
# eps: where a gradient is zero but for rounding (the bias of the keys), Adam would blow that rounding up
OVERRIDES = ("optim.eps=1e-3", "optim.warmup_epochs=0", "optim.lr=0.05", "model.drop_path=0.1")
KERNELS = ("packed_attention", "assemble_tokens", "add_layer_norm", "gather_rows", "distill_cross_entropy")


@pytest.fixture(autouse=True)
def _restore_backend() -> Iterator[None]:
    with one_thread():
        yield
    ops.set_backend("auto")


def start(backend: str, crops) -> tuple[PretrainStep, list[CropBatch]]:
    ops.set_backend(backend)
    cfg = tiny_config(crops, *OVERRIDES)
    source = FolderSource(crops)
    return PretrainStep(cfg, CPU, steps_per_epoch=4), list(build_pretrain_loader(cfg, source, 0, 1, epoch=0))


def run(backend: str, crops) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """Results of some steps, and the weights after them."""
    step, batches = start(backend, crops)
    results = []
    for number in range(STEPS):
        step.forward_backward(batches[number], number, 0)
        results.append(step.finish(number))
    state = step.state_dict()
    weights = {f"{part} {name}": t for part in ("student", "teacher", "ibot_loss") for name, t in state[part].items()}
    return results, weights


def test_kernels_are_what_runs() -> None:
    ops.set_backend("triton")
    chosen = {row.op: row.backend for row in ops.report("cpu")}
    assert {chosen[name] for name in (*KERNELS, "adamw_ema")} == {"triton"}


def test_gradients_agree(tmp_path) -> None:
    crops = write_crops(tmp_path)
    gradients = {}
    for backend in ("reference", "triton"):
        step, batches = start(backend, crops)
        step.forward_backward(batches[0], 0, 0)
        named = step.model.student.named_parameters()
        gradients[backend] = {name: p.grad for name, p in named if p.grad is not None}
    assert gradients["triton"].keys() == gradients["reference"].keys()
    for name, gradient in gradients["reference"].items():
        error = (gradients["triton"][name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7, name


def test_loss_curve_and_weights_agree(tmp_path) -> None:
    crops = write_crops(tmp_path)
    expected, expected_weights = run("reference", crops)
    found, weights = run("triton", crops)
    for mine, theirs in zip(found, expected, strict=True):
        values = [[r.loss, r.loss_cls, r.loss_patch, r.grad_norm] for r in (mine, theirs)]
        np.testing.assert_allclose(*values, rtol=2e-5)
    assert abs(expected[0].loss - expected[-1].loss) > 1e-3  # it is a curve
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
