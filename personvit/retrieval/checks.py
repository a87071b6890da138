"""What features must be before anything is ranked by them."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor

from personvit.errors import DataError

_LONGEST = 1e18
"""Distances of longer features overflow float32."""

Features: TypeAlias = "Tensor | npt.NDArray[Any]"


def check_features(query: Features, gallery: Features) -> tuple[Tensor, Tensor]:
    """Query [Q, D] and gallery [G, D] as contiguous float32 tensors without gradient on one device.

    Raises:
        DataError: no row at all, different widths or devices, a value that is not finite or huge, or a row of zeros.
    """
    parts = (_tensor("query", query), _tensor("gallery", gallery))
    for name, part in zip(("query", "gallery"), parts, strict=True):
        if not part.numel():
            raise DataError(
                f"The {name} is empty ({len(part)} rows of {part.shape[1]} features): nothing can be ranked. Check the "
                f"folders of the data set with data.root=FOLDER."
            )
    if parts[0].shape[1] != parts[1].shape[1]:
        raise DataError(
            f"Query features have {parts[0].shape[1]} dimensions, gallery features {parts[1].shape[1]}. "
            f"Extract both with the same model."
        )
    if parts[0].device != parts[1].device:
        raise DataError(f"Query lies on {parts[0].device}, gallery on {parts[1].device}. Move one with .to(device).")
    for name, part in zip(("query", "gallery"), parts, strict=True):
        _check_rows(name, part)
    return parts


def _tensor(name: str, features: Features) -> Tensor:
    tensor = features.detach() if isinstance(features, Tensor) else torch.as_tensor(features)
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise DataError(
            f"The {name} is a {tensor.dtype} array of shape {list(tensor.shape)}: expected float features, "
            f"one row per image, [images, features]."
        )
    return tensor.float().contiguous()


def _check_rows(name: str, part: Tensor) -> None:
    lengths = torch.linalg.vector_norm(part, dim=1)  # NaN and infinity pass through
    faults = (
        (
            "NaN, infinity or values whose squares overflow",
            ~(lengths < _LONGEST),
            "The weights likely come from a diverged training; take an earlier checkpoint with model.weights=FILE",
        ),
        (
            "only zeros",
            lengths == 0,
            "Such an image has no direction to compare; was its feature never filled in? Extract it again, or leave "
            "the image out",
        ),
    )
    for fault, bad, cause in faults:
        rows = torch.nonzero(bad).flatten()
        if len(rows):
            first = int(rows[0])
            raise DataError(f"{len(rows)} of {len(part)} {name} features hold {fault} (first: row {first}). {cause}.")
