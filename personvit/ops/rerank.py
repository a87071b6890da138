"""k-reciprocal re-ranking: the stages of `personvit.ops.retrieval` one after the other, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from personvit.errors import ConfigError, DataError
from personvit.ops import backend
from personvit.ops.neighbours import check_features, nearest
from personvit.ops.retrieval import k_reciprocal, query_expansion, reciprocal_weights

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the steps done and the steps in all: first with 0 steps, then after each."""

_BLOCK = 2048  # queries at a time, where they are not done in one go


class Encoding(NamedTuple):
    """What re-ranking knows of N = Q + G points, queries first; nothing in it is larger than N times a row's entries.

    Attributes:
        row_max: [N] float32, largest squared distance of each point to any.
        indptr: [N + 1] int64; row i of the encoding holds the entries indptr[i] to indptr[i + 1].
        indices: [nnz] int64 columns, ascending in each row.
        values: [nnz] float32, each row adds up to 1.
        offsets: [N + 1] int64; column c of the gallery's rows holds the entries offsets[c] to offsets[c + 1].
        rows: [entries of the gallery] int32, their gallery row.
        weights: [entries of the gallery] float32.
    """

    row_max: Tensor
    indptr: Tensor
    indices: Tensor
    values: Tensor
    offsets: Tensor
    rows: Tensor
    weights: Tensor


def encode(query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, progress: Progress | None = None) -> Encoding:
    """Everything of re-ranking that comes before the distances of single queries.

    Args:
        query: [Q, D] float32 features, as a rule L2-normalised.
        gallery: [G, D] float32, on the device of query.
        k1: length of the neighbour lists; more than N is fine and takes all of them.
        k2: rows of the query expansion; 1 skips it.
        progress: told about the stages.

    Raises:
        ValueError: shapes, types or devices that do not fit.
        ConfigError: k1 or k2 below 1.
        DataError: no rows, or rows that are not finite, zero, or so large that distances overflow.
    """
    check_features(query, gallery, "rerank")
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise ConfigError(f"rerank: {name}={value} must be 1 or more. Published: k1=20, k2=6")
    _check_points(query, "query")
    _check_points(gallery, "gallery")
    tell = progress or _silent
    points = torch.cat([query.detach(), gallery.detach()])  # [N, D]
    width = min(max(k1 + 1, k2), len(points))
    tell("neighbours", 0, 1)
    steps = None if progress is None else lambda done, total: tell("neighbours", done, total)
    _, neighbours, row_max = nearest(points, points, width, steps)
    if not row_max.isfinite().all():
        raise DataError(
            "rerank: squared distances overflow float32. Normalise the features: torch.nn.functional.normalize"
        )
    tell("encoding", 0, 4)
    indptr, indices = k_reciprocal(neighbours[:, : k1 + 1].contiguous(), k1)
    tell("encoding", 1, 4)
    values = reciprocal_weights(points, row_max, indptr, indices)
    del points
    tell("encoding", 2, 4)
    indptr, indices, values = query_expansion(indptr, indices, values, neighbours, k2)
    tell("encoding", 3, 4)
    index = backend.call("inverted_index", values.device.type, indptr, indices, values, len(query))
    tell("encoding", 4, 4)
    return Encoding(row_max, indptr, indices, values, *index)


def rerank_block(
    query: Tensor, gallery: Tensor, encoding: Encoding, lambda_value: float, begin: int, end: int
) -> Tensor:
    """Re-ranked distances of the queries begin to end; they do not depend on the block that a query is in.

    Args:
        query: [Q, D] float32, all queries that were encoded.
        gallery: [G, D] float32, likewise.
        encoding: of `encode`.
        lambda_value: share of the original distance, 0 to 1.
        begin: first query of the block.
        end: one after the last.

    Returns:
        [end - begin, G] float32.

    Raises:
        ValueError: features that are not those of the encoding, or a block outside of the queries.
        ConfigError: lambda_value outside of [0, 1].
    """
    arguments = _block_arguments(query, gallery, encoding, lambda_value, begin, end)
    distances: Tensor = backend.call("rerank_matrix", query.device.type, *arguments)
    return distances


