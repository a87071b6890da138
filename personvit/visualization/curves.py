"""A run in one picture: losses, health and the retrieval probe over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from personvit.errors import RunFolderError
from personvit.runtime.runlog import RunFolder, read_metrics

# Okabe and Ito's palette without its yellow: told apart by colour-blind readers and on a grey printer.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
_SMOOTH_FROM = 60  # points; below that the line itself is readable

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class _Line:
    """A column of the rows; `reference` lines are dashed limits (what guessing or a uniform distribution gives)."""

    key: str
    label: str
    colour: str
    reference: bool = False


@dataclass(frozen=True)
class _Panel:
    title: str
    kind: str
    lines: tuple[_Line, ...]
    unit: str = ""
    from_zero: bool = True


_PANELS = (
    _Panel(
        "Loss",
        "train",
        (
            _Line("loss", "total", _GREY),
            _Line("loss_cls", "CLS token", _BLUE),
            _Line("loss_patch", "masked patches", _ORANGE),
        ),
        unit="nats",
        from_zero=False,
    ),
    _Panel(
        "Teacher entropy",
        "health",
        (
            _Line("entropy_max", "uniform: ln K", _GREY, reference=True),
            _Line("marginal_entropy", "of the mean over images", _GREEN),
            _Line("teacher_entropy", "of an image", _BLUE),
            _Line("patch_entropy", "of a masked patch", _ORANGE),
        ),
        unit="nats",
    ),
    _Panel("Student from teacher", "health", (_Line("student_teacher_kl", "KL, other view", _BLUE),), unit="nats"),
    _Panel(
        "Finding the other view",
        "health",
        (
            _Line("view_chance", "guessing", _GREY, reference=True),
            _Line("view_top1", "top-1 within the batch", _BLUE),
        ),
    ),
    _Panel("Spread of embeddings", "health", (_Line("embedding_std", "std · √D (sphere: 1)", _BLUE),)),
    _Panel("Effective rank of embeddings", "health", (_Line("effective_rank", "exp(entropy)", _BLUE),)),
    _Panel(
        "Prototypes",
        "health",
        (
            _Line("prototype_usage", "in use, CLS token", _BLUE),
            _Line("patch_usage", "in use, patches", _ORANGE),
            _Line("prototype_top_share", "share of the favourite", _PURPLE),
        ),
    ),
    _Panel(
        "Retrieval probe",
        "probe",
        (_Line("probe_mAP", "mAP", _BLUE), _Line("probe_rank1", "rank-1", _ORANGE)),
    ),
)


def plot_run(run_folder: str | Path, out_png: str | Path) -> Path:
    """Draw the curves of a run, finished or not.

    Args:
        run_folder: holds metrics.jsonl.
        out_png: file to write; its folder is made.

    Returns:
        The file.

    Raises:
        RunFolderError: no metrics there, or the picture cannot be written.
    """
    path = RunFolder(run_folder).metrics
    if not path.is_file():
        raise RunFolderError(
            f"{path}: no such file, so {run_folder} is no run folder. Name the folder given to --out of personvit "
            f"pretrain, e.g. personvit visualize curves runs/pretrain-demo"
        )
    rows = read_metrics(path)
    if not rows:
        raise RunFolderError(
            f"{path} holds no rows yet: the run has not logged a step. Wait, or lower train.log_every."
        )
    figure = draw_run(rows, title=Path(run_folder).resolve().name)
    target = Path(out_png)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_figure(target, dpi=110)
    except OSError as error:
        raise RunFolderError(
            f"{target} cannot be written: {error.strerror or error}. Name another file: --out FILE.png"
        ) from None
    return target


def draw_run(rows: Rows, title: str) -> Figure:
    """Figure of the rows of a metrics.jsonl; panels without data say so."""
    figure = Figure(figsize=(17, 8), layout="constrained")
    figure.suptitle(title, fontsize=14)
    last = max(row["step"] for row in rows)
    for axes, panel in zip(figure.subplots(2, 4).flat, _PANELS, strict=True):
        _draw_panel(axes, panel, [row for row in rows if row.get("kind", "train") == panel.kind], last)
    return figure


def _draw_panel(axes: Axes, panel: _Panel, rows: Rows, last_step: int) -> None:
    axes.set_title(panel.title + (f" [{panel.unit}]" if panel.unit else ""), fontsize=11)
    axes.grid(alpha=0.25)
    axes.set_xlim(0, max(1, last_step))
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    drawn = [_draw_line(axes, line, rows) for line in panel.lines]
    if not any(drawn):
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=_GREY)
        axes.set_yticks([])
        return
    low, high = axes.get_ylim()
    # Head-room for the legend, so that it never lies on a curve.
    bottom = 0.0 if panel.from_zero else low
    axes.set_ylim(bottom, high + (0.1 + 0.07 * sum(drawn)) * (high - bottom))
    axes.legend(loc="upper right", fontsize=8.5, frameon=False)


def _draw_line(axes: Axes, line: _Line, rows: Rows) -> bool:
    points = [(row["step"], row[line.key]) for row in rows if row.get(line.key) is not None]
    if not points:
        return False
    steps, values = np.array(points, dtype=np.float64).T
    if line.reference:
        axes.plot(steps, values, color=line.colour, linestyle="--", linewidth=1.2, label=line.label)
    elif len(values) >= _SMOOTH_FROM:
        axes.plot(steps, values, color=line.colour, linewidth=0.6, alpha=0.3)
        axes.plot(steps, _smooth(values), color=line.colour, linewidth=1.8, label=line.label)
    else:
        axes.plot(steps, values, color=line.colour, linewidth=1.8, marker="o", markersize=3, label=line.label)
    return True


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a thirtieth of the points; the window shrinks at the ends, so that none is invented."""
    half = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, behind = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[behind] - sums[first]) / (behind - first))
