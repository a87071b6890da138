"""Rank lists: queries with the gallery images found for them, matches and mistakes told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from personvit.data.reid_sets import ReIDSet
from personvit.data.sources import read_image
from personvit.errors import DataError
from personvit.retrieval.evaluation import Ranking

# Okabe and Ito's palette; the frame's style says the same as its colour.
_MATCH, _MISTAKE, _QUERY = "#009E73", "#D55E00", "#000000"
_CELL = (0.85, 1.75)  # width, height of an image in inches


def plot_rank_lists(
    reid_set: ReIDSet, ranking: Ranking, out_png: str | Path, *, reranked: Ranking | None = None, count: int = 6
) -> Path:
    """Draw queries and the first gallery images found for them.

    The queries are spread evenly over the order of their average precision, the worst and the best among them, so the
    picture is neither a selection of successes nor one of failures. Images that the protocol leaves out (the query's
    identity in the query's camera) are left out here too.

    Args:
        reid_set: the set.
        ranking: with `top`; its AP decides which queries are drawn.
        out_png: file to write; its folder is made.
        reranked: a second line for each query, after re-ranking; with `top`.
        count: queries, at most the valid ones.

    Returns:
        The file.

    Raises:
        DataError: an image cannot be read, or the picture cannot be written.
        ValueError: a ranking without `top`.
    """
    target = Path(out_png)
    figure = draw_rank_lists(reid_set, ranking, reranked=reranked, count=count)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_figure(target, dpi=100)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror or error}. Name another file.") from None
    return target


def draw_rank_lists(reid_set: ReIDSet, ranking: Ranking, *, reranked: Ranking | None = None, count: int = 6) -> Figure:
    """As `plot_rank_lists`, not written."""
    rankings = [("", ranking)] if reranked is None else [("plain", ranking), ("re-ranked", reranked)]
    if any(one.top is None for _, one in rankings):
        raise ValueError("a ranking without its first gallery images: ask rank_features for top=10")
    queries = _spread(ranking, count)
    columns = 1 + max(one.top.shape[1] for _, one in rankings if one.top is not None)
    rows = len(queries) * len(rankings)
    figure = Figure(figsize=(1.1 + columns * _CELL[0], 0.7 + rows * _CELL[1]), layout="constrained")
    figure.suptitle(
        f"{reid_set.name}: {len(queries)} of {len(ranking.result.valid)} queries, from the lowest average precision to "
        f"the highest\nsolid green: the same person; dashed red: another one",
        fontsize=11,
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, query in enumerate(queries):
        for number, (name, one) in enumerate(rankings):
            row = place * len(rankings) + number
            _draw_row(grid[row], reid_set, one, query, name)
    for rank, axes in enumerate(grid[0]):
        axes.set_title("query" if rank == 0 else str(rank), fontsize=10)
    return figure


def _spread(ranking: Ranking, count: int) -> list[int]:
    """Numbers of valid queries, evenly over the order of their AP."""
    valid = np.flatnonzero(ranking.result.valid)
    order = valid[np.argsort(ranking.result.all_AP, kind="stable")]
    chosen = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(np.int64))
    picked: list[int] = order[chosen].tolist()
    return picked


def _draw_row(row: np.ndarray, reid_set: ReIDSet, ranking: Ranking, query: int, name: str) -> None:
    place = int(ranking.result.valid[:query].sum())
    precision = float(ranking.result.all_AP[place])
    _draw_image(row[0], reid_set.query.paths[query], _QUERY, "solid")
    row[0].text(
        -0.12,
        0.5,
        f"{name}\nAP {precision:.2f}".strip(),
        transform=row[0].transAxes,
        ha="right",
        va="center",
        fontsize=9,
    )
    assert ranking.top is not None  # checked by the caller
    for axes, found in zip(row[1:], ranking.top[query], strict=False):
        if found < 0:
            continue
        match = reid_set.gallery.pids[found] == reid_set.query.pids[query]
        _draw_image(axes, reid_set.gallery.paths[found], *((_MATCH, "solid") if match else (_MISTAKE, "dashed")))


def _draw_image(axes: Axes, path: str, colour: str, style: str) -> None:
    axes.set_axis_on()
    axes.imshow(read_image(path), aspect="auto", interpolation="bilinear")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set(color=colour, linewidth=3, linestyle=style)
