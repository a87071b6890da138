"""The compiled operators of `csrc/`: loading, and the shape functions that torch needs to trace them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = Path(__file__).resolve().parent.parent
PANEL = 16
"""Rows that the CPU operators lay side by side (csrc/cpu/panels.h)."""
BUILD_COMMAND = "pip install -e . --no-build-isolation"


@functools.cache
def load_cpu() -> str | None:
    """Load personvit._C (schemas and CPU operators) once. Returns why that failed, None if it did not."""
    reason = _load_library("_C.so")
    if reason is None:
        for name, fake in _FAKES.items():
            torch.library.register_fake(f"personvit::{name}", fake)
    return reason


@functools.cache
def load_cuda() -> str | None:
    """Load personvit._C_cuda (CUDA operators) once, after personvit._C. Returns why that failed, None if it did not."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    return load_cpu() or _load_library("_C_cuda.so")


def why_not(device: str) -> tuple[str, str] | None:
    """Why the compiled operators cannot run on this type of device, with the remedy; None if they can."""
    if device == "cpu":
        reason = load_cpu()
        return None if reason is None else (reason, BUILD_COMMAND)
    if device == "cuda":
        reason = load_cuda()
        return None if reason is None else (reason, f"PERSONVIT_CUDA=ON {BUILD_COMMAND}")
    return f"the compiled operators know cpu and cuda, not {device}", "move the tensors to the CPU"


def block_masks(
    targets: Tensor, height: int, width: int, seed: int, first: int, log_aspect_low: float, log_aspect_high: float
) -> Tensor:
    """`personvit::block_masks`; see `personvit.ops.block_masks`."""
    masks: Tensor = torch.ops.personvit.block_masks(
        targets, height, width, seed, first, log_aspect_low, log_aspect_high
    )
    return masks


def photometry(
    views: Tensor,
    maps: Tensor,
    kernels: Tensor,
    radius: Tensor,
    solarize: Tensor,
    mean: Tensor,
    deviation: Tensor,
    out: Tensor,
) -> None:
    """`personvit::photometry`; see `personvit.ops.photometry`."""
    torch.ops.personvit.photometry(views, maps, kernels, radius, solarize, mean, deviation, out)


