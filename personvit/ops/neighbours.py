"""Distances and nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from personvit.ops import backend, native, reference_retrieval

_STEP = 1 << 36
"""Differences of features between two calls of `progress`: about a second on two cores."""


def nearest(
    query: Tensor, gallery: Tensor, k: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest gallery rows of every query row by squared euclidean distance, and its largest distance.

    Distances are float32 sums of squared differences in a fixed order: they do not depend on the backend, the number
    of threads or the size of the sets, and are exactly 0 for equal rows. The Q x G matrix is never held. A set against
    itself (the same tensor twice) costs half.

    Args:
        query: [Q, D] float32.
        gallery: [G, D] float32, on the device of query.
        k: neighbours per query, 1 to G.
        progress: called with (steps done, steps in all) after each step of about a second.

    Returns:
        distances [Q, k] float32, ascending; indices [Q, k] int64 into the gallery; row_max [Q] float32, the largest
        distance to any gallery row. Equal distances are ordered by the lower index. A distance that is NaN (a NaN among
        the features, or infinity minus infinity) comes last and is never the largest.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or k out of range.
    """
    check_features(query, gallery, "nearest")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"nearest: k={k} must be from 1 to the {len(gallery)} rows of the gallery")
    itself = query is gallery
    query, gallery = query.detach(), gallery.detach()
    device = query.device.type
    if progress is None:
        found: tuple[Tensor, Tensor, Tensor] = backend.call("knn", device, query, query if itself else gallery, k)
        return found
    steps = max(1, query.numel() * len(gallery) // _STEP)
    if itself and device == "cpu" and backend.choose("knn", device) == "native":
        return native.knn_itself(query, k, steps, lambda step: progress(step, steps))
    parts = []
    for step, rows in enumerate(query.tensor_split(steps), start=1):
        parts.append(backend.call("knn", device, rows, gallery, k))
        progress(step, steps)
    distances, indices, row_max = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return distances, indices, row_max


def knn(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of every query row: `nearest` without the largest distances.

    Args:
        query: [Q, D] float32.
        gallery: [G, D] float32, on the device of query.
        k: neighbours per query, 1 to G.

    Returns:
        distances [Q, k] float32, ascending, and indices [Q, k] int64 into the gallery.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or k out of range.
    """
    distances, indices, _ = nearest(query, gallery, k)
    return distances, indices


def pairwise_distance(query: Tensor, gallery: Tensor) -> Tensor:
    """All squared euclidean distances, with the arithmetic of `nearest`.

    Args:
        query: [Q, D] float32.
        gallery: [G, D] float32, on the device of query.

    Returns:
        [Q, G] float32; exactly 0 for equal rows, never negative.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_features(query, gallery, "pairwise_distance")
    distances: Tensor = backend.call("pairwise_distance", query.device.type, query.detach(), gallery.detach())
    return distances


def check_features(query: Tensor, gallery: Tensor, name: str) -> None:
    """Refuse what is not two float32 matrices of one width on one device.

    Raises:
        ValueError: with the shapes, types or devices that were given.
    """
    if query.dim() != 2 or gallery.dim() != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"{name} needs query [Q, D] and gallery [G, D], got {list(query.shape)} and {list(gallery.shape)}. "
            f"Features of one model have one width."
        )
    if query.dtype != torch.float32 or gallery.dtype != torch.float32:
        raise ValueError(f"{name} needs float32, got {query.dtype} and {gallery.dtype}. Convert with .float()")
    if query.device != gallery.device:
        raise ValueError(f"{name}: query lies on {query.device}, gallery on {gallery.device}. Move one with .to()")


backend.register(
    backend.Operator(
        "knn",
        backend.Implementation("reference", reference_retrieval.knn, ("cpu", "cuda"), "plain torch, rows by rows"),
        (backend.Implementation("native", native.knn, ("cpu", "cuda"), "C++/CUDA extension", native.why_not),),
    )
)
backend.register(
    backend.Operator(
        "pairwise_distance",
        backend.Implementation(
            "reference", reference_retrieval.squared_distances, ("cpu", "cuda"), "plain torch, a feature at a time"
        ),
        (
            backend.Implementation(
                "native", native.pairwise_distance, ("cpu", "cuda"), "C++/CUDA extension", native.why_not
            ),
        ),
    )
)
