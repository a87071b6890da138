"""The fine-tuning loop: epochs, steps, rows, evaluations, checkpoints, and how a run stops and goes on.

A run's position is its epoch and the steps done in it: how many an epoch has, the sampler decides anew each time.
Batches, augmentation and drop path are functions of the position, so a resumed run does what the uninterrupted one
would have done.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from personvit import __version__, ops
from personvit.config import FinetuneConfig, to_plain
from personvit.data.finetune_loader import FinetuneBatch, FinetuneReader
from personvit.engine.checkpoint import keep_snapshot, read_checkpoint, write_checkpoint
from personvit.engine.evaluation import Evaluation, report_text
from personvit.engine.finetune_data import open_finetune_data
from personvit.engine.finetune_eval import FinetuneEvaluator
from personvit.engine.finetune_step import FinetuneStep, FinetuneStepResult
from personvit.engine.resume import check_same_finetuning, resume_path
from personvit.engine.run import TrainingRun
from personvit.errors import DataError
from personvit.models.weights import save_reid
from personvit.retrieval.report import RANKS
from personvit.runtime.distributed import Ranks, any_rank
from personvit.runtime.progress import format_duration, log_progress, memory_gb
from personvit.runtime.runlog import FinetuneFolder
from personvit.runtime.seed import rng_state, set_rng_state
from personvit.runtime.signals import StopSignal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        interrupted: a signal stopped it; `--resume auto` goes on.
        checkpoint: the newest checkpoint.
        model: backbone, neck and classifier, as of the last end of an epoch or of the run.
        best: the same with the highest mAP so far; None before the first evaluation.
        evaluations: of the last model on every set, with re-ranking (on rank 0) if wanted; empty if this process did
            not get to it.
    """

    step: int
    interrupted: bool
    checkpoint: Path
    model: Path
    best: Path | None
    evaluations: list[Evaluation]


