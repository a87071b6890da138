"""The pre-training loop: epochs, steps, rows, checkpoints, health, and how a run stops and goes on.

A run's position is its number of optimiser steps. Data, drop path and schedules are functions of that number, so a
resumed run does what the uninterrupted one would have done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from personvit import __version__, ops
from personvit.config import PretrainConfig, to_plain
from personvit.data.loaders import CropBatch, build_pretrain_loader, steps_per_epoch
from personvit.data.sources import FolderSource, ImageSource, open_source
from personvit.engine.checkpoint import keep_snapshot, read_checkpoint, write_checkpoint
from personvit.engine.health import HealthMonitor
from personvit.engine.probe import RetrievalProbe
from personvit.engine.resume import check_same_run, resume_path
from personvit.engine.run import TrainingRun
from personvit.engine.step import PretrainStep, StepResult
from personvit.errors import DataError
from personvit.models.weights import save_backbone
from personvit.runtime.distributed import Ranks, any_rank, on_main
from personvit.runtime.progress import format_duration, log_progress, memory_gb
from personvit.runtime.runlog import RunFolder
from personvit.runtime.seed import rng_state, set_rng_state
from personvit.runtime.signals import StopSignal

logger = logging.getLogger(__name__)

_ROWS_BETWEEN_WARNINGS = 10


@dataclass(frozen=True)
class PretrainResult:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        interrupted: a signal stopped it; `--resume auto` goes on.
        checkpoint: the newest checkpoint.
        backbone: the teacher's backbone, as of the last end of an epoch or of the run.
    """

    step: int
    interrupted: bool
    checkpoint: Path
    backbone: Path


