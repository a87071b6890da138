"""Nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from personvit.ops import backend, native, reference


def knn(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of every query row, by squared euclidean distance.

    Distances are float32 sums of squared differences in a fixed order: they do not depend on the backend, the number
    of threads or the size of the sets, and are exactly 0 for equal rows. The Q x G matrix is never held.

    Args:
        query: [Q, D] float32.
        gallery: [G, D] float32, on the device of query.
        k: neighbours per query, 1 to G.

    Returns:
        distances [Q, k] float32, ascending, and indices [Q, k] int64 into the gallery. Equal distances are ordered by
        the lower index. A distance that is NaN (a NaN among the features, or infinity minus infinity) comes last.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or k out of range.
    """
    if query.dim() != 2 or gallery.dim() != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"knn needs query [Q, D] and gallery [G, D], got {list(query.shape)} and {list(gallery.shape)}"
        )
    if query.dtype != torch.float32 or gallery.dtype != torch.float32:
        raise ValueError(f"knn needs float32, got {query.dtype} and {gallery.dtype}. Convert with .float()")
    if query.device != gallery.device:
        raise ValueError(f"knn: query lies on {query.device}, gallery on {gallery.device}. Move one with .to()")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"knn: k={k} must be from 1 to the {len(gallery)} rows of the gallery")
    distances, indices = backend.call("knn", query.device.type, query.detach(), gallery.detach(), k)
    return distances, indices


backend.register(
    backend.Operator(
        "knn",
        backend.Implementation("reference", reference.knn, ("cpu", "cuda"), "plain torch, rows by rows"),
        (backend.Implementation("native", native.knn, ("cpu", "cuda"), "C++/CUDA extension", native.why_not),),
    )
)
