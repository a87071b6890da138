"""One optimiser step of the pre-training: forward, losses, backward, clip, AdamW, EMA, centres.

Order within a step, as in bytedance/ibot main_ibot.py: the loss uses the old centres; the gradients are clipped per
tensor; the optimiser moves the student; the teacher follows; the centres move last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from personvit.config import PretrainConfig
from personvit.data.loaders import CropBatch
from personvit.engine.checkpoint import check_fit
from personvit.losses import DINOLoss, IBOTPatchLoss, temperature_schedule
from personvit.models.ssl import SSLOutputs, StudentTeacher
from personvit.optim import AdamWEma, build_schedules, clip_coefficients, param_groups, trained_parameters
from personvit.runtime.distributed import Ranks, all_reduce_sum
from personvit.runtime.seed import seed_everything, stream_seed

_DROP_PATH_STREAM = 3  # the loader owns the streams 0, 1 and 2 of an epoch


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, averaged over micro-batches and ranks.

    Attributes:
        loss: lambda_cls * loss_cls + lambda_patch * loss_patch.
        loss_cls: DINO loss.
        loss_patch: iBOT loss.
        grad_norm: L2 norm of all gradients that the optimiser gets, before clipping.
        finite: whether the step was taken; False: loss or gradient was not finite and nothing changed.
    """

    loss: float
    loss_cls: float
    loss_patch: float
    grad_norm: float
    finite: bool


