"""Files of weights: read without executing anything in them, written whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from personvit.errors import CheckpointError
from personvit.models.hub import fetch, is_reference

METADATA_KEY = "personvit"
"""Name in a safetensors header under which our metadata lies, as JSON."""


def read_weight_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of a safetensors or torch file on the CPU.

    A torch file may hold tensors, plain values, and `argparse.Namespace`, in which published checkpoints keep their
    arguments: building one sets plain attributes and runs no code. Anything else is refused.

    Args:
        path: the file, or an `hf://` reference; the format is recognised by its first bytes, not by its name.

    Returns:
        The top-level dict, and the metadata of a safetensors file of ours (empty for all others).

    Raises:
        CheckpointError: no such file, damaged, or holding objects that could run code.
    """
    path = fetch(path) if is_reference(path) else Path(path)
    if not path.is_file():
        raise CheckpointError(f"model.weights={path}: no such file. Give the path of a .safetensors or .pth file.")
    if _is_safetensors(path):
        return _read_safetensors(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is not a safetensors file, or is cut off. Copy or download it again.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, not read: the optimizer's share, two thirds of a training checkpoint, is never loaded.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_explain_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(_explain_damage(path, str(error))) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dict of tensors. Save the state dict: "
            "torch.save(model.state_dict(), FILE)"
        )
    return {str(key): value for key, value in content.items()}, {}


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and 8 + length <= path.stat().st_size


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
        metadata = json.loads(header.get(METADATA_KEY, "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(_explain_damage(path, str(error))) from None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: its header entry {METADATA_KEY!r} is not a JSON object. Export the file again.")
    return tensors, metadata


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, replace: bool = True
) -> None:
    """Write beside `path`, flush to the disk, then rename: a crash leaves the old file or the new one.

    Args:
        path: where to; its folder is created.
        tensors: contiguous or not, on any device.
        metadata: plain values; they come back from `read_weight_file`.
        replace: False: never in place of a file that is there.

    Raises:
        CheckpointError: not writable, metadata that JSON cannot hold, or a file is there that must stay.
    """
    path = Path(path)
    try:
        header = {"format": "pt", METADATA_KEY: json.dumps(dict(metadata))}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"metadata of {path} must be plain values: {error}") from None
    blob = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, header)
    _write_whole(path, lambda file: file.write(blob), replace)


def write_torch(path: str | Path, content: Mapping[str, Any], *, replace: bool = True) -> None:
    """Write a file that `torch.load(path, weights_only=True)` reads, whole or not at all.

    Args:
        path: where to; its folder is created.
        content: tensors and plain values, nested in dicts.
        replace: False: never in place of a file that is there.

    Raises:
        CheckpointError: not writable, or a file is there that must stay.
    """
    _write_whole(Path(path), lambda file: torch.save(dict(content), file), replace)


def _write_whole(path: Path, write: Callable[[BinaryIO], Any], replace: bool) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(part, path)
        else:
            _place(part, path)
    # torch's archive writer turns the OSError of a full disk into a RuntimeError
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {path}: {reason}. Free space, or choose another folder.") from error


def _place(part: Path, path: Path) -> None:
    """Give `part` its name unless that is taken; a link fails then, where a rename would replace what is there."""
    try:
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            path.touch(exist_ok=False)
            os.replace(part, path)
    except FileExistsError:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{path} exists and is left as it is. Choose another name, or remove it.") from None
    part.unlink(missing_ok=True)


def _explain_refusal(path: Path, message: str) -> str:
    found = re.search(r"(?:GLOBAL|global|class|function)[: ]+([\w.]+\.[\w.]+)", message)
    if found is None and "Unsupported" not in message:
        return _explain_damage(path, message)
    name = found.group(1) if found else message.strip().splitlines()[0]
    return (
        f"{path} is refused: it holds a Python object ({name}), and rebuilding one can run any code that the file's "
        "author wrote. Only tensors, plain values and argparse.Namespace are read. If you trust the file, take the "
        "tensors out in the environment it came from: torch.save({'state_dict': model.state_dict()}, FILE)"
    )


def _explain_damage(path: Path, message: str) -> str:
    lines = message.strip().splitlines()
    reason = lines[0].rstrip(".") if lines else "it ends too early"
    size = path.stat().st_size
    return (
        f"{path} ({size} bytes) cannot be read: {reason}. It is cut off or no weight file. Copy or download it again."
    )
