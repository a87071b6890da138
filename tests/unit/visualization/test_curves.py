from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from personvit import visualize
from personvit.errors import RunFolderError
from personvit.runtime.runlog import read_metrics
from personvit.visualization.curves import _smooth, draw_run, plot_run


def write_run(folder, steps=400, kinds=("train", "health", "probe")):
    folder.mkdir(exist_ok=True)
    rows = []
    for step in range(5, steps + 1, 5):
        loss = 8 - step / steps
        rows.append({"step": step, "kind": "train", "loss": loss, "loss_cls": loss - 2, "loss_patch": 2.0})
        if step % 50 == 0:
            health = {"teacher_entropy": 4.0, "marginal_entropy": 5.0, "entropy_max": 6.0, "student_teacher_kl": 0.4}
            health |= {"embedding_std": 0.5, "effective_rank": 30.0, "prototype_usage": 0.4, "patch_usage": 0.3}
            rows.append({"step": step, "kind": "health", **health, "view_top1": 0.5, "view_chance": 1 / 64})
            rows.append({"step": step, "kind": "probe", "probe_mAP": 0.1, "probe_rank1": None})
    text = "".join(json.dumps(row) + "\n" for row in rows if row["kind"] in kinds)
    (folder / "metrics.jsonl").write_text(text + '{"step": 405, "kind": "tr')  # cut off by a crash
    return folder


def test_writes_a_readable_png(tmp_path):
    written = plot_run(write_run(tmp_path / "run"), tmp_path / "figures" / "curves.png")
    with Image.open(written) as image:
        assert image.format == "PNG"
        assert image.width > 1500
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_every_panel_shows_its_data_and_no_text_leaves_the_figure_or_overlaps(tmp_path):
    figure = draw_run(read_metrics(write_run(tmp_path / "run") / "metrics.jsonl"), "run")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert len(figure.axes) == 8
    lines = {axes.get_title(): len(axes.get_lines()) for axes in figure.axes}
    assert lines["Retrieval probe"] == 1  # rank-1 has no value
    assert lines["Teacher entropy [nats]"] == 3  # no patch statistics
    assert lines["Loss [nats]"] == 6  # raw and smoothed
    boxes = []
    for axes in figure.axes:
        texts = [axes.title, axes.xaxis.label]  # and the ticks that are drawn: matplotlib also keeps some beyond
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            texts += [label for place, label in ticks if low <= place <= high]
        boxes += [text.get_window_extent(renderer) for text in texts]
        legend = axes.get_legend().get_window_extent(renderer)
        for line in axes.get_lines():
            assert not any(legend.contains(*point) for point in axes.transData.transform(line.get_xydata()))
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not any(a.shrunk(0.9, 0.9).overlaps(b.shrunk(0.9, 0.9)) for a, b in pairs)


def test_panels_without_data_say_so(tmp_path):
    figure = draw_run(read_metrics(write_run(tmp_path / "run", kinds=("train",)) / "metrics.jsonl"), "run")
    texts = {axes.get_title(): [text.get_text() for text in axes.texts] for axes in figure.axes}
    assert texts["Retrieval probe"] == ["no data"]
    assert texts["Loss [nats]"] == []


def test_smoothing_keeps_constants_and_averages_noise():
    np.testing.assert_allclose(_smooth(np.full(300, 2.5)), 2.5)
    noise = np.random.default_rng(0).standard_normal(3000)
    smooth = _smooth(noise)
    assert len(smooth) == len(noise)
    assert smooth.std() < 0.2
    assert smooth[0] == pytest.approx(noise[:51].mean())


def test_command_writes_into_the_run_folder(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert visualize.main(["curves", str(run)]) == 0
    assert (run / "curves.png").is_file()
    assert capsys.readouterr().out.strip() == str(run / "curves.png")
    assert visualize.main(["curves", str(run), "--out", str(tmp_path / "other.png")]) == 0
    assert (tmp_path / "other.png").is_file()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="no such file"):
        plot_run(tmp_path, tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="no rows yet"):
        plot_run(tmp_path, tmp_path / "x.png")
    with pytest.raises(RunFolderError, match="cannot be written"):
        plot_run(write_run(tmp_path / "run"), tmp_path / "metrics.jsonl" / "x.png")
