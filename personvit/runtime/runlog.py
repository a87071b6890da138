"""The run folder: who may write into it, and the files that grow during a run.

config.yaml                    recipe and overrides as given; `--config RUN/config.yaml` repeats the run
resolved.yaml                  every key with its value
metrics.jsonl, tensorboard/    one row per logged step
train.log                      what the console showed
checkpoints/last.pth           the newest state; checkpointNNNN.pth are kept
exported/backbone.safetensors  the teacher's backbone
bad_images.txt                 images that could not be read
non_finite/                    batches of steps whose loss or gradient was not finite

A fine-tuning run has instead of the backbone, and besides:

checkpoints/best.pth           the state with the highest mAP
exported/model.safetensors     backbone, neck and classifier, as of the last epoch
exported/best.safetensors      likewise, as of best.pth
evaluation.json                figures of the last model, with and without re-ranking
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from personvit.errors import RunFolderError

logger = logging.getLogger(__name__)

_WRITTEN_BY_A_RUN = (
    "config.yaml",
    "resolved.yaml",
    "metrics.jsonl",
    "train.log",
    "bad_images.txt",
    "tensorboard/events.out.tfevents.*",
    "checkpoints/last.pth",
    "checkpoints/checkpoint[0-9][0-9][0-9][0-9].pth",
    "checkpoints/.*.part",
    "non_finite/step*.pt",
)


class RunFolder:
    """Paths inside the run folder of a pre-training. Nothing is created until `prepare`."""

    command = "pretrain"
    """The command whose runs this folder holds."""
    section = "crops"
    """A section that the configuration of this command has and that of the others does not."""
    written: tuple[str, ...] = (*_WRITTEN_BY_A_RUN, "exported/backbone.safetensors")
    """What a run writes, as patterns."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.resolved = self.root / "resolved.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.log = self.root / "train.log"
        self.last = self.root / "checkpoints" / "last.pth"
        self.exported = self.root / "exported" / "backbone.safetensors"
        self.bad_images = self.root / "bad_images.txt"
        self.non_finite = self.root / "non_finite"

    def snapshot(self, epoch: int) -> Path:
        """Path of the kept checkpoint of a 0-based epoch, numbered as in bytedance/ibot."""
        return self.last.with_name(f"checkpoint{epoch:04}.pth")

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Create the folder, or take over an existing one.

        Args:
            resume: the run goes on in this folder; nothing is deleted.
            overwrite: delete what an earlier run wrote. Files that no run writes stay.

        Raises:
            RunFolderError: the folder is not empty and neither was asked for, it holds the run of another command, or
                it cannot be created.
        """
        if self.root.exists() and not self.root.is_dir():
            raise RunFolderError(f"--out {self.root} is a file. Name a folder: --out DIR")
        try:
            occupied = self.root.is_dir() and any(self.root.iterdir())
            if occupied and (resume or overwrite):
                self.refuse_other_command()
            if occupied and overwrite:
                self._delete_earlier_run()
            elif occupied and not resume:
                raise RunFolderError(
                    f"run folder {self.root} is not empty. Add --resume auto to continue the run in it, --overwrite to "
                    f"delete that run and start anew, or --out DIR to write elsewhere."
                )
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"cannot write to run folder {self.root}: {error.strerror or error}. Name another one: --out DIR"
            ) from error

    def writes(self, path: str | Path) -> bool:
        """Whether a run in this folder writes, and `--overwrite` deletes, the file at `path`."""
        wanted = Path(path).resolve()
        return any(wanted == found.resolve() for pattern in self.written for found in self.root.glob(pattern))

    def refuse_other_command(self) -> None:
        """Refuse a folder that holds the run of another command: days of pre-training are never overwritten by this.

        Raises:
            RunFolderError: it does.
        """
        for kind in (RunFolder, FinetuneFolder):
            if kind.command != self.command and self._configured(kind.section) and not self._configured(self.section):
                raise RunFolderError(
                    f"run folder {self.root} holds a run of personvit {kind.command}, which personvit {self.command} "
                    f"neither continues nor overwrites. Write elsewhere: --out DIR"
                )

    def _configured(self, section: str) -> bool:
        try:
            lines = self.resolved.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return False
        return f"{section}:" in lines

    def _delete_earlier_run(self) -> None:
        for pattern in self.written:
            for path in self.root.glob(pattern):
                path.unlink()
        for folder in {Path(pattern).parent for pattern in self.written} - {Path()}:
            path = self.root / folder
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


class FinetuneFolder(RunFolder):
    """Paths inside the run folder of a fine-tuning."""

    command = "finetune"
    section = "eval"
    written = (
        *_WRITTEN_BY_A_RUN,
        "checkpoints/best.pth",
        "exported/model.safetensors",
        "exported/best.safetensors",
        "exported/.*.part",
        "evaluation.json",
    )

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.best = self.last.with_name("best.pth")
        self.exported = self.root / "exported" / "model.safetensors"
        self.exported_best = self.exported.with_name("best.safetensors")
        self.evaluation = self.root / "evaluation.json"


class MetricLog:
    """Rows of numbers, each in metrics.jsonl and in TensorBoard."""

    def __init__(self, folder: RunFolder, resumed_step: int = 0, redone: str | None = None) -> None:
        """Open the log.

        Args:
            folder: the run folder.
            resumed_step: rows of later steps (0: all rows) are dropped, so that none appears twice.
            redone: kind of rows that are dropped at `resumed_step` too, because they are about to be written again.
        """
        self._path = folder.metrics
        _drop_rows_after(self._path, resumed_step, redone)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=resumed_step + 1 if resumed_step else None)

    def write(self, step: int, kind: str = "train", data: str | None = None, /, **values: float | int | None) -> None:
        """Append one row.

        Args:
            step: optimiser steps done.
            kind: train, health, probe or eval.
            data: name of the labelled set that the values are figures of.
            **values: numbers; a value that is not finite becomes null, which JSON can hold.
        """
        row: dict[str, Any] = {"step": step, "kind": kind} | ({} if data is None else {"data": data})
        group = kind if data is None else f"{kind}/{data}"
        for key, value in values.items():
            row[key] = value if value is not None and math.isfinite(value) else None
            if row[key] is not None:
                self._board.add_scalar(f"{group}/{key}", value, step)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read_metrics(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that was cut off by a crash is left out.

    Args:
        path: the file.
        kind: only rows of this kind; None: all.
    """
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if kind is None or row.get("kind") == kind:
            rows.append(row)
    return rows


def _drop_rows_after(path: Path, step: int, redone: str | None) -> None:
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] < step or (row["step"] == step and row["kind"] != redone)]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows) if step else "", encoding="utf-8")
    os.replace(part, path)


class BadImages:
    """bad_images.txt: every unreadable file once. All ranks append to the same file."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.bad_images
        self._known = set(self._path.read_text(encoding="utf-8").splitlines()) if self._path.exists() else set()

    def __len__(self) -> int:
        """Number of files listed, as far as this rank knows."""
        return len(self._known)

    def add(self, paths: Iterable[str]) -> None:
        """List files that are not listed yet."""
        new = [path for path in dict.fromkeys(paths) if path not in self._known]
        if not new:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{path}\n" for path in new))
        self._known.update(new)
        logger.warning(
            "%d unreadable image(s) replaced by others so far, listed in %s; newest: %s",
            len(self._known), self._path, new[-1],
        )  # fmt: skip


def log_to_file(folder: RunFolder) -> logging.Handler:
    """Copy the package's log into train.log; remove the returned handler to stop."""
    handler = logging.FileHandler(folder.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logging.getLogger("personvit").addHandler(handler)
    return handler
