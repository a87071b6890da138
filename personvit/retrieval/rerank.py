"""k-reciprocal re-ranking (Zhong et al. 2017) with the values of the published code, in bounded memory.

The order of operations is that of hustvl/PersonViT, utils/reranking.py, in float32 throughout; the published code
rounds the encoding to float16. The encoding is sparse here: nothing of size N x N exists, N = Q + G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor
from tqdm import tqdm

from personvit import ops
from personvit.config import RERANK_PRESETS
from personvit.errors import ConfigError
from personvit.retrieval.checks import Features, check_features
from personvit.retrieval.memory import available_memory, format_bytes

_BLOCK = 1024  # queries whose re-ranked distances are held at once: 1024 x 82,161 of MSMT17 is 321 MiB
_PROGRESS_FROM = 8192  # images; shorter work needs no progress bar
_SUGGESTED_TOP = 100


class RankedLists(NamedTuple):
    """The first gallery images of every query.

    Attributes:
        distances: [Q, R] float32, ascending; equal ones by the lower gallery index.
        indices: [Q, R] int64 into the gallery.
    """

    distances: Tensor
    indices: Tensor


@dataclass(frozen=True)
class RerankParameters:
    """Parameters of re-ranking.

    Attributes:
        k1: size of the neighbourhoods, 1 or more; cut to what there is.
        k2: rows averaged in the local query expansion, 1 (none) or more.
        lambda_value: share of the original distance in the result, 0 to 1.

    Raises:
        ConfigError: a value out of range.
    """

    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3

    def __post_init__(self) -> None:
        for name, value in (("k1", self.k1), ("k2", self.k2)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"Re-ranking with {name}={value}: expected a whole number, 1 or more. "
                    f"Set it with rerank.{name}=VALUE; the published values are {_presets()}."
                )
        if not 0 <= self.lambda_value <= 1:
            raise ConfigError(
                f"Re-ranking with lambda_value={self.lambda_value}: expected a share from 0 (Jaccard distance only) "
                f"to 1 (original distance only). Set it with rerank.lambda_value=VALUE, e.g. 0.3."
            )

    @property
    def preset(self) -> str | None:
        """Name of the published setting that these values are; None for any other."""
        values = (self.k1, self.k2, self.lambda_value)
        return next((name for name, preset in RERANK_PRESETS.items() if preset == values), None)

    def __str__(self) -> str:
        name = f" ({self.preset})" if self.preset else ""
        return f"k1={self.k1} k2={self.k2} lambda={self.lambda_value:g}{name}"


@overload
def rerank(
    query: Features,
    gallery: Features,
    k1: int = ...,
    k2: int = ...,
    lambda_value: float = ...,
    *,
    top: None = ...,
    progress: bool = ...,
) -> Tensor: ...


@overload
def rerank(
    query: Features,
    gallery: Features,
    k1: int = ...,
    k2: int = ...,
    lambda_value: float = ...,
    *,
    top: int,
    progress: bool = ...,
) -> RankedLists: ...


def rerank(
    query: Features,
    gallery: Features,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    top: int | None = None,
    progress: bool = False,
) -> Tensor | RankedLists:
    """Distances of queries to the gallery after k-reciprocal re-ranking.

    Args:
        query: [Q, D] features, rows of length 1 (any length works, but nothing published uses one).
        gallery: [G, D] features of the same model, on the same device.
        k1: size of the neighbourhoods; may exceed the number of images.
        k2: rows averaged in the local query expansion; 1: none.
        lambda_value: share of the original distance, 0 to 1.
        top: give only the best so many of each query (at most G) instead of the matrix.
        progress: show a bar if there is a terminal and the sets are large.

    Returns:
        [Q, G] float32, smaller is closer; or the `RankedLists` of the best `top`.

    Raises:
        ConfigError: a parameter out of range, or not enough memory for the matrix; the message tells how much.
        DataError: features that are empty, not finite, zero, or of two widths.
    """
    parameters = RerankParameters(k1, k2, lambda_value)
    query, gallery = check_features(query, gallery)
    if top is not None:
        if top < 1:
            raise ConfigError(f"top={top}: expected 1 or more gallery images per query, or None for the whole matrix.")
        with _stage_bar(len(query) + len(gallery), progress) as tell:
            distances, indices = ops.rerank(query, gallery, k1, k2, lambda_value, top, tell)
        return RankedLists(distances, indices)
    _check_memory(query, gallery, parameters)
    result = query.new_empty((len(query), len(gallery)))
    blocks = reranked_blocks(query, gallery, parameters, progress=progress)
    for rows, block in zip(torch.split(result, _BLOCK), blocks, strict=True):
        rows.copy_(block)  # in place: joining blocks would take the memory twice
    return result


def reranked_blocks(
    query: Tensor, gallery: Tensor, parameters: RerankParameters, *, progress: bool = False
) -> Iterator[Tensor]:
    """The matrix of `rerank` as consecutive blocks of queries, [b, G] each with b = 1024 but for the last.

    For what needs whole rows, but not all of them at once. Arguments as in `rerank`, checked.
    """
    with _stage_bar(len(query) + len(gallery), progress) as tell:
        encoding = ops.encode(query, gallery, parameters.k1, parameters.k2, tell)
        starts = range(0, len(query), _BLOCK)
        tell("distances", 0, len(starts))
        for done, start in enumerate(starts, start=1):
            end = min(start + _BLOCK, len(query))
            yield ops.rerank_block(query, gallery, encoding, parameters.lambda_value, start, end)
            tell("distances", done, len(starts))


def first_ranks(distances: Tensor, count: int) -> RankedLists:
    """The `count` smallest of each row, ordered by (distance, index). [Q, G] -> two of [Q, count]."""
    limit = distances.kthvalue(count, dim=1, keepdim=True).values  # [Q, 1]
    indices = torch.empty((len(distances), count), dtype=torch.int64, device=distances.device)
    for row, (values, largest) in enumerate(zip(distances, limit, strict=True)):
        candidates = torch.nonzero(values <= largest).flatten()  # in the order of the index, more than count if tied
        indices[row] = candidates[values[candidates].sort(stable=True).indices[:count]]
    return RankedLists(distances.gather(1, indices), indices)


@contextmanager
def _stage_bar(images: int, progress: bool) -> Iterator[Callable[[str, int, int], None]]:
    """What `progress` of `ops.rerank` takes: a bar of the stage that runs."""
    hide_bar = not progress or images < _PROGRESS_FROM or None  # None: hidden unless on a terminal
    with tqdm(unit="step", disable=hide_bar, leave=False) as bar:

        def tell(stage: str, done: int, total: int) -> None:
            if done == 0:
                bar.set_description_str(f"re-rank {images} images: {stage}", refresh=False)
                bar.reset(total)
            bar.total = total
            bar.update(done - bar.n)

        yield tell


def _check_memory(query: Tensor, gallery: Tensor, parameters: RerankParameters) -> None:
    queries, width = query.shape
    images = len(gallery)
    matrix = queries * images * 4
    neighbours = (queries + images) * (width * 4 + max(parameters.k1 + 1, parameters.k2) * 12)
    needed = matrix + min(queries, _BLOCK) * images * 4 + neighbours
    free = available_memory(query.device)
    if free is not None and needed > free:
        lists = queries * min(images, _SUGGESTED_TOP) * 12
        raise ConfigError(
            f"The re-ranked matrix of {queries:,} queries x {images:,} gallery images takes {format_bytes(matrix)}, "
            f"with the work on it {format_bytes(needed)}, but only {format_bytes(free)} are free on {query.device}. "
            f"Ask for the best of each query instead: rerank(..., top={_SUGGESTED_TOP}) takes {format_bytes(lists)}."
        )


def _presets() -> str:
    return ", ".join(f"{name} {k1}/{k2}/{lambda_value:g}" for name, (k1, k2, lambda_value) in RERANK_PRESETS.items())