class PretrainStep:
    """Student, teacher, losses and optimiser of a run, and what happens to them in a step.

    Attributes:
        model: student and teacher.
        dino_loss: CLS loss with its centre.
        patch_loss: patch loss with its centre.
        optimizer: AdamW over the student.
        schedules: learning rate, weight decay and EMA momentum per step.
    """

    def __init__(self, cfg: PretrainConfig, ranks: Ranks, steps_per_epoch: int) -> None:
        self.cfg, self._ranks, self._steps_per_epoch = cfg, ranks, steps_per_epoch
        seed_everything(cfg.train.seed)  # every rank starts from the same weights
        self.model = StudentTeacher(cfg).to(ranks.device)
        self._network: nn.Module = self.model.student
        loss = cfg.loss
        cls_options = (loss.student_temp, loss.centre_momentum, loss.centering, loss.sinkhorn_iterations)
        patch_options = (loss.student_temp, loss.centre_momentum, loss.patch_centering, loss.sinkhorn_iterations)
        self.dino_loss = DINOLoss(cfg.head.prototypes, *cls_options).to(ranks.device)
        self.patch_loss = IBOTPatchLoss(cfg.head.patch_prototypes, *patch_options).to(ranks.device)
        self.optimizer = torch.optim.AdamW(
            param_groups(self._network),
            lr=cfg.optim.lr,
            betas=cfg.optim.betas,
            eps=cfg.optim.eps,
            fused=ranks.device.type == "cuda",
        )
        self._updater = AdamWEma(self.optimizer, self.model.teacher_of())
        epochs, warmup, delay = cfg.train.epochs, loss.teacher_temp_warmup_epochs, cfg.masks.start_epoch
        self.schedules = build_schedules(cfg.optim, cfg.train.batch_size, epochs, steps_per_epoch)
        self._cls_temps = temperature_schedule(*loss.teacher_temp, warmup, epochs)
        self._patch_temps = temperature_schedule(*loss.teacher_patch_temp, warmup, epochs, delay)
        self._prototypes = [p for name, p in self._network.named_parameters() if "last_layer" in name]
        self._totals = torch.zeros(3, device=ranks.device)  # loss, CLS, patch: sums over the micro-batches of a step
        if cfg.train.compile:
            for network in (self.model.student, self.model.teacher):
                for block in network.backbone.blocks:  # type: ignore[union-attr]
                    block.compile()
        if ranks.world_size > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            self.model.student = DistributedDataParallel(self._network, device_ids=devices, broadcast_buffers=False)

    def teacher_temp(self, step: int) -> float:
        """CLS temperature of the teacher at a step."""
        return float(self._cls_temps[step // self._steps_per_epoch])

    def patch_temp(self, step: int) -> float:
        """Patch temperature of the teacher at a step."""
        return float(self._patch_temps[step // self._steps_per_epoch])

    def forward_backward(self, batch: CropBatch, step: int, micro: int) -> SSLOutputs:
        """Losses and gradients of micro-batch `micro` of a step; gradients of ranks meet after the last one.

        Returns:
            The networks' outputs, detached.
        """
        accumulate = self.cfg.train.accumulate
        # Drop path draws from the global generator. Seeding it by position makes a resumed run draw the same.
        seed_everything(stream_seed(self.cfg.train.seed, _DROP_PATH_STREAM, step, micro, self._ranks.rank))
        last = micro == accumulate - 1
        sync: AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(self.model.student, DistributedDataParallel) and not last:
            sync = self.model.student.no_sync()
        with sync:
            with torch.autocast(
                self._ranks.device.type, dtype=torch.bfloat16, enabled=self.cfg.train.precision == "bf16"
            ):
                outputs: SSLOutputs = self.model(batch)
            loss, loss_cls, loss_patch = self._losses(outputs, batch, step)
            torch.autograd.backward(loss / accumulate)
        self._totals += torch.stack([loss, loss_cls, loss_patch]).detach() / accumulate
        return outputs

    def _losses(self, outputs: SSLOutputs, batch: CropBatch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Total, CLS and patch loss in float32, outside autocast; the centres only collect."""
        crops, views = len(batch.global_crops), 2 + self.cfg.crops.local_crops
        loss_cls = self.dino_loss(outputs.student_cls, outputs.teacher_cls, views, self.teacher_temp(step))
        loss_patch = self.patch_loss(
            outputs.student_patch, outputs.teacher_patch, batch.mask_weights, crops, self.patch_temp(step)
        )
        self.patch_loss.accumulate(outputs.teacher_patch_mean, crops)
        return self.cfg.loss.lambda_cls * loss_cls + self.cfg.loss.lambda_patch * loss_patch, loss_cls, loss_patch

    def finish(self, step: int) -> StepResult:
        """Take the step with the gradients at hand, or drop them if anything is not finite.

        A loss or gradient that is not finite on one rank makes the sums of all ranks not finite, so all decide alike.
        The decision needs the numbers on the host: this is the one place of a step that waits for the GPU.
        """
        if step < self.cfg.optim.freeze_last_layer_epochs * self._steps_per_epoch:
            for prototype in self._prototypes:
                prototype.grad = None
        norm, coefficients = clip_coefficients(trained_parameters(self.optimizer), self.cfg.optim.clip_grad)
        totals = all_reduce_sum(self._totals.clone()) / self._ranks.world_size
        numbers = torch.cat([totals, norm.to(totals).reshape(1)])
        loss, loss_cls, loss_patch, grad_norm = numbers.tolist()
        finite = bool(numbers.isfinite().all())
        if finite:
            self._apply(step, coefficients)
        else:
            self.dino_loss.discard()
            self.patch_loss.discard()
        self.optimizer.zero_grad(set_to_none=True)
        self._totals.zero_()
        return StepResult(loss=loss, loss_cls=loss_cls, loss_patch=loss_patch, grad_norm=grad_norm, finite=finite)

    def _apply(self, step: int, coefficients: Tensor | None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.schedules.lr[step])
        self.optimizer.param_groups[0]["weight_decay"] = float(self.schedules.weight_decay[step])
        self._updater.step(coefficients, float(self.schedules.momentum[step]))
        self.dino_loss.apply_centre()
        self.patch_loss.apply_centre()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and centres in the published layout."""
        student = {f"module.{name}": value for name, value in _plain(self._network.state_dict()).items()}
        return {
            "student": student,
            "teacher": _plain(self.model.teacher.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "ibot_loss": {**self.dino_loss.state_dict(), **self.patch_loss.state_dict()},
        }

    def load_state_dict(self, state: Mapping[str, Any], path: str | Path) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: a name or shape differs from the configured model; nothing was loaded then.
        """
        wanted = self.state_dict()
        for part in ("student", "teacher", "ibot_loss"):
            check_fit(state.get(part, {}), wanted[part], part, path)
        student = {name.removeprefix("module."): value for name, value in state["student"].items()}
        self._network.load_state_dict(student)
        self.model.teacher.load_state_dict(state["teacher"])
        self.dino_loss.load_state_dict({"center": state["ibot_loss"]["center"]})
        self.patch_loss.load_state_dict({"center2": state["ibot_loss"]["center2"]})
        self.optimizer.load_state_dict(state["optimizer"])


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}
