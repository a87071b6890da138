"""What every training run does, whatever it trains: rows, signals, steps that are not finite, and how it ends."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from personvit.engine.checkpoint import write_checkpoint
from personvit.errors import NonFiniteError
from personvit.runtime.distributed import Ranks
from personvit.runtime.progress import Throughput
from personvit.runtime.runlog import BadImages, MetricLog, RunFolder
from personvit.runtime.signals import StopSignal
from personvit.runtime.telemetry import GpuTelemetry

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_KEPT_BATCHES = 10
"""Batches of steps that were not finite that a rank writes down at most: at full size one takes a gigabyte."""


class NonFiniteSteps:
    """Counts the steps that were skipped because loss or gradient was not finite, and keeps their batches.

    Attributes:
        count: steps skipped so far.

    Args:
        folder: run folder.
        ranks: this process and its peers.
        limit: so many in a row end the run.
        lr: learning rate, for the advice.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks, limit: int, lr: float) -> None:
        self.count = 0
        self._folder, self._ranks, self._limit, self._lr = folder, ranks, limit, lr
        self._in_row = 0

    def finite(self) -> None:
        """A step was taken."""
        self._in_row = 0

    def skipped(self, number: int, loss: float, grad_norm: float, batches: Callable[[], list[dict[str, Any]]]) -> None:
        """Count a step, write its batches down, and stop when there were too many in a row.

        Args:
            number: of the step, from 1.
            loss: of the step.
            grad_norm: of the step.
            batches: gives the contents of its micro-batches; called only if they are written.

        Raises:
            NonFiniteError: too many in a row.
        """
        self.count += 1
        self._in_row += 1
        folder = self._folder.non_finite
        suffix = f"_rank{self._ranks.rank}" if self._ranks.world_size > 1 else ""
        path = folder / f"step{number:07}{suffix}.pt"
        kept = len(list(folder.glob(f"step*{suffix}.pt")))
        if kept < _KEPT_BATCHES:
            write_checkpoint(path, {"step": number, "micro_batches": batches()})
        logger.warning(
            "step %d skipped: loss %g, gradient norm %g; nothing was updated, %s",
            number, loss, grad_norm,
            f"the batch is in {path}" if kept < _KEPT_BATCHES else f"{kept} earlier batches are in {path.parent}",
        )  # fmt: skip
        if self._in_row >= self._limit:
            raise NonFiniteError(
                f"{self._limit} steps in a row (up to step {number}) had a loss or gradient that is not finite; the "
                f"batches are in {folder}. Likely causes: a learning rate that is too high, or images that are broken. "
                f"Continue from the last checkpoint with less: --resume auto optim.lr={self._lr / 2:g}, or with "
                f"train.precision=fp32, or allow more with train.non_finite_limit={2 * self._limit}"
            )


class TrainingRun(abc.ABC, Generic[Result]):
    """A run in its folder, epoch by epoch, to its end or to a signal.

    Attributes:
        step: optimiser steps done.
        metrics: rows of the run; None before `run`, and on ranks other than 0.

    Args:
        folder: a prepared run folder.
        ranks: this process and its peers.
        non_finite_limit: so many steps in a row that are not finite end the run.
        lr: learning rate, for the advice that is given then.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks, non_finite_limit: int, lr: float) -> None:
        self.folder, self.ranks = folder, ranks
        self.step = 0
        self.metrics: MetricLog | None = None
        self._non_finite = NonFiniteSteps(folder, ranks, non_finite_limit, lr)
        self._pace = Throughput()
        self._telemetry = GpuTelemetry(ranks.local_rank) if ranks.device.type == "cuda" else None

    def run(self) -> Result:
        """Train to the end, to `train.max_steps`, or to a signal.

        Raises:
            NonFiniteError: too many steps in a row were not finite.
            CheckpointError: a checkpoint could not be written.
            DataError: too many images in a row are unreadable.
        """
        self._log_plan()
        self.metrics = MetricLog(self.folder, self.step, redone=self._redone()) if self.ranks.is_main else None
        self.bad_images = BadImages(self.folder)
        self._pace.reset()
        begin = self.step
        try:
            with StopSignal() as signal:
                while not self._finished():
                    interrupted = self._run_epoch(signal)
                    self._end_epoch(interrupted)
                    if interrupted and not self._finished():
                        logger.warning(
                            "stopped at step %d, saved %s; continue with --resume auto", self.step, self.folder.last
                        )
                        return self._result(interrupted=True)
        finally:
            if self.metrics is not None:
                self.metrics.close()
        if self.step == begin:
            logger.info("nothing left to do: %d steps are done", self.step)
        else:
            logger.info("done: %d steps; weights in %s", self.step, self.folder.exported)
        return self._result(interrupted=False)

    def _gpu_row(self) -> dict[str, float]:
        """What the GPU says about itself, for a row."""
        gpu = self._telemetry.sample() if self._telemetry is not None else None
        return gpu.as_row() if gpu is not None else {}

    def _redone(self) -> str | None:
        """Kind of the rows of step `self.step` that this run will write once more."""
        return None

    @abc.abstractmethod
    def _log_plan(self) -> None:
        """Say what is about to be done."""

    @abc.abstractmethod
    def _finished(self) -> bool:
        """Whether nothing is left to do."""

    @abc.abstractmethod
    def _run_epoch(self, signal: StopSignal) -> bool:
        """Steps up to the end of the epoch or of the run; True if a signal cut it short."""

    @abc.abstractmethod
    def _end_epoch(self, interrupted: bool) -> None:
        """Write and evaluate what is due; the epoch may have been cut short."""

    @abc.abstractmethod
    def _result(self, *, interrupted: bool) -> Result:
        """How the run ended."""
