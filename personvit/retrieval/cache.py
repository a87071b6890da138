"""Features kept on disk between evaluations."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from personvit import __version__
from personvit.data.reid_sets import ReIDSplit
from personvit.errors import CheckpointError, DataError
from personvit.models import cameras, reid, vit
from personvit.models.weight_files import read_weight_file, write_safetensors
from personvit.retrieval import features as feature_module
from personvit.retrieval.features import Backbone, FeatureSet

logger = logging.getLogger(__name__)

_FORMAT = 1


class FeatureCache:
    """A folder of safetensors files, one for the features of a list of images by a model.

    A file is found again only while everything that its features depend on is the same: the weights by content, the
    images by path, size and times of change, the input size and normalisation, and the code and device that computed
    them. Nothing is ever looked up by name alone, so nothing can be stale; what is no longer used may be deleted.

    Args:
        folder: made on the first write.
        origin: what the features depend on beside the images, as plain values.
    """

    def __init__(self, folder: str | Path, origin: dict[str, Any]) -> None:
        self.folder = Path(folder).expanduser()
        self.origin = {
            "format": _FORMAT,
            "personvit": __version__,
            "torch": torch.__version__,
            "code": _code(),
            **origin,
        }

    def get(self, split: ReIDSplit, extract: Callable[[ReIDSplit], FeatureSet]) -> FeatureSet:
        """The features of a split, from the folder or else by `extract`, which are then kept.

        Raises:
            DataError: a file of the split is missing, or the folder cannot be written.
        """
        key = self._key(split)
        path = self.folder / f"features-{key[:32]}.safetensors"
        found = _read(path, key, len(split)) if path.exists() else None
        if found is not None:
            logger.info("features of %d images from %s", len(split), path)
            return FeatureSet(found, split.pids, split.camids, split.paths)
        result = extract(split)
        try:
            write_safetensors(path, {"features": result.features}, {"key": key, "images": len(split), **self.origin})
        except CheckpointError as error:
            raise DataError(f"cache={self.folder}: {error} Or evaluate without cache=FOLDER.") from None
        return result

    def _key(self, split: ReIDSplit) -> str:
        digest = hashlib.sha256(json.dumps(self.origin, sort_keys=True).encode())
        for path in split.paths:
            try:
                status = Path(path).stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}). Is the data set complete?") from None
            line = (str(Path(path).absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            digest.update(repr(line).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def weights_digest(model: Backbone) -> str:
    """SHA-256 of the parameters and buffers of a model, in hexadecimal: of what computes, whatever file it came from.

    Raises:
        TypeError: no nn.Module, so that nobody knows what it computes with.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"features of a {type(model).__name__} cannot be kept: only those of an nn.Module")
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, key: str, count: int) -> torch.Tensor | None:
    try:
        tensors, metadata = read_weight_file(path)
    except CheckpointError as error:
        logger.warning("%s Its features are computed again.", error)
        return None
    found = tensors.get("features")
    if metadata.get("key") != key or not isinstance(found, torch.Tensor) or found.dim() != 2 or len(found) != count:
        logger.warning("%s does not hold what its name says; its features are computed again.", path)
        return None
    return found


def _code() -> str:
    """Digest of the code between an image and its feature: a change there makes other features."""
    files: Sequence[str | None] = (vit.__file__, cameras.__file__, reid.__file__, feature_module.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files if file)).hexdigest()
