"""k-reciprocal re-ranking in dense numpy: the algorithm as it was published, to be read and to be compared with.

Zhong et al. 2017, "Re-ranking Person Re-identification with k-reciprocal Encoding"; the order of operations and the
rounding are those of hustvl/PersonViT, utils/reranking.py. Every matrix is dense, N x N with N = Q + G, as there: at
the size of Market-1501 one of them takes 1.4 GiB.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

_ROWS = 1024  # rows sorted at once; only the first few ranks of each are kept


def normalised_distances(query: FloatArray, gallery: FloatArray) -> FloatArray:
    """Squared distances of all images to all, each row divided by its largest. [Q, D], [G, D] -> [N, N] float32."""
    features = np.concatenate([query, gallery]).astype(np.float32)
    squares = (features**2).sum(axis=1)
    distances = squares[:, None] + squares[None, :]
    distances -= 2 * (features @ features.T)
    return distances / distances.max(axis=1, keepdims=True)


def nearest(distances: FloatArray, count: int, kind: str = "stable") -> IntArray:
    """The first `count` ranks of each row, by a sort of the whole row. [N, N] -> [N, min(count, N)]."""
    blocks = [
        np.argsort(distances[start : start + _ROWS], axis=1, kind=kind)[:, :count]  # type: ignore[call-overload]
        for start in range(0, len(distances), _ROWS)
    ]
    return np.concatenate(blocks)


def reciprocal(rank: IntArray, image: int, k: int) -> IntArray:
    """R(i, k): those of the k + 1 nearest of an image that have the image among their own k + 1 nearest."""
    forward = rank[image, : k + 1]
    backward = rank[forward, : k + 1]
    return forward[(backward == image).any(axis=1)]


def expanded(rank: IntArray, image: int, k1: int) -> IntArray:
    """R*(i, k1), sorted: R(i, k1) and each R(j, k1 / 2) of its members j of which more than 2/3 lie in it."""
    members = reciprocal(rank, image, k1)
    parts = [members]
    half = int(np.around(k1 / 2))  # rounds half to even
    for member in members:
        candidate = reciprocal(rank, member, half)
        if 3 * len(np.intersect1d(candidate, members)) > 2 * len(candidate):
            parts.append(candidate)
    return np.unique(np.concatenate(parts))


def encode(distances: FloatArray, rank: IntArray, k1: int, dtype: npt.DTypeLike) -> FloatArray:
    """Encoding V [N, N]: in row i the weights exp(-distance) of R*(i), which sum to 1."""
    encoding = np.zeros(distances.shape, dtype)
    for image in range(len(distances)):
        members = expanded(rank, image, k1)
        weights = np.exp(-distances[image, members])
        encoding[image, members] = weights / np.sum(weights)
    return encoding


def expand_queries(encoding: FloatArray, rank: IntArray, k2: int) -> FloatArray:
    """Local query expansion: each row becomes the mean of the rows of its k2 nearest, itself among them. [N, N]."""
    mixed = np.zeros_like(encoding)
    for image in range(len(encoding)):
        mixed[image] = encoding[rank[image, :k2]].mean(axis=0)  # numpy sums float16 in float32
    return mixed


def jaccard(encoding: FloatArray, num_query: int) -> FloatArray:
    """Jaccard distances of the queries to all, [Q, N]. Rows sum to 1, so that union = 2 - intersection."""
    result = np.zeros((num_query, len(encoding)), encoding.dtype)
    columns = [np.flatnonzero(encoding[:, column]) for column in range(len(encoding))]  # who holds which neighbour
    for image in range(num_query):
        shared = np.zeros(len(encoding), encoding.dtype)
        for column in np.flatnonzero(encoding[image]):
            others = columns[column]
            shared[others] += np.minimum(encoding[image, column], encoding[others, column])
        result[image] = 1 - shared / (2 - shared)
    return result


def rerank_numpy(
    query: FloatArray,
    gallery: FloatArray,
    k1: int,
    k2: int,
    lambda_value: float,
    *,
    dtype: npt.DTypeLike = np.float32,
    distances: FloatArray | None = None,
    kind: str = "stable",
) -> npt.NDArray[np.float32]:
    """Re-ranked distances of the queries to the gallery.

    Args:
        query: [Q, D] float32.
        gallery: [G, D] float32.
        k1: size of the neighbourhoods.
        k2: rows averaged in the local query expansion; 1: none.
        lambda_value: share of the original distance.
        dtype: float32, or float16 to round where the published code rounds.
        distances: [N, N] float32, in place of `normalised_distances`.
        kind: sort of numpy; `stable` breaks ties by index.

    Returns:
        [Q, G] float32.
    """
    if distances is None:
        distances = normalised_distances(query, gallery)
    num_query = len(query)
    rank = nearest(distances, max(k1 + 1, k2), kind)
    encoding = encode(distances, rank, k1, dtype)
    if k2 != 1:
        encoding = expand_queries(encoding, rank, k2)
    mixed = jaccard(encoding, num_query) * (1 - lambda_value) + distances[:num_query] * lambda_value
    return mixed[:, num_query:].astype(np.float32)
