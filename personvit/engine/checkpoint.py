"""Checkpoints: written whole or not at all, read without executing anything.

The layout is that of bytedance/ibot main_ibot.py, which the published fine-tuning code reads:

    student    `module.backbone.*`, `module.head.*`
    teacher    `backbone.*`, `head.*`
    optimizer  AdamW's state
    epoch      epochs done
    args       the configuration; nested dicts of plain values instead of a pickled Namespace
    ibot_loss  `center` [1, K], `center2` [1, 1, K']
    personvit  ours: step, position in the epoch, generators, versions, counters

`model`, `state_dict` and `module` are never names at the top: the published reader would descend into them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personvit.errors import CheckpointError


def write_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a file beside `path`, flush it to the disk, then rename it: a crash leaves the old file or the new one.

    Args:
        path: where to; its folder is created.
        state: tensors and plain values.

    Raises:
        CheckpointError: the disk is full or not writable. The file that was at `path` is untouched.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    # torch's archive writer turns the OSError of a full disk into a RuntimeError
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise CheckpointError(_describe_write_failure(path, error)) from error


def keep_snapshot(path: Path, snapshot: Path) -> None:
    """Give the checkpoint at `path` a second name that later writes do not touch.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    part = snapshot.with_name(f".{snapshot.name}.part")
    try:
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)  # costs no space: `write_checkpoint` replaces files, it never changes one
        except OSError:  # a file system without hard links
            shutil.copyfile(path, part)
        os.replace(part, snapshot)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise CheckpointError(_describe_write_failure(snapshot, error)) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint of this project onto the CPU.

    Raises:
        CheckpointError: no such file, damaged, holding anything but tensors and plain values, or another layout.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"--resume {path}: no such file. Use --resume auto, or name a checkpoint.") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects, not only tensors and plain values, and is refused, because loading them "
            f"could run code ({_first_line(error)}). To start from its weights: model.weights={path}"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {_first_line(error)}. It is damaged or not a checkpoint. Resume from an earlier "
            f"snapshot: --resume checkpoints/checkpointNNNN.pth"
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("personvit"), dict):
        keys = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint that this project can resume from (found: {keys[:200]}): the run's position "
            f"is missing. To start a new run from its weights: model.weights={path}"
        )
    return state


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, path: str | Path) -> None:
    """Compare names and shapes before anything is loaded.

    Args:
        found: tensors of the checkpoint.
        wanted: tensors of the model as configured.
        what: name of the part, for the message.
        path: the checkpoint, for the message.

    Raises:
        CheckpointError: naming the first difference.
    """
    for name, tensor in wanted.items():
        if name not in found:
            difference = f"{name} is missing in it"
        elif found[name].shape != tensor.shape:
            difference = f"{name} is {list(found[name].shape)} in it and {list(tensor.shape)} as configured"
        else:
            continue
        break
    else:
        extra = next((name for name in found if name not in wanted), None)
        if extra is None:
            return
        difference = f"{extra} is in it and not in the configured model"
    raise CheckpointError(
        f"{path} does not fit the configuration: {what} {difference}. Resume with the configuration that the run "
        f"began with (config.yaml in its folder), or start a new run elsewhere: --out DIR"
    )


def _describe_write_failure(path: Path, error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    reason = (cause.strerror if isinstance(cause, OSError) else None) or _first_line(error)
    try:
        free = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free)"
    except OSError:
        free = ""
    kept = f"The previous {path.name} is untouched. " if path.exists() else ""
    return f"cannot write {path}: {reason}{free}. {kept}Free some space, then continue with --resume auto"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; file systems that cannot sync a folder are left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
