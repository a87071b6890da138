"""The run folder: who may write into it, and the files that grow during a run.

config.yaml                    recipe and overrides as given; `--config RUN/config.yaml` repeats the run
resolved.yaml                  every key with its value
metrics.jsonl, tensorboard/    one row per logged step
train.log                      what the console showed
checkpoints/last.pth           the newest state; checkpointNNNN.pth are kept
exported/backbone.safetensors  the teacher's backbone
bad_images.txt                 images that could not be read
non_finite/                    batches of steps whose loss or gradient was not finite
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
    "exported/backbone.safetensors",
    "non_finite/step*.pt",
)


class RunFolder:
    """Paths inside a run folder. Nothing is created until `prepare`."""

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
            RunFolderError: the folder is not empty and neither was asked for, or it cannot be created.
        """
        if self.root.exists() and not self.root.is_dir():
            raise RunFolderError(f"--out {self.root} is a file. Name a folder: --out DIR")
        try:
            occupied = self.root.is_dir() and any(self.root.iterdir())
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

    def _delete_earlier_run(self) -> None:
        for pattern in _WRITTEN_BY_A_RUN:
            for path in self.root.glob(pattern):
                path.unlink()
        for folder in {Path(pattern).parent for pattern in _WRITTEN_BY_A_RUN} - {Path()}:
            path = self.root / folder
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


class MetricLog:
    """Rows of numbers, each in metrics.jsonl and in TensorBoard."""

    def __init__(self, folder: RunFolder, resumed_step: int = 0) -> None:
        """Open the log; rows of steps after `resumed_step` (0: all rows) are dropped, so that none appears twice."""
        self._path = folder.metrics
        _drop_rows_after(self._path, resumed_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=resumed_step + 1 if resumed_step else None)

    def write(self, step: int, kind: str = "train", **values: float | int | None) -> None:
        """Append one row.

        Args:
            step: optimiser steps done.
            kind: train, health or probe.
            **values: numbers; a value that is not finite becomes null, which JSON can hold.
        """
        row: dict[str, Any] = {"step": step, "kind": kind}
        for key, value in values.items():
            row[key] = value if value is not None and math.isfinite(value) else None
            if row[key] is not None:
                self._board.add_scalar(f"{kind}/{key}", value, step)
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


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept) if step else "", encoding="utf-8")
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
