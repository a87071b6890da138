"""Whether and where a run goes on, and whether it still is the same run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personvit.config import FinetuneConfig, PretrainConfig, to_plain
from personvit.errors import CheckpointError
from personvit.runtime.runlog import RunFolder

logger = logging.getLogger(__name__)

_FREE_TO_CHANGE = (
    "train.max_steps",
    "train.accumulate",
    "train.log_every",
    "train.save_every_steps",
    "train.save_every_epochs",
    "train.keep_every_epochs",
    "train.non_finite_limit",
    "train.compile",
    "train.licence",
    "data.num_workers",
    "data.prefetch",
    "data.probe_root",
    "data.test_",
    "eval.",
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


def check_command(path: Path, state: Mapping[str, Any], command: str) -> None:
    """Refuse the checkpoint of another command.

    Raises:
        CheckpointError: it was written by the other one.
    """
    written_by = state["personvit"].get("command", "pretrain")
    if written_by != command:
        raise CheckpointError(
            f"--resume {path}: this is a checkpoint of personvit {written_by}, which personvit {command} cannot "
            f"continue. Start a new run from its weights: --out DIR model.weights={path}"
        )


def check_same_run(
    path: Path, state: Mapping[str, Any], cfg: PretrainConfig, steps_per_epoch: int, images: int
) -> None:
    """Refuse a checkpoint of pre-training whose position means something else now; warn about changed values.

    Raises:
        CheckpointError: of fine-tuning, or an epoch had another number of steps, so the position in the data is lost.
    """
    check_command(path, state, "pretrain")
    own = state["personvit"]
    if own["steps_per_epoch"] != steps_per_epoch or own["images"] != images:
        raise CheckpointError(
            f"{path} was written with {own['images']} images and {own['steps_per_epoch']} steps an epoch; now there "
            f"are {images} and {steps_per_epoch}, so its place in the data is lost. Use the same data.root and "
            f"train.batch_size ({state['args']['train']['batch_size']}), or start a new run from its weights: "
            f"--out DIR model.weights={path}"
        )
    _tell_changes(state, cfg)


def check_same_finetuning(path: Path, state: Mapping[str, Any], cfg: FinetuneConfig, data: Mapping[str, int]) -> None:
    """Refuse a checkpoint of fine-tuning on other images or with other batches; warn about changed values.

    Args:
        path: the checkpoint.
        state: its content.
        cfg: configuration now.
        data: what the training set is now: `images`, `ids`, and `labels`, a checksum.

    Raises:
        CheckpointError: of pre-training, another training set, or batches of another make.
    """
    check_command(path, state, "finetune")
    before = state["personvit"]["data"]
    start_anew = f"or start a new run from its weights: --out DIR model.weights={path}"
    if dict(before) != dict(data):
        differs = "identities or cameras differ" if before["images"] == data["images"] else "the images differ"
        raise CheckpointError(
            f"{path} was trained on {before['images']} images of {before['ids']} identities; now there are "
            f"{data['images']} of {data['ids']}: {differs}, so neither its classifier nor its place in the data fits. "
            f"Use the same data.name and data.root, {start_anew}"
        )
    then = state["args"]["train"]
    for key in ("batch_size", "instances"):
        if then[key] != getattr(cfg.train, key):
            raise CheckpointError(
                f"{path} was written with train.{key}={then[key]}, now it is {getattr(cfg.train, key)}, so its place "
                f"in the data is lost. Use train.{key}={then[key]}, {start_anew}"
            )
    _tell_changes(state, cfg)


def _tell_changes(state: Mapping[str, Any], cfg: PretrainConfig | FinetuneConfig) -> None:
    before, now = _flat(state.get("args", {})), _flat(to_plain(cfg))
    for key in sorted(now.keys() & before.keys()):
        if before[key] != now[key] and not key.startswith(_FREE_TO_CHANGE):
            logger.warning("resuming with a changed value: %s was %s, is now %s", key, before[key], now[key])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    return {name: leaf for key, value in tree.items() for name, leaf in _flat(value, f"{prefix}{key}.").items()}
