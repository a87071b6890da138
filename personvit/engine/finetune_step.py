"""One optimiser step of the fine-tuning: forward, identity and triplet loss, backward, clip, optimiser.

As in hustvl/PersonViT transreid_pytorch (processor/processor.py), except for bfloat16 in place of float16 with a scaled
loss, losses wholly in float32, and steps that are left out where something is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from personvit.config import FinetuneConfig
from personvit.data.finetune_loader import FinetuneBatch
from personvit.engine.checkpoint import check_fit
from personvit.losses import IdentityLoss, TripletLoss
from personvit.models.reid import ReIDModel, ReIDOutputs
from personvit.models.vit import build_vit
from personvit.models.weight_info import WeightsInfo
from personvit.models.weights import load_into
from personvit.optim import build_finetune_optimizer, finetune_lr
from personvit.runtime.distributed import Ranks, all_reduce_sum
from personvit.runtime.seed import seed_everything, stream_seed

_DROP_PATH_STREAM = 3


@dataclass(frozen=True)
class FinetuneStepResult:
    """Numbers of one step, averaged over ranks.

    Attributes:
        loss: loss.identity * loss_id + loss.triplet * loss_triplet.
        loss_id: cross-entropy on identities.
        loss_triplet: batch-hard triplet loss.
        accuracy: share of the batch whose highest logit is of its identity, before the step.
        grad_norm: L2 norm of all gradients together, before clipping.
        finite: whether the step was taken; False: loss or gradient was not finite and nothing changed.
    """

    loss: float
    loss_id: float
    loss_triplet: float
    accuracy: float
    grad_norm: float
    finite: bool


class FinetuneStep:
    """Model, losses and optimiser of a run, and what happens to them in a step.

    Attributes:
        model: backbone, neck and classifier.
        optimizer: over everything that is trained.
        lr: [epochs, 2] float64, learning rates of weights and biases in every epoch.
        weights: where the backbone came from; None: random weights.

    Args:
        cfg: configuration.
        ranks: this process and its peers.
        num_ids: identities of the training set.
        num_cameras: cameras of the training set; used with `model.camera_embed`.

    Raises:
        ConfigError: unknown architecture.
        CheckpointError: weights that cannot be read or do not fit.
    """

    def __init__(self, cfg: FinetuneConfig, ranks: Ranks, num_ids: int, num_cameras: int) -> None:
        self.cfg, self._ranks = cfg, ranks
        seed_everything(cfg.train.seed)  # every rank starts from the same weights
        model = cfg.model
        base = build_vit(
            model.arch,
            img_size=cfg.input.size,
            patch_size=model.patch_size,
            drop_path_rate=model.drop_path,
            num_cameras=num_cameras if model.camera_embed else 0,
            sie_coefficient=model.sie_coefficient,
        )
        self.weights: WeightsInfo | None = load_into(base, model.weights) if model.weights is not None else None
        self.model = ReIDModel(base, num_ids, neck_feat=model.neck_feat, dropout=model.dropout).to(ranks.device)
        self._identity = IdentityLoss(cfg.loss.label_smoothing)
        self._triplet = TripletLoss(cfg.loss.margin)
        self.optimizer = build_finetune_optimizer(self.model, cfg.optim)
        self.lr = finetune_lr(cfg.optim, cfg.train.epochs)
        self._numbers = torch.zeros(4, device=ranks.device)
        self._neck_before: list[Tensor] = []
        if cfg.train.compile:
            for block in base.blocks:
                block.compile()
        self._network: nn.Module = self.model
        if ranks.world_size > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            # Every rank keeps the running statistics of its own images, as published; those of rank 0 are saved.
            self._network = DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)

    def forward_backward(self, batch: FinetuneBatch, step: int) -> None:
        """Losses and gradients of a batch on this rank's device.

        Args:
            batch: of this rank.
            step: optimiser steps done, in the whole run.
        """
        # Drop path and dropout draw from the global generator. Seeded by position, a resumed run draws the same.
        seed_everything(stream_seed(self.cfg.train.seed, _DROP_PATH_STREAM, step, self._ranks.rank))
        self._neck_before = [buffer.clone() for buffer in self.model.bottleneck.buffers()]
        with torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=self.cfg.train.precision == "bf16"):
            outputs: ReIDOutputs = self._network(batch.images, batch.camids)
        loss_id: Tensor = self._identity(outputs.logits, batch.pids)
        loss_triplet: Tensor = self._triplet(outputs.features, batch.pids)
        loss = self.cfg.loss.identity * loss_id + self.cfg.loss.triplet * loss_triplet
        torch.autograd.backward(loss)
        accuracy = (outputs.logits.argmax(1) == batch.pids).float().mean()
        self._numbers = torch.stack([loss, loss_id, loss_triplet, accuracy]).detach()

    def finish(self, epoch: int) -> FinetuneStepResult:
        """Take the step with the gradients at hand, or drop them if anything is not finite.

        A loss or gradient that is not finite on one rank makes the sums of all ranks not finite, so all decide alike.
        The decision needs the numbers on the host: this is the one place of a step that waits for the GPU.

        Args:
            epoch: from 0; it decides the learning rate.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.cfg.optim.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.cfg.optim.clip_grad, norm)
        totals = all_reduce_sum(self._numbers) / self._ranks.world_size
        numbers = torch.cat([totals, norm.to(totals).reshape(1)])
        finite = bool(numbers.isfinite().all())
        if finite:
            for group, lr in zip(self.optimizer.param_groups, self.lr[epoch].tolist(), strict=True):
                group["lr"] = lr
            self.optimizer.step()
        else:
            for buffer, before in zip(self.model.bottleneck.buffers(), self._neck_before, strict=True):
                buffer.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)
        loss, loss_id, loss_triplet, accuracy, grad_norm = numbers.tolist()
        return FinetuneStepResult(loss, loss_id, loss_triplet, accuracy, grad_norm, finite)

    def share_buffers(self) -> None:
        """Give every rank the running statistics of rank 0, so that all evaluate the model that is saved."""
        if self._ranks.world_size > 1:
            for buffer in self.model.bottleneck.buffers():
                dist.broadcast(buffer, src=0)

    def state_dict(self) -> dict[str, Any]:
        """Weights under the published names of the fine-tuned model, and the optimiser."""
        return {"state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], path: str | Path) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: a name or shape differs from the configured model; nothing was loaded then.
        """
        found = state.get("state_dict", {})
        check_fit(found, self.model.state_dict(), "state_dict", path)
        self.model.load_state_dict(found)
        self.optimizer.load_state_dict(state["optimizer"])
