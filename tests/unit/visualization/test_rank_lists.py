from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from personvit.data.reid_sets import ReIDSet, ReIDSplit
from personvit.errors import DataError
from personvit.retrieval.evaluation import rank_features
from personvit.retrieval.features import FeatureSet
from personvit.visualization.rank_lists import draw_rank_lists, plot_rank_lists


def make_set(folder):
    """Three queries in camera 0, their images in camera 1, features on a circle; the last query finds its own last."""
    folder.mkdir(exist_ok=True)
    angles = {"query": [0.0, 1.0, 2.0], "gallery": [0.1, 1.1, 3.1, 0.2]}
    pids = {"query": [1, 2, 3], "gallery": [1, 2, 3, 9]}
    parts = {}
    for camera, (name, values) in enumerate(angles.items()):
        paths = []
        for number, pid in enumerate(pids[name]):
            paths.append(str(folder / f"{name}{number}.png"))
            Image.new("RGB", (16, 32), (60 * pid % 256, 80, 20 * number)).save(paths[-1])
        labels = np.array(pids[name]), np.full(len(paths), camera)
        features = torch.tensor([[np.cos(a), np.sin(a)] for a in values], dtype=torch.float32)
        parts[name] = ReIDSplit(paths, *labels), FeatureSet(features, *labels, paths)
    nothing = ReIDSplit([], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    reid_set = ReIDSet("market1501", nothing, parts["query"][0], parts["gallery"][0], str(folder))
    return reid_set, rank_features(parts["query"][1], parts["gallery"][1], top=3)


def rows_of(figure, columns):
    grid = figure.get_axes()
    return [grid[start : start + columns] for start in range(0, len(grid), columns)]


def test_frames_tell_matches_from_mistakes_worst_query_first(tmp_path):
    reid_set, ranking = make_set(tmp_path / "set")
    figure = draw_rank_lists(reid_set, ranking, count=3)
    rows = rows_of(figure, 4)
    assert [axes.get_title() for axes in rows[0]] == ["query", "1", "2", "3"]
    for row, query in zip(rows, np.argsort(ranking.result.all_AP, kind="stable"), strict=True):
        for axes, found in zip(row[1:], ranking.top[query], strict=True):
            match = reid_set.gallery.pids[found] == reid_set.query.pids[query]
            spine = axes.spines["left"]
            assert (to_hex(spine.get_edgecolor()), spine.get_linestyle()) == (
                ("#009e73", "solid") if match else ("#d55e00", "dashed")
            )
    precisions = [float(row[0].texts[0].get_text().removeprefix("AP ")) for row in rows]
    assert precisions == sorted(precisions)
    assert precisions[0] < precisions[-1] == 1


def test_the_worst_and_the_best_query_are_always_drawn(tmp_path):
    reid_set, ranking = make_set(tmp_path / "set")
    rows = rows_of(draw_rank_lists(reid_set, ranking, count=2), 4)
    shown = [row[0].texts[0].get_text() for row in rows]
    assert shown == [f"AP {value:.2f}" for value in (ranking.result.all_AP.min(), ranking.result.all_AP.max())]


def test_re_ranked_lists_stand_below_the_plain_ones(tmp_path):
    reid_set, ranking = make_set(tmp_path / "set")
    written = plot_rank_lists(reid_set, ranking, tmp_path / "new" / "ranks.png", reranked=ranking, count=2)
    with Image.open(written) as image:
        assert image.height > 4 * 150
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    rows = rows_of(draw_rank_lists(reid_set, ranking, reranked=ranking, count=2), 4)
    assert [row[0].texts[0].get_text().splitlines()[0] for row in rows] == ["plain", "re-ranked"] * 2


def test_what_cannot_be_drawn_is_named(tmp_path):
    reid_set, ranking = make_set(tmp_path / "set")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        plot_rank_lists(reid_set, ranking, tmp_path / "file" / "ranks.png")
    with pytest.raises(ValueError, match="top=10"):
        draw_rank_lists(reid_set, type(ranking)(ranking.result, None))