def knn(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`personvit::knn`; see `personvit.ops.nearest`."""
    distances, indices, row_max = torch.ops.personvit.knn(query, gallery, k)
    return distances, indices, row_max


def knn_itself(features: Tensor, k: int, steps: int, done: Callable[[int], None]) -> tuple[Tensor, Tensor, Tensor]:
    """`knn` of a set among itself on the CPU in about equal steps; `done` is called with the number after each.

    The same bits as in one go, and Ctrl-C works between the steps.
    """
    features = features.contiguous()
    panels, distances, indices, row_max = torch.ops.personvit.knn_begin(features, k)
    for step in range(steps):
        done(torch.ops.personvit.knn_step(features, panels, distances, indices, row_max, step, steps))
    return distances, indices, row_max


def pairwise_distance(query: Tensor, gallery: Tensor) -> Tensor:
    """`personvit::pairwise_distance`; see `personvit.ops.pairwise_distance`."""
    distances: Tensor = torch.ops.personvit.pairwise_distance(query, gallery)
    return distances


def k_reciprocal(neighbours: Tensor, k1: int) -> tuple[Tensor, Tensor]:
    """`personvit::k_reciprocal`; see `personvit.ops.k_reciprocal`."""
    indptr, indices = torch.ops.personvit.k_reciprocal(neighbours, k1)
    return indptr, indices


def reciprocal_weights(features: Tensor, row_max: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """`personvit::reciprocal_weights`; see `personvit.ops.reciprocal_weights`."""
    values: Tensor = torch.ops.personvit.reciprocal_weights(features, row_max, indptr, indices)
    return values


def query_expansion(
    indptr: Tensor, indices: Tensor, values: Tensor, neighbours: Tensor, k2: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`personvit::query_expansion`; see `personvit.ops.query_expansion`."""
    new_indptr, new_indices, new_values = torch.ops.personvit.query_expansion(indptr, indices, values, neighbours, k2)
    return new_indptr, new_indices, new_values


def jaccard(
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    weights: Tensor,
    gallery_rows: int,
) -> Tensor:
    """`personvit::jaccard` of some rows and an inverted index; see `personvit.ops.jaccard`."""
    distances: Tensor = torch.ops.personvit.jaccard(indptr, indices, values, offsets, rows, weights, gallery_rows)
    return distances


def inverted_index(indptr: Tensor, indices: Tensor, values: Tensor, num_query: int) -> tuple[Tensor, Tensor, Tensor]:
    """`personvit::inverted_index`; see `personvit.ops.encode`."""
    offsets, rows, weights = torch.ops.personvit.inverted_index(indptr, indices, values, num_query)
    return offsets, rows, weights


def rerank_matrix(
    query: Tensor,
    gallery: Tensor,
    row_max: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    weights: Tensor,
    lambda_value: float,
) -> Tensor:
    """`personvit::rerank_matrix`: the last stage of `personvit.ops.rerank`, all distances of a block of queries."""
    distances: Tensor = torch.ops.personvit.rerank_matrix(
        query, gallery, row_max, indptr, indices, values, offsets, rows, weights, lambda_value
    )
    return distances


def rerank_lists(
    query: Tensor,
    gallery: Tensor,
    row_max: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    weights: Tensor,
    lambda_value: float,
    top: int,
) -> tuple[Tensor, Tensor]:
    """`personvit::rerank_lists`: the last stage of `personvit.ops.rerank`, the best of each query."""
    distances, best = torch.ops.personvit.rerank_lists(
        query, gallery, row_max, indptr, indices, values, offsets, rows, weights, lambda_value, top
    )
    return distances, best


def rank_counts(
    distances: Tensor, q_pids: Tensor, g_pids: Tensor, q_camids: Tensor, g_camids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`personvit::rank_counts`; see `personvit.ops.rank_counts`."""
    precision, penalty, first, matches = torch.ops.personvit.rank_counts(distances, q_pids, g_pids, q_camids, g_camids)
    return precision, penalty, first, matches


def _load_library(name: str) -> str | None:
    path = PACKAGE / name
    if not path.is_file():
        return f"personvit/{name} was not built"
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        # Typically a library of another torch or CUDA version: the dynamic linker names what it misses.
        return f"personvit/{name} does not load: {error}"
    return None


def _fake_block_masks(
    targets: Tensor, height: int, width: int, seed: int, first: int, log_aspect_low: float, log_aspect_high: float
) -> Tensor:
    return targets.new_empty((targets.shape[0], height, width), dtype=torch.bool)


def _fake_knn(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64), query.new_empty(query.shape[0])


def _fake_pairwise_distance(query: Tensor, gallery: Tensor) -> Tensor:
    return query.new_empty((query.shape[0], gallery.shape[0]))


def _fake_k_reciprocal(neighbours: Tensor, k1: int) -> tuple[Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()  # known only when the sets are
    return neighbours.new_empty(neighbours.shape[0] + 1), neighbours.new_empty(entries)


def _fake_reciprocal_weights(features: Tensor, row_max: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    return features.new_empty(indices.shape[0])


def _fake_query_expansion(
    indptr: Tensor, indices: Tensor, values: Tensor, neighbours: Tensor, k2: int
) -> tuple[Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    return indptr.new_empty(indptr.shape[0]), indices.new_empty(entries), values.new_empty(entries)


def _fake_jaccard(indptr: Tensor, indices: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return values.new_empty((indptr.shape[0] - 1, rest[-1]))


def _fake_inverted_index(
    indptr: Tensor, indices: Tensor, values: Tensor, num_query: int
) -> tuple[Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    return indptr.new_empty(indptr.shape[0]), indptr.new_empty(entries, dtype=torch.int32), values.new_empty(entries)


def _fake_rerank_matrix(query: Tensor, gallery: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((query.shape[0], gallery.shape[0]))


def _fake_rerank_lists(query: Tensor, gallery: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], rest[-1])
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


def _fake_photometry(views: Tensor, *rest: Any) -> None:
    return None


def _fake_knn_begin(features: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    panels = features.new_empty(((features.shape[0] + PANEL - 1) // PANEL, features.shape[1], PANEL))
    return (panels, *_fake_knn(features, features, k))


def _fake_knn_step(
    features: Tensor, panels: Tensor, distances: Tensor, indices: Tensor, largest: Tensor, step: int, steps: int
) -> int:
    return step + 1


def _fake_rank_counts(
    distances: Tensor, q_pids: Tensor, g_pids: Tensor, q_camids: Tensor, g_camids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = distances.shape[0]
    real, whole = torch.float64, torch.int64
    return (
        distances.new_empty(size, dtype=real),
        distances.new_empty(size, dtype=real),
        distances.new_empty(size, dtype=whole),
        distances.new_empty(size, dtype=whole),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "block_masks": _fake_block_masks,
    "photometry": _fake_photometry,
    "knn": _fake_knn,
    "knn_begin": _fake_knn_begin,
    "knn_step": _fake_knn_step,
    "pairwise_distance": _fake_pairwise_distance,
    "k_reciprocal": _fake_k_reciprocal,
    "reciprocal_weights": _fake_reciprocal_weights,
    "query_expansion": _fake_query_expansion,
    "jaccard": _fake_jaccard,
    "inverted_index": _fake_inverted_index,
    "rerank_matrix": _fake_rerank_matrix,
    "rerank_lists": _fake_rerank_lists,
    "rank_counts": _fake_rank_counts,
}