def rerank_block_lists(
    query: Tensor, gallery: Tensor, encoding: Encoding, lambda_value: float, begin: int, end: int, top: int
) -> tuple[Tensor, Tensor]:
    """The best of each row of `rerank_block`, without holding the block.

    Args:
        query: [Q, D] float32, all queries that were encoded.
        gallery: [G, D] float32, likewise.
        encoding: of `encode`.
        lambda_value: share of the original distance, 0 to 1.
        begin: first query of the block.
        end: one after the last.
        top: how many gallery rows of each query; more than G returns all of them.

    Returns:
        distances [end - begin, min(top, G)] float32, ascending, ties by the lower index, and indices likewise, int64.

    Raises:
        ValueError: features that are not those of the encoding, or a block outside of the queries.
        ConfigError: lambda_value outside of [0, 1], or top below 1.
    """
    if top < 1:
        raise ConfigError(f"rerank: top={top} must be 1 or more. Example: top=100")
    arguments = _block_arguments(query, gallery, encoding, lambda_value, begin, end)
    distances, indices = backend.call("rerank_lists", query.device.type, *arguments, min(top, len(gallery)))
    return distances, indices


def rerank(
    query: Tensor,
    gallery: Tensor,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    top: int | None = None,
    progress: Progress | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Re-ranked distances: (1 - lambda) Jaccard + lambda (squared distance / its largest value of the query).

    Nothing of size N x N is held, and nothing of size Q x G either if only the best `top` are asked for.

    Args:
        query: [Q, D] float32 features, as a rule L2-normalised.
        gallery: [G, D] float32, on the device of query.
        k1: length of the neighbour lists; more than N is fine and takes all of them.
        k2: rows of the query expansion; 1 skips it.
        lambda_value: share of the original distance, 0 to 1.
        top: how many gallery rows to return for each query; more than G returns all of them. None: the whole matrix.
        progress: told about the stages.

    Returns:
        [Q, G] float32; or with `top` distances [Q, min(top, G)] float32, ascending, ties by the lower index, and
        indices [Q, min(top, G)] int64 into the gallery.

    Raises:
        ValueError: shapes, types or devices that do not fit.
        ConfigError: k1, k2, lambda_value or top out of range.
        DataError: no rows, or rows that are not finite, zero, or so large that distances overflow.
    """
    _check_lambda(lambda_value)
    if top is not None and top < 1:
        raise ConfigError(f"rerank: top={top} must be 1 or more. Example: top=100")
    encoding = encode(query, gallery, k1, k2, progress)
    if top is None and progress is None:
        return rerank_block(query, gallery, encoding, lambda_value, 0, len(query))
    tell = progress or _silent
    starts = range(0, len(query), _BLOCK)
    tell("distances", 0, len(starts))
    width = len(gallery) if top is None else min(top, len(gallery))
    distances = query.new_empty((len(query), width))
    indices = query.new_empty((0 if top is None else len(query), width), dtype=torch.int64)
    for done, begin in enumerate(starts, start=1):
        rows = slice(begin, min(begin + starts.step, len(query)))
        if top is None:
            distances[rows] = rerank_block(query, gallery, encoding, lambda_value, rows.start, rows.stop)
        else:
            best = rerank_block_lists(query, gallery, encoding, lambda_value, rows.start, rows.stop, top)
            distances[rows], indices[rows] = best
        tell("distances", done, len(starts))
    return distances if top is None else (distances, indices)


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _block_arguments(
    query: Tensor, gallery: Tensor, encoding: Encoding, lambda_value: float, begin: int, end: int
) -> tuple[Tensor | float, ...]:
    check_features(query, gallery, "rerank")
    _check_lambda(lambda_value)
    row_max, indptr, *rest = encoding
    if len(row_max) != len(query) + len(gallery):
        raise ValueError(
            f"rerank: {len(query)} queries and a gallery of {len(gallery)}, but {len(row_max)} points were encoded"
        )
    if not 0 <= begin <= end <= len(query):
        raise ValueError(f"rerank: queries {begin} to {end} of {len(query)}")
    part = slice(begin, end)
    return (query[part].detach(), gallery.detach(), row_max[part], indptr[begin : end + 1], *rest, float(lambda_value))


def _check_lambda(lambda_value: float) -> None:
    if not 0.0 <= lambda_value <= 1.0:
        raise ConfigError(
            f"rerank: lambda={lambda_value} is not in [0, 1]: it is the share of the original distance. "
            f"Published: lambda=0.3"
        )


def _check_points(features: Tensor, name: str) -> None:
    if not len(features):
        raise DataError(f"rerank: the {name} has no rows. Check that its folder holds images: data.root=FOLDER")
    if not features.isfinite().all():
        row = int((~features.isfinite()).any(dim=1).nonzero()[0])
        raise DataError(
            f"rerank: row {row} of the {name} features holds NaN or infinity. Likely the checkpoint diverged: evaluate "
            f"an earlier one with model.weights=FILE"
        )
    empty = (features == 0).all(dim=1).nonzero()
    if len(empty):
        raise DataError(
            f"rerank: row {int(empty[0])} of the {name} features is zero ({len(empty)} such rows), so it has no "
            f"direction. Likely the features were never computed: extract them again"
        )
