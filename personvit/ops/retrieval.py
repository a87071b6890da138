"""The stages of k-reciprocal re-ranking, each on its own, and ranking metrics by counting.

The algorithm is that of Zhong et al. 2017, Re-ranking Person Re-identification with k-reciprocal Encoding, with the
details of its published code (hustvl/PersonViT, utils/reranking.py), in float32 and on sparse rows. The points of a
re-ranking are the queries followed by the gallery. A sparse matrix is (indptr [N + 1], indices [nnz], values [nnz]):
row r holds the entries indptr[r] to indptr[r + 1], columns ascending. Every result is independent of the number of
threads, and the same on CPU and CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personvit.errors import ConfigError, DataError
from personvit.ops import backend, native, reference_retrieval


def k_reciprocal(neighbours: Tensor, k1: int) -> tuple[Tensor, Tensor]:
    """Expanded k-reciprocal neighbour sets R*.

    R(i, k) are the points among the first k + 1 neighbours of i that have i among their own first k + 1. R*(i) is
    R(i, k1) with R(j, k1 / 2) of each of its points j where more than two thirds of that lie in R(i, k1) (equations 2
    and 3 of the paper; a half is rounded to even).

    Args:
        neighbours: [N, K] int64, row i the nearest points of i, nearest first and as a rule i itself among them. K is
            k1 + 1; where it is less (because N is), lists are as long as they are.
        k1: 1 or more.

    Returns:
        indptr [N + 1] int64 and indices [nnz] int64, each row ascending.

    Raises:
        ValueError: neighbours of another shape or type, or that name points outside of 0 to N - 1.
        ConfigError: k1 < 1.
    """
    _check_k(k1, "k1")
    _check_neighbours(neighbours, "k_reciprocal")
    indptr, indices = backend.call("k_reciprocal", neighbours.device.type, neighbours, k1)
    return indptr, indices


def reciprocal_weights(features: Tensor, row_max: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """Weights of the sets: exp(-O(i, j)), each row divided by its sum (equation 7).

    O(i, j) is the squared distance divided by the largest one of row i; 0 where that largest one is 0.

    Args:
        features: [N, D] float32, all points.
        row_max: [N] float32, of `nearest` of the points among themselves.
        indptr: [N + 1] int64, of `k_reciprocal`.
        indices: [nnz] int64, likewise.

    Returns:
        values [nnz] float32.

    Raises:
        ValueError: shapes, types or indices that do not fit.
    """
    points = len(features)
    if features.dim() != 2 or features.dtype != torch.float32:
        raise ValueError(f"reciprocal_weights needs features [N, D] float32, got {list(features.shape)}")
    _check_rows(indptr, indices, points, "reciprocal_weights")
    if row_max.shape != (points,) or row_max.dtype != torch.float32:
        raise ValueError(f"reciprocal_weights needs row_max [{points}] float32, got {list(row_max.shape)}")
    values: Tensor = backend.call(
        "reciprocal_weights", features.device.type, features.detach(), row_max.detach(), indptr, indices
    )
    return values


def query_expansion(
    indptr: Tensor, indices: Tensor, values: Tensor, neighbours: Tensor, k2: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Local query expansion: every row becomes the mean of the rows of its k2 nearest points.

    Args:
        indptr: [N + 1] int64.
        indices: [nnz] int64.
        values: [nnz] float32.
        neighbours: [N, K] int64, K at least min(k2, N): nearest first, as a rule the point itself in front.
        k2: 1 or more; 1 averages nothing.

    Returns:
        indptr, indices and values of the new rows.

    Raises:
        ValueError: shapes, types or indices that do not fit.
        ConfigError: k2 < 1.
    """
    _check_k(k2, "k2")
    _check_neighbours(neighbours, "query_expansion")
    points, width = neighbours.shape
    if width < min(k2, points):
        raise ValueError(f"query_expansion: k2={k2} of {points} points, but only {width} neighbours of each are given")
    _check_rows(indptr, indices, points, "query_expansion", values)
    if k2 == 1:
        return indptr, indices, values
    expanded = backend.call("query_expansion", values.device.type, indptr, indices, values, neighbours, k2)
    new_indptr, new_indices, new_values = expanded
    return new_indptr, new_indices, new_values


def jaccard(indptr: Tensor, indices: Tensor, values: Tensor, num_query: int) -> Tensor:
    """Jaccard distance of the first `num_query` rows to all others (equation 10).

    1 - t / (2 - t), where t adds up the minima of two rows, columns ascending: rows sum to 1, so 2 - t is the sum of
    the maxima. An inverted index of the gallery's columns visits only pairs that share one.

    Args:
        indptr: [N + 1] int64.
        indices: [nnz] int64.
        values: [nnz] float32.
        num_query: Q, 0 to N.

    Returns:
        [Q, N - Q] float32 in [0, 1].

    Raises:
        ValueError: shapes, types or indices that do not fit.
    """
    points = len(indptr) - 1
    _check_rows(indptr, indices, points, "jaccard", values)
    if not 0 <= num_query <= points:
        raise ValueError(f"jaccard: num_query={num_query} must be from 0 to the {points} rows")
    device = values.device.type
    index = backend.call("inverted_index", device, indptr, indices, values, num_query)
    rows = indptr[: num_query + 1]
    distances: Tensor = backend.call("jaccard", device, rows, indices, values, *index, points - num_query)
    return distances


