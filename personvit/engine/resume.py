"""Whether and where a run goes on, and whether it still is the same run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personvit.config import PretrainConfig, to_plain
from personvit.errors import CheckpointError
from personvit.runtime.runlog import RunFolder

logger = logging.getLogger(__name__)

_FREE_TO_CHANGE = (
    "train.max_steps",
    "train.accumulate",
    "train.log_every",
    "train.save_every_steps",
    "train.keep_every_epochs",
    "train.non_finite_limit",
    "train.compile",
    "data.num_workers",
    "data.prefetch",
    "data.probe_root",
    "health.",
    "kernels.",
)
"""Keys that do not change what is learned."""


def resume_path(folder: RunFolder, resume: str | None) -> Path | None:
    """The checkpoint to go on from, or None to start anew.

    Args:
        folder: the run folder.
        resume: None, "auto" (the folder's last checkpoint if there is one), or a path.
    """
    if resume is None:
        return None
    if resume == "auto":
        return folder.last if folder.last.is_file() else None
    return Path(resume)


def check_same_run(
    path: Path, state: Mapping[str, Any], cfg: PretrainConfig, steps_per_epoch: int, images: int
) -> None:
    """Refuse a checkpoint whose position means something else now; warn about changed values.

    Raises:
        CheckpointError: an epoch had another number of steps, so the position in the data is lost.
    """
    own = state["personvit"]
    if own["steps_per_epoch"] != steps_per_epoch or own["images"] != images:
        raise CheckpointError(
            f"{path} was written with {own['images']} images and {own['steps_per_epoch']} steps an epoch; now there "
            f"are {images} and {steps_per_epoch}, so its place in the data is lost. Use the same data.root and "
            f"train.batch_size ({state['args']['train']['batch_size']}), or start a new run from its weights: "
            f"--out DIR model.weights={path}"
        )
    before, now = _flat(state.get("args", {})), _flat(to_plain(cfg))
    for key in sorted(now.keys() & before.keys()):
        if before[key] != now[key] and not key.startswith(_FREE_TO_CHANGE):
            logger.warning("resuming with a changed value: %s was %s, is now %s", key, before[key], now[key])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    return {name: leaf for key, value in tree.items() for name, leaf in _flat(value, f"{prefix}{key}.").items()}
