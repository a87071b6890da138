"""Look at every image of a source: how many, how large, what shape, which are twice there, odd or unreadable."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from personvit.data.parallel import ordered_map
from personvit.data.quality import MEANINGS, inspect_image
from personvit.data.sources import ImageSource
from personvit.errors import DataError

_CHUNK = 64
_BAR = 40
_SHOWN_GROUPS = 5
_SHOWN_COPIES = 4
_HEIGHTS = (0, 32, 64, 96, 128, 192, 256, 384, 512, 1024)
_ASPECTS = (0.0, 0.2, 0.3, 0.375, 0.5, 0.6667, 0.8, 1.0, 1.5)
_ROW = np.dtype([("digest", "V16"), ("height", "<i4"), ("width", "<i4"), ("oddities", "<i4")])

_source: ImageSource  # of this worker process


@dataclass(frozen=True)
class SourceReport:
    """What a scan found.

    Attributes:
        total: number of files.
        heights: [readable] int64, pixels.
        widths: [readable] int64, pixels.
        bad: path -> message of the files that cannot be read, in the order of the source.
        oddities: meaning -> (number of files, path of the first), the frequent ones first.
        copies: number of readable files whose bytes are those of an earlier one.
        copy_groups: number of groups of byte-identical files.
        copied: the paths of the first groups.
    """

    total: int
    heights: np.ndarray
    widths: np.ndarray
    bad: dict[str, str]
    oddities: dict[str, tuple[int, str]] = field(default_factory=dict)
    copies: int = 0
    copy_groups: int = 0
    copied: list[list[str]] = field(default_factory=list)

    def text(self) -> str:
        """Counts, histograms, oddities and duplicates as text."""
        unreadable = self.total - len(self.heights)
        lines = [f"{self.total:,} files, {len(self.heights):,} readable, {unreadable:,} unreadable"]
        if len(self.heights):
            for label, values in (("height", self.heights), ("width", self.widths)):
                low, middle, high = (int(v) for v in np.percentile(values, (5, 50, 95)))
                lines.append(
                    f"{label:6} {values.min()} to {values.max()} pixels; 5 % {low}, median {middle}, 95 % {high}"
                )
            lines += ["", *_histogram("height, pixels", self.heights, _HEIGHTS)]
            lines += ["", *_histogram("width / height", self.widths / self.heights, _ASPECTS)]
        if self.oddities:
            lines += ["", "readable, but worth a look (count, what, first):"]
            lines += [f"  {count:9,}  {what}: {path}" for what, (count, path) in self.oddities.items()]
        if self.copies:
            lines += ["", f"{self.copies:,} byte-identical copies, in {self.copy_groups:,} groups such as:"]
            lines += ["  " + " = ".join(group) for group in self.copied]
        return "\n".join(lines)


def scan(source: ImageSource, workers: int) -> SourceReport:
    """Decode every image of a source, with a progress bar on a terminal.

    Args:
        source: images.
        workers: processes; 0 scans in this one.

    Raises:
        DataError: a worker process died.
    """
    rows = np.zeros(len(source), dtype=_ROW)
    errors: dict[int, str] = {}
    starts = range(0, len(source), _CHUNK)
    with tqdm(total=len(source), desc="checking", unit=" images", disable=None) as bar:
        for start, (part, bad) in zip(starts, ordered_map(_measure, starts, workers, _open, (source,)), strict=True):
            rows[start : start + len(part)] = part
            errors |= bad
            bar.update(len(part))
    readable = np.flatnonzero(rows["height"])
    copies, groups, copied = _copies(source, rows["digest"][readable], readable)
    return SourceReport(
        total=len(source),
        heights=rows["height"][readable].astype(np.int64),
        widths=rows["width"][readable].astype(np.int64),
        bad={source.path(index): message for index, message in errors.items()},
        oddities=_oddities(source, rows["oddities"]),
        copies=copies,
        copy_groups=groups,
        copied=copied,
    )


def _open(source: ImageSource) -> None:
    global _source
    _source = source


def _measure(start: int) -> tuple[np.ndarray, dict[int, str]]:
    """Rows of one chunk (height 0: unreadable), and the messages of its unreadable files."""
    stop = min(start + _CHUNK, len(_source))
    rows = np.zeros(stop - start, dtype=_ROW)
    bad: dict[int, str] = {}
    for index in range(start, stop):
        try:
            data = _source.read(index)
            facts = inspect_image(data, _source.path(index))
        except DataError as error:
            bad[index] = str(error)
            continue
        digest = hashlib.blake2b(data, digest_size=16).digest()
        rows[index - start] = (digest, facts.height, facts.width, facts.oddities)
    return rows, bad


def _oddities(source: ImageSource, flags: np.ndarray) -> dict[str, tuple[int, str]]:
    found = []
    for oddity, meaning in MEANINGS.items():
        places = np.flatnonzero(flags & int(oddity))
        if len(places):
            found.append((len(places), meaning, source.path(int(places[0]))))
    found.sort(key=lambda entry: -entry[0])
    return {meaning: (count, path) for count, meaning, path in found}


def _copies(source: ImageSource, digests: np.ndarray, indices: np.ndarray) -> tuple[int, int, list[list[str]]]:
    """Number of superfluous copies, of groups, and the paths of the first groups.

    Args:
        source: images.
        digests: [n] of 16 bytes each.
        indices: [n] int64, whose digests these are, ascending.
    """
    halves = digests.view(np.dtype([("a", "<u8"), ("b", "<u8")]))
    order = np.lexsort((halves["b"], halves["a"]))  # stable: within a group the indices ascend
    ordered = halves[order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(fresh)
    sizes = np.diff(np.append(starts, len(order)))
    groups = np.flatnonzero(sizes > 1)
    by_first = groups[np.argsort(indices[order[starts[groups]]], kind="stable")]
    shown = []
    for group in by_first[:_SHOWN_GROUPS]:
        members = indices[order[starts[group] : starts[group] + sizes[group]]]
        paths = [source.path(int(index)) for index in members[:_SHOWN_COPIES]]
        shown.append(paths + ([f"{len(members) - len(paths):,} more"] if len(members) > len(paths) else []))
    return len(order) - len(starts), len(groups), shown


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