def rank_counts(
    distances: Tensor, q_pids: Tensor, g_pids: Tensor, q_camids: Tensor, g_camids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of each query under the Market-1501 protocol, by counting instead of sorting.

    Gallery entries are ordered by (distance, index); those of the query's identity and camera are taken out and shift
    later ranks up. A match is of the query's identity and another camera; its rank is one plus the number of entries
    kept before it. With R matches at the ranks p_1 < ... < p_R, AP = mean_i(i / p_i) and INP = R / p_R.

    Args:
        distances: [Q, G] float32, smaller is closer. A block of the queries is enough.
        q_pids: [Q] int64 identities, on the device of distances like all labels.
        g_pids: [G] int64 identities.
        q_camids: [Q] int64 cameras.
        g_camids: [G] int64 cameras.

    Returns:
        average_precision [Q] float64, inverse_penalty [Q] float64, first_match [Q] int64 (rank from 1), matches [Q]
        int64. All are 0 for a query without a match.

    Raises:
        ValueError: shapes, types or devices that do not fit.
        DataError: NaN among the distances.
    """
    if distances.dim() != 2 or distances.dtype != torch.float32:
        raise ValueError(f"rank_counts needs distances [Q, G] float32, got {list(distances.shape)} {distances.dtype}")
    for name, labels, count in (
        ("q_pids", q_pids, distances.shape[0]),
        ("g_pids", g_pids, distances.shape[1]),
        ("q_camids", q_camids, distances.shape[0]),
        ("g_camids", g_camids, distances.shape[1]),
    ):
        if labels.shape != (count,) or labels.dtype != torch.int64 or labels.device != distances.device:
            raise ValueError(
                f"rank_counts needs {name} [{count}] int64 on {distances.device}, got {list(labels.shape)} "
                f"{labels.dtype} on {labels.device}"
            )
    precision, penalty, first, matches = backend.call(
        "rank_counts", distances.device.type, distances.detach(), q_pids, g_pids, q_camids, g_camids
    )
    unordered = (first < 0).nonzero()
    if len(unordered):
        raise DataError(
            f"The distances of query {int(unordered[0])} hold NaN, so nothing can be ranked. Likely the features are "
            f"NaN: a diverged checkpoint. Evaluate an earlier one with model.weights=FILE."
        )
    return precision, penalty, first, matches


def _check_k(value: int, name: str) -> None:
    if value < 1:
        raise ConfigError(f"rerank: {name}={value} must be 1 or more. Published: k1=20, k2=6")


def _check_neighbours(neighbours: Tensor, name: str) -> None:
    if neighbours.dim() != 2 or neighbours.dtype != torch.int64:
        raise ValueError(f"{name} needs neighbours [N, K] int64, got {list(neighbours.shape)} {neighbours.dtype}")
    points, width = neighbours.shape
    if not points or not 1 <= width <= points:
        raise ValueError(f"{name}: {points} points cannot have {width} neighbours each")
    _check_range(neighbours, points, f"{name}: neighbours")


def _check_range(indices: Tensor, bound: int, name: str) -> None:
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < bound):
        raise ValueError(f"{name} hold {int(indices.min())} to {int(indices.max())}, expected 0 to {bound - 1}")


def _check_rows(indptr: Tensor, indices: Tensor, points: int, name: str, values: Tensor | None = None) -> None:
    if indptr.shape != (points + 1,) or indptr.dtype != torch.int64:
        raise ValueError(f"{name} needs indptr [{points + 1}] int64, got {list(indptr.shape)} {indptr.dtype}")
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(f"{name} needs indices [nnz] int64, got {list(indices.shape)} {indices.dtype}")
    if values is not None and (values.shape != indices.shape or values.dtype != torch.float32):
        raise ValueError(f"{name} needs values [{len(indices)}] float32, got {list(values.shape)} {values.dtype}")
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices) or bool((indptr.diff() < 0).any()):
        raise ValueError(f"{name}: indptr must rise from 0 to {len(indices)}, the number of indices")
    _check_range(indices, points, f"{name}: indices")


def _register(name: str, about: str, native_devices: tuple[str, ...] = ("cpu", "cuda")) -> None:
    plain = backend.Implementation("reference", getattr(reference_retrieval, name), ("cpu", "cuda"), about)
    fast = backend.Implementation("native", getattr(native, name), native_devices, "C++/CUDA extension", native.why_not)
    backend.register(backend.Operator(name, plain, (fast,)))


_register("k_reciprocal", "Python sets, a point at a time")
_register("reciprocal_weights", "plain torch, a row at a time")
_register("query_expansion", "plain torch, a row at a time")
_register("inverted_index", "torch's stable sort", native_devices=("cpu",))  # on CUDA that sort is the way to do it
_register("jaccard", "plain torch, a column at a time")
_register("rerank_matrix", "plain torch, a column at a time")
_register("rerank_lists", "plain torch, a column at a time")
_register("rank_counts", "plain torch, sorting the gallery")
