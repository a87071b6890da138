"""The operators of retrieval in plain torch and Python: the truth that the compiled ones are tested against.

Every sum has the order that csrc/core gives it, so that the results agree in every bit.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

SUM_BLOCK = 32


def squared_distances(query: Tensor, gallery: Tensor) -> Tensor:
    """Sums of squared differences, [Q, G], in the order of csrc/core/distance.h: blocks of 32 features, then blocks."""
    total = query.new_zeros((len(query), len(gallery)))
    features = query.shape[1]
    for start in range(0, features, SUM_BLOCK):
        partial = torch.zeros_like(total)
        for d in range(start, min(start + SUM_BLOCK, features)):
            partial = _add_square(partial, query[:, d, None] - gallery[None, :, d])
        total += partial
    return total


def _add_square(total: Tensor, x: Tensor) -> Tensor:
    """A fused multiply-add, total + x * x rounded once to float32.

    The square is exact in float64. The sum is rounded to odd there (Boldo and Melquiond 2008, Emulation of FMA), which
    keeps the second rounding, to float32, from going wrong.
    """
    a, b = total.double(), x.double().square()
    near = a + b
    of_b = near - a
    error = (a - (near - of_b)) + (b - of_b)  # exact: near + error = a + b (Knuth's two-sum)
    even = near.view(torch.int64).bitwise_and(1) == 0
    other = torch.nextafter(near, torch.where(error > 0, torch.inf, -torch.inf).to(near))
    return torch.where(even & (error != 0) & near.isfinite(), other, near).float()


def knn(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest gallery rows of every query row. [Q, D], [G, D] -> distances, indices [Q, k], row_max [Q]."""
    distances, indices = query.new_empty((len(query), k)), query.new_empty((len(query), k), dtype=torch.int64)
    row_max = query.new_empty(len(query))
    rows = max(1, (1 << 22) // len(gallery))  # the intermediate results of a block take a few dozen MiB
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        block = squared_distances(query[part], gallery)
        nearest = block.sort(dim=1, stable=True)  # NaN last, ties by index
        distances[part], indices[part] = nearest.values[:, :k], nearest.indices[:, :k]
        row_max[part] = block.nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1)
    return distances, indices, row_max


def k_reciprocal(neighbours: Tensor, k1: int) -> tuple[Tensor, Tensor]:
    """Expanded k-reciprocal sets. [N, K] -> indptr [N + 1], indices [nnz]."""
    lists = neighbours.tolist()

    def reciprocal(point: int, k: int) -> list[int]:
        return [other for other in lists[point][: k + 1] if point in lists[other][: k + 1]]

    half = [reciprocal(point, round(k1 / 2)) for point in range(len(lists))]  # Python rounds a half to even
    rows = []
    for point in range(len(lists)):
        mutual = set(reciprocal(point, k1))
        expanded = set(mutual)
        for other in mutual:
            if 3 * len(mutual.intersection(half[other])) > 2 * len(half[other]):
                expanded.update(half[other])
        rows.append(sorted(expanded))
    return _indptr([len(row) for row in rows], neighbours), neighbours.new_tensor([i for row in rows for i in row])