class FinetuneRun(TrainingRun[FinetuneResult]):
    """A fine-tuning run in its folder.

    Attributes:
        epoch: epochs done.
        epoch_step: steps done in the epoch after them.
        data: training images, and the sets to evaluate on.
        trainer: model, losses and optimiser.

    Args:
        cfg: configuration.
        folder: a prepared run folder.
        ranks: this process and its peers.
        resume: None, "auto" (the folder's last checkpoint, if there is one), or the path of a checkpoint.

    Raises:
        DataError: a set cannot be read, or has fewer identities than a batch.
        ConfigError: values that contradict each other or the data.
        CheckpointError: weights or checkpoint cannot be read or do not fit.
    """

    folder: FinetuneFolder

    def __init__(self, cfg: FinetuneConfig, folder: FinetuneFolder, ranks: Ranks, resume: str | None = None) -> None:
        super().__init__(folder, ranks, cfg.train.non_finite_limit, cfg.optim.lr)
        self.cfg = cfg
        ops.set_backend(cfg.kernels.backend)
        self.data = open_finetune_data(cfg)
        self.trainer = FinetuneStep(cfg, ranks, self.data.num_ids, self.data.num_cameras)
        self._reader = FinetuneReader(cfg, self.data.train, ranks.rank, ranks.world_size)
        self._evaluator = FinetuneEvaluator(cfg, self.data, ranks)
        self.epoch = 0
        self.epoch_step = 0
        self._epoch_steps = 0
        self._evaluated = 0  # step of the newest evaluation
        self._best: dict[str, float] | None = None
        self._evaluations: list[Evaluation] = []
        path = resume_path(folder, resume)
        if path is not None:
            self._restore(path)
        elif resume == "auto":
            logger.info("--resume auto: %s does not exist, so the run starts anew", folder.last)

    def _trained(self) -> bool:
        """Whether all steps are done."""
        return self.epoch >= self.cfg.train.epochs or self.step >= (self.cfg.train.max_steps or float("inf"))

    def _evaluation_due(self) -> bool:
        if self._evaluated == self.step:
            return False
        every = self.cfg.eval.every_epochs
        return self._trained() or (self.epoch_step == 0 and every > 0 and self.epoch % every == 0)

    def _finished(self) -> bool:
        return self._trained() and not self._evaluation_due()

    def _redone(self) -> str | None:
        return "eval" if self._evaluation_due() else None

    def _run_epoch(self, signal: StopSignal) -> bool:
        if self._trained() or self._evaluation_due():  # the run was interrupted before this evaluation
            return False
        loader = self._reader.epoch(self.epoch, self.epoch_step)
        self._epoch_steps = loader.steps
        batches = iter(loader)
        interrupted = False
        while self.epoch_step < loader.steps and not self._trained() and not interrupted:
            self._run_step(batches)
            interrupted = any_rank(signal.received is not None, self.ranks.device)
        if self.epoch_step == loader.steps:
            self.epoch, self.epoch_step = self.epoch + 1, 0
        return interrupted

    def _run_step(self, batches: Iterator[FinetuneBatch]) -> None:
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        self.trainer.forward_backward(batch.to(self.ranks.device), self.step)
        result = self.trainer.finish(self.epoch)
        self.bad_images.add(batch.bad)
        if result.finite:
            self._non_finite.finite()
        else:
            self._non_finite.skipped(self.step + 1, result.loss, result.grad_norm, lambda: [self._content(batch)])
        self._pace.add(self.cfg.train.batch_size, waited)
        self.step += 1
        self.epoch_step += 1
        last = self._steps_left() == 0
        if self.metrics is not None and (self.step == 1 or self.step % self.cfg.train.log_every == 0 or last):
            self._log_progress(result)

    def _content(self, batch: FinetuneBatch) -> dict[str, Any]:
        """A batch as plain values and tensors, with the paths of its images."""
        return {**vars(batch), "paths": [self.data.train.paths[i] for i in batch.positions.tolist()]}

    def _steps_left(self) -> int:
        """Steps to the end of the run, if all epochs have as many as this one."""
        left = (self.cfg.train.epochs - self.epoch) * self._epoch_steps - self.epoch_step
        return left if self.cfg.train.max_steps is None else min(left, self.cfg.train.max_steps - self.step)

    def _log_progress(self, result: FinetuneStepResult) -> None:
        assert self.metrics is not None
        epoch = self.epoch + self.epoch_step / self._epoch_steps
        lr = float(self.trainer.lr[self.epoch, 0])
        memory = memory_gb(self.ranks.device)
        self.metrics.write(
            self.step,
            "train",
            epoch=epoch,
            loss=result.loss,
            loss_id=result.loss_id,
            loss_triplet=result.loss_triplet,
            accuracy=result.accuracy,
            grad_norm=result.grad_norm,
            lr=lr,
            images_per_s=self._pace.images_per_s,
            data_wait=self._pace.data_wait,
            memory_gb=memory,
            skipped=self._non_finite.count,
            **self._gpu_row(),
        )
        log_progress(
            f"epoch {epoch:.2f}/{self.cfg.train.epochs}  step {self.step}  "
            f"eta {format_duration(self._pace.eta(self._steps_left()))}  {self._pace.images_per_s:.1f} img/s  "
            f"wait {self._pace.data_wait:.0%}  loss {result.loss:.4f} (id {result.loss_id:.4f} triplet "
            f"{result.loss_triplet:.4f})  acc {result.accuracy:.1%}  lr {lr:.2e}  mem {memory:.1f} GB"
        )
        self._pace.reset()

    def _end_epoch(self, interrupted: bool) -> None:
        due, trained = self._evaluation_due(), self._trained()
        whole = self.epoch_step == 0
        if due or trained or interrupted or self.epoch % self.cfg.train.save_every_epochs == 0:
            # Before an evaluation too, however long it takes: a run that is killed in it goes on from there.
            self._write(self.folder.last)
            if whole or trained:
                self._export(self.folder.exported)
        if due and not interrupted:
            self._evaluate()
        self._pace.reset()  # none of this is training

    def _evaluate(self) -> None:
        """Evaluate on every set, at the end with re-ranking; keep the state if it is the best so far."""
        final = self._trained()
        self.trainer.share_buffers()
        text = f"{self.cfg.model.arch} after {self.epoch} epochs, {self.step} steps"
        try:
            evaluations = self._evaluator.run(self.trainer.model, text, rerank=final and self.cfg.eval.rerank.enabled)
        except DataError as error:
            if final:
                raise
            logger.warning("no evaluation at epoch %d: %s", self.epoch, error)  # no reason to end the training
            self._evaluated = self.step
            return
        self._evaluated = self.step
        self._log_evaluations(evaluations)
        mean = evaluations[0].result.mAP
        best = self._best is None or mean > self._best["mAP"]
        if best:
            self._best = {"mAP": mean, "epoch": self.epoch, "step": self.step}
            self._write(self.folder.best)
            self._export(self.folder.exported_best, evaluations)
        if final:
            self._evaluations = evaluations
            self._export(self.folder.exported, evaluations)
            self._report(evaluations)
        # Last of all: until then last.pth says that this evaluation is still to be done.
        if best and self.ranks.is_main:
            keep_snapshot(self.folder.best, self.folder.last)
        else:
            self._write(self.folder.last)

    def _log_evaluations(self, evaluations: list[Evaluation]) -> None:
        if self.metrics is None:
            return
        for one in evaluations:
            row = {"mAP": one.result.mAP, **{f"rank{k}": one.result.rank(k) for k in RANKS}, "mINP": one.result.mINP}
            self.metrics.write(self.step, "eval", one.reid_set.name, epoch=self.epoch, **row)
            logger.info(
                "epoch %d on %s: %s", self.epoch, one.reid_set.name,
                "  ".join(f"{key} {100 * value:.2f}" for key, value in row.items()),
            )  # fmt: skip

    def _report(self, evaluations: list[Evaluation]) -> None:
        """Say how good the last model is, and under which rules that was found; write it into evaluation.json."""
        if not self.ranks.is_main:
            return
        content = {
            "weights": str(self.folder.exported),
            "epoch": self.epoch,
            "step": self.step,
            "best": self._best,
            "evaluations": [one.summary() for one in evaluations],
        }
        part = self.folder.evaluation.with_name(f".{self.folder.evaluation.name}.part")
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self.folder.evaluation)
        logger.info("%s\nbest mAP of this run: %s", report_text(evaluations), self._best_text())

    def _best_text(self) -> str:
        best = self._best
        return "none" if best is None else f"{100 * best['mAP']:.2f} after epoch {best['epoch']}"

    def _write(self, path: Path) -> None:
        if self.ranks.is_main:
            write_checkpoint(path, self._state())
        self._pace.reset()

    def _export(self, path: Path, evaluations: list[Evaluation] | None = None) -> None:
        """Write the model with everything that a user of it needs to know."""
        if not self.ranks.is_main:
            return
        plain = to_plain(self.cfg)
        metadata = {
            "mean": plain["input"]["mean"],
            "std": plain["input"]["std"],
            "recipe": {section: plain[section] for section in ("input", "loss", "optim", "train")},
            "data": self.data.names,
            "protocol": self.cfg.eval.protocol,
            "licence": self.cfg.train.licence,
            "epoch": self.epoch,
            "step": self.step,
            "metrics": {
                one.reid_set.name: {"mAP": one.result.mAP, "rank1": one.result.rank(1)} for one in evaluations or ()
            },
        }
        save_reid(self.trainer.model, path, metadata)

    def _state(self) -> dict[str, Any]:
        return {
            **self.trainer.state_dict(),
            "epoch": self.epoch,
            "args": to_plain(self.cfg),
            "personvit": {
                "command": self.folder.command,
                "step": self.step,
                "epoch_step": self.epoch_step,
                "evaluated": self._evaluated,
                "best": self._best,
                "data": self.data.identity(),
                "world_size": self.ranks.world_size,
                "skipped": self._non_finite.count,
                "rng": rng_state(),
                "versions": {"personvit": __version__, "torch": str(torch.__version__)},
            },
        }

    def _restore(self, path: Path) -> None:
        state = read_checkpoint(path)
        check_same_finetuning(path, state, self.cfg, self.data.identity())
        own = state["personvit"]
        self.trainer.load_state_dict(state, path)
        self.epoch, self.epoch_step, self.step = int(state["epoch"]), int(own["epoch_step"]), int(own["step"])
        self._evaluated, self._best = int(own["evaluated"]), own["best"]
        self._non_finite.count = int(own["skipped"])
        set_rng_state(own["rng"])
        logger.info("continuing from %s after %d epochs and %d steps", path, self.epoch, self.epoch_step)

    def _log_plan(self) -> None:
        cfg, ranks = self.cfg, self.ranks
        for table in self.data.tables():
            logger.info("%s", table)
        if self.trainer.weights is not None:
            logger.info("%s", self.trainer.weights.table())
        else:
            logger.info("no model.weights: the backbone starts from random weights")
        instances = cfg.train.instances
        logger.info(
            "%s, %.2fM parameters, on %d x %s, %s; %d images of %d identities, batch %d = %d rank(s) x %d identities x "
            "%d images; %d epochs",
            cfg.model.arch, sum(p.numel() for p in self.trainer.model.parameters()) / 1e6, ranks.world_size,
            ranks.device.type, cfg.train.precision, len(self.data.train), self.data.num_ids, cfg.train.batch_size,
            ranks.world_size, cfg.train.batch_size // (ranks.world_size * instances), instances, cfg.train.epochs,
        )  # fmt: skip

    def _result(self, *, interrupted: bool) -> FinetuneResult:
        best = None if self._best is None else self.folder.exported_best
        return FinetuneResult(self.step, interrupted, self.folder.last, self.folder.exported, best, self._evaluations)
