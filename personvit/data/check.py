"""Look at every image of a source: how many, how large, what shape, and which cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np

from personvit.data.sources import ImageSource
from personvit.errors import DataError

_CHUNK = 256
_BAR = 40
_HEIGHTS = (0, 32, 64, 96, 128, 192, 256, 384, 512, 1024)
_ASPECTS = (0.0, 0.2, 0.3, 0.375, 0.5, 0.6667, 0.8, 1.0, 1.5)

_Row = tuple[int, int, int, str]  # index, height, width, error ("" if readable)
_source: ImageSource  # of this worker process


@dataclass(frozen=True)
class SourceReport:
    """What a scan found.

    Attributes:
        total: number of files.
        heights: [readable] int64, pixels.
        widths: [readable] int64, pixels.
        bad: path -> message of the files that cannot be read, in the order of the source.
    """

    total: int
    heights: np.ndarray
    widths: np.ndarray
    bad: dict[str, str]

    def text(self) -> str:
        """Counts and histograms as text."""
        lines = [f"{self.total:,} files, {len(self.heights):,} readable, {len(self.bad):,} unreadable"]
        if len(self.heights):
            for label, values in (("height", self.heights), ("width", self.widths)):
                low, middle, high = (int(v) for v in np.percentile(values, (5, 50, 95)))
                lines.append(
                    f"{label:6} {values.min()} to {values.max()} pixels; 5 % {low}, median {middle}, 95 % {high}"
                )
            lines += ["", *_histogram("height, pixels", self.heights, _HEIGHTS)]
            lines += ["", *_histogram("width / height", self.widths / self.heights, _ASPECTS)]
        return "\n".join(lines)


def scan(source: ImageSource, workers: int) -> SourceReport:
    """Decode every image of a source.

    Args:
        source: images.
        workers: processes; 0 scans in this one.
    """
    starts = range(0, len(source), _CHUNK)
    if workers == 0:
        _open(source)
        return _collect(source, map(_measure, starts))
    with ProcessPoolExecutor(workers, initializer=_open, initargs=(source,)) as pool:
        return _collect(source, pool.map(_measure, starts))


def _collect(source: ImageSource, chunks: Iterator[list[_Row]]) -> SourceReport:
    rows = list(chain.from_iterable(chunks))
    sizes = np.array([row[1:3] for row in rows if not row[3]], dtype=np.int64).reshape(-1, 2)
    bad = {source.path(row[0]): row[3] for row in rows if row[3]}
    return SourceReport(len(source), sizes[:, 0], sizes[:, 1], bad)


def _open(source: ImageSource) -> None:
    global _source
    _source = source


def _measure(start: int) -> list[_Row]:
    rows: list[_Row] = []
    for index in range(start, min(start + _CHUNK, len(_source))):
        try:
            image = _source.load(index)
            rows.append((index, image.height, image.width, ""))
        except DataError as error:
            rows.append((index, 0, 0, str(error)))
    return rows


def _histogram(title: str, values: np.ndarray, edges: tuple[float, ...]) -> list[str]:
    """One line per bin [edge, next edge), the last one open, empty bins at both ends left out."""
    counts = np.histogram(values, bins=[*edges, np.inf])[0]
    used = np.flatnonzero(counts)
    lines = [title]
    for number in range(used[0], used[-1] + 1):
        end = f"to {edges[number + 1]:g}" if number + 1 < len(edges) else "and more"
        label = f"{edges[number]:g} {end}"
        share = counts[number] / len(values)
        lines.append(f"  {label:>14} {counts[number]:10,} {share:6.1%} {'#' * round(share * _BAR)}".rstrip())
    return lines