def reciprocal_weights(features: Tensor, row_max: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """Weights of the sets, exp(-distance / row maximum), each row divided by its sum. -> [nnz]."""
    values = features.new_empty(len(indices))
    for row, (begin, end) in enumerate(pairwise(indptr.tolist())):
        distances = squared_distances(features[row : row + 1], features[indices[begin:end]])[0]
        weights = _exp(-_normalise(distances, row_max[row]).double()).float()
        total = 0.0
        for weight in weights.tolist():
            total += weight
        values[begin:end] = weights / torch.tensor(total, dtype=torch.float32)
    return values


def query_expansion(
    indptr: Tensor, indices: Tensor, values: Tensor, neighbours: Tensor, k2: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row the mean of its k2 nearest rows, added up in the order of the neighbours."""
    sizes, new_indices, new_values = [], [indices[:0]], [values[:0]]
    for sources in neighbours[:, :k2].tolist():
        total = values.new_zeros(int(indices.max()) + 1 if len(indices) else 0)
        used = torch.zeros_like(total, dtype=torch.bool)
        for source in sources:
            part = slice(int(indptr[source]), int(indptr[source + 1]))
            total[indices[part]] += values[part]
            used[indices[part]] = True
        columns = used.nonzero()[:, 0]
        sizes.append(len(columns))
        new_indices.append(columns)
        new_values.append(total[columns] / len(sources))
    return _indptr(sizes, indptr), torch.cat(new_indices), torch.cat(new_values)


def jaccard(
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    weights: Tensor,
    gallery_rows: int,
) -> Tensor:
    """1 - t / (2 - t), with t the sum of the minima of two rows, columns ascending. -> [Q, G]."""
    overlap = values.new_zeros((len(indptr) - 1, gallery_rows))
    for query, (begin, end) in enumerate(pairwise(indptr.tolist())):
        for column, value in zip(indices[begin:end].tolist(), values[begin:end], strict=True):
            part = slice(int(offsets[column]), int(offsets[column + 1]))
            overlap[query, rows[part].long()] += torch.minimum(value, weights[part])
    t = overlap.clamp(max=1.0)
    return 1.0 - t / (2.0 - t)


def inverted_index(indptr: Tensor, indices: Tensor, values: Tensor, num_query: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of the gallery's rows ordered by column. -> offsets [N + 1], rows int32 and weights [entries]."""
    start = int(indptr[num_query])
    rows = torch.repeat_interleave(indptr[num_query:].diff()).to(torch.int32)
    columns = indices[start:].sort(stable=True)
    offsets = torch.searchsorted(columns.values, torch.arange(len(indptr), device=indptr.device))
    return offsets, rows[columns.indices], values[start:][columns.indices]


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
    """Jaccard distance and normalised original distance, mixed. -> [Q, G]."""
    original = _normalise(squared_distances(query, gallery), row_max[:, None])
    distances = jaccard(indptr, indices, values, offsets, rows, weights, len(gallery))
    return distances * (1.0 - lambda_value) + original * lambda_value


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
    """The `top` nearest gallery rows of each query by the mixed distance. -> distances, indices [Q, top]."""
    distances = rerank_matrix(query, gallery, row_max, indptr, indices, values, offsets, rows, weights, lambda_value)
    nearest = distances.sort(dim=1, stable=True)
    return nearest.values[:, :top].contiguous(), nearest.indices[:, :top].contiguous()


def rank_counts(
    distances: Tensor, q_pids: Tensor, g_pids: Tensor, q_camids: Tensor, g_camids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AP, INP, first match and number of matches of every query, by sorting the gallery. -> four of [Q]."""
    precision, penalty = distances.new_zeros((2, len(distances)), dtype=torch.float64)
    first, matches = q_pids.new_zeros((2, len(distances)))
    for query, row in enumerate(distances):
        same = g_pids == q_pids[query]
        order = row.sort(stable=True).indices
        order = order[~(same & (g_camids == q_camids[query]))[order]]
        ranks = (same[order].nonzero()[:, 0] + 1).tolist()
        matches[query] = len(ranks)
        if row.isnan().any():
            first[query] = -1
        elif ranks:
            total = 0.0
            for hits, rank in enumerate(ranks, start=1):
                total += hits / rank
            precision[query] = total / len(ranks)
            penalty[query] = len(ranks) / ranks[-1]
            first[query] = ranks[0]
    return precision, penalty, first, matches


def _exp(x: Tensor) -> Tensor:
    """Element by element what csrc/core/portable_exp.h does."""
    r = x / 16.0
    total = torch.ones_like(x)
    for n in range(14, 0, -1):
        total = 1.0 + total * r / n
    for _ in range(4):
        total = total * total
    return total


def _normalise(distances: Tensor, largest: Tensor) -> Tensor:
    return torch.where(largest > 0, distances / largest, 0.0)


def _indptr(sizes: list[int], like: Tensor) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(sizes, dtype=torch.int64).cumsum(0), (1, 0)).to(like.device)