class PretrainRun(TrainingRun[PretrainResult]):
    """A pre-training run in its folder.

    Args:
        cfg: configuration.
        folder: a prepared run folder.
        ranks: this process and its peers.
        resume: None, "auto" (the folder's last checkpoint, if there is one), or the path of a checkpoint.

    Raises:
        DataError: the source cannot be used, or has fewer images than a batch.
        ConfigError: the batch does not divide over ranks and micro-batches.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """

    def __init__(self, cfg: PretrainConfig, folder: RunFolder, ranks: Ranks, resume: str | None = None) -> None:
        super().__init__(folder, ranks, cfg.train.non_finite_limit, cfg.optim.lr)
        self.cfg = cfg
        ops.set_backend(cfg.kernels.backend)
        self.source = _open_source(cfg, ranks)
        self.steps_per_epoch = steps_per_epoch(cfg, self.source)
        self.total_steps = cfg.train.epochs * self.steps_per_epoch
        self.stop_step = min(self.total_steps, cfg.train.max_steps or self.total_steps)
        self._next_warning = 0
        self.trainer = PretrainStep(cfg, ranks, self.steps_per_epoch)
        self.health = HealthMonitor(cfg.head.prototypes, self.trainer.model.teacher.backbone.embed_dim)
        self.probe = self._build_probe()
        path = resume_path(folder, resume)
        if path is not None:
            self._restore(path)
        elif resume == "auto":
            logger.info("--resume auto: %s does not exist, so the run starts anew", folder.last)

    def _finished(self) -> bool:
        return self.step >= self.stop_step

    def _run_epoch(self, signal: StopSignal) -> bool:
        epoch, start = divmod(self.step, self.steps_per_epoch)
        loader = build_pretrain_loader(
            self.cfg, self.source, self.ranks.rank, self.ranks.world_size, epoch, start_step=start
        )
        batches = iter(loader)
        end = min(self.stop_step, (epoch + 1) * self.steps_per_epoch)
        every = self.cfg.train.save_every_steps
        while self.step < end:
            self._run_step(batches)
            if any_rank(signal.received is not None, self.ranks.device):
                return True
            if every and self.step % every == 0 and self.step < end:
                self._save()
        return False

    def _run_step(self, batches: Iterator[CropBatch]) -> None:
        waited = 0.0
        held: list[CropBatch] = []  # on the host, in case the step has to be written down
        for micro in range(self.cfg.train.accumulate):
            begin = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - begin
            held.append(batch)
            outputs = self.trainer.forward_backward(batch.to(self.ranks.device), self.step, micro)
        centres = self.trainer.dino_loss.centre.clone(), self.trainer.patch_loss.centre.clone()  # those of the loss
        result = self.trainer.finish(self.step)
        self.bad_images.add(path for batch in held for path in batch.bad)
        if result.finite:
            self._non_finite.finite()
            if self.ranks.is_main:
                loss = self.cfg.loss
                self.health.update(
                    outputs,
                    centres[0] if loss.centering == "centre" else None,
                    self.trainer.teacher_temp(self.step),
                    loss.student_temp,
                    patch_centre=centres[1] if loss.patch_centering == "centre" else None,
                    patch_temp=self.trainer.patch_temp(self.step),
                    masked=held[-1].masked,
                )
        else:
            self._non_finite.skipped(
                self.step + 1, result.loss, result.grad_norm, lambda: [self._content(batch) for batch in held]
            )
        self._pace.add(self.cfg.train.batch_size, waited)
        self.step += 1
        self._log_step(result)

    def _content(self, batch: CropBatch) -> dict[str, Any]:
        """A batch as plain values and tensors, with the paths of its images."""
        return {**vars(batch), "paths": [self.source.path(i) for i in batch.positions.tolist()]}

    def _log_step(self, result: StepResult) -> None:
        """Rows and the progress line, where one is due after step `self.step`."""
        if self.metrics is None:
            return
        if self.step % self.cfg.train.log_every == 0 or self.step in (1, self.stop_step):
            self._log_progress(result)
        if self.step % self.cfg.health.every == 0:
            row = self.health.row()
            if row:
                self.metrics.write(self.step, "health", **row)
            self._warn(self.health.warnings())

    def _warn(self, warnings: list[str]) -> None:
        """Health warnings: at once when the first appears, then again after every `_ROWS_BETWEEN_WARNINGS` rows."""
        if not warnings:
            self._next_warning = 0
        elif self.step >= self._next_warning:
            self._next_warning = self.step + _ROWS_BETWEEN_WARNINGS * self.cfg.health.every
            for warning in warnings:
                logger.warning("health at step %d: %s", self.step, warning)

    def _log_progress(self, result: StepResult) -> None:
        assert self.metrics is not None
        done = self.step - 1
        lr = float(self.trainer.schedules.lr[done])
        memory = memory_gb(self.ranks.device)
        self.metrics.write(
            self.step,
            "train",
            epoch=self.step / self.steps_per_epoch,
            loss=result.loss,
            loss_cls=result.loss_cls,
            loss_patch=result.loss_patch,
            grad_norm=result.grad_norm,
            lr=lr,
            wd=float(self.trainer.schedules.weight_decay[done]),
            momentum=float(self.trainer.schedules.momentum[done]),
            teacher_temp=self.trainer.teacher_temp(done),
            images_per_s=self._pace.images_per_s,
            data_wait=self._pace.data_wait,
            memory_gb=memory,
            skipped=self._non_finite.count,
            **self._gpu_row(),
        )
        log_progress(
            f"step {self.step}/{self.stop_step}  epoch {self.step / self.steps_per_epoch:.2f}/{self.cfg.train.epochs}  "
            f"eta {format_duration(self._pace.eta(self.stop_step - self.step))}  {self._pace.images_per_s:.1f} img/s  "
            f"wait {self._pace.data_wait:.0%}  loss {result.loss:.4f} (cls {result.loss_cls:.4f} patch "
            f"{result.loss_patch:.4f})  grad {result.grad_norm:.3g}  lr {lr:.2e}  mem {memory:.1f} GB"
        )
        self._pace.reset()

    def _end_epoch(self, interrupted: bool) -> None:
        epochs_done, rest = divmod(self.step, self.steps_per_epoch)
        whole = rest == 0
        snapshot = epochs_done - 1  # numbered from 0
        keep = whole and snapshot > 0 and snapshot % self.cfg.train.keep_every_epochs == 0
        finished = self.step >= self.stop_step
        export = finished or keep or (whole and epochs_done % self.cfg.train.save_every_epochs == 0)
        if export or interrupted:
            self._save()
        if export and self.ranks.is_main:
            save_backbone(self.trainer.model.teacher.backbone, self.folder.exported, self._metadata())
        if keep and self.ranks.is_main:
            keep_snapshot(self.folder.last, self.folder.snapshot(snapshot))
        if whole:
            on_main(lambda: self._run_probe(epochs_done), self.ranks.device)
        self._pace.reset()  # none of this is training

    def _save(self) -> None:
        """Write last.pth."""
        if self.ranks.is_main:
            write_checkpoint(self.folder.last, self._state())
        self._pace.reset()

    def _run_probe(self, epochs_done: int) -> None:
        every = self.cfg.health.probe_every_epochs
        if self.probe is None or self.metrics is None or not every or epochs_done % every:
            return
        try:
            row = self.probe.run(self.trainer.model.teacher.backbone)
        except DataError as error:  # a labelled image went bad: no reason to end days of training
            logger.warning("no probe at epoch %d: %s", epochs_done, error)
            return
        self.metrics.write(self.step, "probe", **row)
        logger.info("probe at epoch %d: %s", epochs_done, "  ".join(f"{key} {value:.4g}" for key, value in row.items()))

    def _build_probe(self) -> RetrievalProbe | None:
        root = self.cfg.data.probe_root
        if root is None and _uses_generated(self.cfg) and isinstance(self.source, FolderSource):
            root = str(Path(self.source.root).parent)
        if root is None or not self.ranks.is_main:
            return None
        crops = self.cfg.crops
        return RetrievalProbe(root, crops.global_size, crops.mean, crops.std, self.cfg.health.probe_max_images)

    def _state(self) -> dict[str, Any]:
        return {
            **self.trainer.state_dict(),
            "epoch": self.step // self.steps_per_epoch,
            "args": to_plain(self.cfg),
            "personvit": {
                "step": self.step,
                "steps_per_epoch": self.steps_per_epoch,
                "images": len(self.source),
                "world_size": self.ranks.world_size,
                "skipped": self._non_finite.count,
                "rng": rng_state(),
                "health": self.health.state_dict(),
                "versions": {"personvit": __version__, "torch": str(torch.__version__)},
            },
        }

    def _restore(self, path: Path) -> None:
        state = read_checkpoint(path)
        own = state["personvit"]
        check_same_run(path, state, self.cfg, self.steps_per_epoch, len(self.source))
        self.trainer.load_state_dict(state, path)
        self.step = int(own["step"])
        self._non_finite.count = int(own["skipped"])
        self.health.load_state_dict(own["health"])
        set_rng_state(own["rng"])
        logger.info("continuing from %s at step %d of %d", path, self.step, self.stop_step)

    def _metadata(self) -> dict[str, Any]:
        crops = self.cfg.crops
        epoch = self.step // self.steps_per_epoch
        return {
            "mean": list(crops.mean),
            "std": list(crops.std),
            "step": self.step,
            "epoch": epoch,
            "recipe": to_plain(self.cfg),
            "licence": self.cfg.train.licence,
        }

    def _log_plan(self) -> None:
        cfg, ranks = self.cfg, self.ranks
        parameters = sum(p.numel() for p in self.trainer.model.teacher.backbone.parameters())
        logger.info(
            "%s, %.2fM parameters, on %d x %s, %s; %d images, batch %d = %d rank(s) x %d micro-batch(es) x %d; "
            "%d epochs x %d steps, stopping at step %d",
            cfg.model.arch, parameters / 1e6, ranks.world_size, ranks.device.type, cfg.train.precision,
            len(self.source), cfg.train.batch_size, ranks.world_size, cfg.train.accumulate,
            cfg.train.batch_size // (ranks.world_size * cfg.train.accumulate),
            cfg.train.epochs, self.steps_per_epoch, self.stop_step,
        )  # fmt: skip

    def _result(self, *, interrupted: bool) -> PretrainResult:
        return PretrainResult(self.step, interrupted, self.folder.last, self.folder.exported)


def _uses_generated(cfg: PretrainConfig) -> bool:
    return cfg.data.root is None or cfg.data.name == "generated"


def _open_source(cfg: PretrainConfig, ranks: Ranks) -> ImageSource:
    """The images; generated persons are drawn by rank 0 while the others wait."""
    if _uses_generated(cfg):
        on_main(lambda: _draw(cfg), ranks.device)
    return open_source(cfg.data)


def _draw(cfg: PretrainConfig) -> None:
    open_source(cfg.data)
