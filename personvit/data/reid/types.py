"""What every reader of a labelled layout returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from personvit.data.reid.published import CAMERAS, PUBLISHED, Counts

SPLITS = ("train", "query", "gallery")

JUNK_PID = -1
"""Market-1501 marks boxes that are neither right nor wrong with this identity; the protocol leaves them out."""


@dataclass(frozen=True)
class ReIDSplit:
    """Images of one split.

    Attributes:
        paths: full paths.
        pids: [n] int64 identities.
        camids: [n] int64 cameras, from 0.
    """

    paths: list[str]
    pids: np.ndarray
    camids: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class ReIDSet:
    """A labelled set.

    Attributes:
        name: layout name, as in `data.name`.
        train: training images, identities relabelled 0 ... n-1 in the order of the original ones; may be empty.
        query: searched for, original identities.
        gallery: searched in, original identities; pid 0 marks distractors in Market-1501.
        root: folder of the set, or its CSV file.
        train_pids: original identities of the training images, ascending; empty where they are numbered apart from
            those of query and gallery (MSMT17).
        pid_names: own data: what the user calls identity k, for k = 0, 1 ...; empty: the number itself.
        camera_names: own data: what the user calls camera k; empty: the number, counted from 1 in file names.
        version: what tells this copy from another of the same name ("version 2 (masked faces)"), or "".
        expected: counts to compare with; None: those published under `name`.
    """

    name: str
    train: ReIDSplit
    query: ReIDSplit
    gallery: ReIDSplit
    root: str
    train_pids: tuple[int, ...] = ()
    pid_names: tuple[str, ...] = ()
    camera_names: tuple[str, ...] = ()
    version: str = ""
    expected: Counts | None = None

    @property
    def splits(self) -> tuple[ReIDSplit, ReIDSplit, ReIDSplit]:
        """Train, query and gallery."""
        return self.train, self.query, self.gallery

    @property
    def counts(self) -> Counts:
        """(identities, images) of train, query and gallery."""
        train, query, gallery = ((len(np.unique(split.pids)), len(split)) for split in self.splits)
        return train, query, gallery

    @property
    def num_cameras(self) -> int:
        """Number of camera labels that all splits together need: the largest one plus 1."""
        return 1 + max(int(split.camids.max(initial=-1)) for split in self.splits)

    def pid_name(self, pid: int) -> str:
        """What the user calls an identity of query or gallery."""
        return self.pid_names[pid] if self.pid_names else str(pid)

    def camera_name(self, camid: int) -> str:
        """What the user calls a camera."""
        return self.camera_names[camid] if self.camera_names else str(camid + 1)

    def table(self) -> str:
        """Identities, images and cameras of the splits as text, beside the published counts where there are any."""
        expected = self.expected or PUBLISHED.get(self.name)
        version = f", {self.version}" if self.version else ""
        heading = f"{'split':8} {'ids':>7} {'images':>8} {'cameras':>8}" + ("  published" if expected else "")
        lines = [f"{self.name}{version} in {self.root}", heading]
        for number, split in enumerate(self.splits):
            ids, images = self.counts[number]
            row = f"{SPLITS[number]:8} {ids:7,} {images:8,} {len(np.unique(split.camids)):8}"
            if expected:
                row += f"  {expected[number][0]:,} ids, {expected[number][1]:,} images"
                row += _difference(self.counts[number], expected[number])
            lines.append(row)
        return "\n".join([*lines, *self._remarks()])

    def _remarks(self) -> list[str]:
        lines = []
        single = int((np.unique(self.train.pids, return_counts=True)[1] == 1).sum())
        if single:
            what = "1 identity has" if single == 1 else f"{single:,} identities have"
            lines.append(f"train: {what} one image only, which a batch then holds several times")
        cameras, known = len(np.unique(np.concatenate([split.camids for split in self.splits]))), CAMERAS.get(self.name)
        if known and cameras < known:
            lines.append(f"cameras: {cameras} instead of {known}")
        outside = cameras_outside(self)
        return [*lines, outside] if outside else lines


def cameras_outside(reid_set: ReIDSet) -> str:
    """Says which cameras the published set of this name does not have, and the first image of one; "": none."""
    limit = CAMERAS.get(reid_set.name)
    if limit is None:
        return ""
    strange = [(split, int(place)) for split in reid_set.splits for place in np.flatnonzero(split.camids >= limit)]
    if not strange:
        return ""
    cameras = sorted({int(split.camids[place]) + 1 for split, place in strange})
    first, place = strange[0]
    return (
        f"cameras: {', '.join(map(str, cameras))} (first: {first.paths[place]}), but {reid_set.name} has cameras 1 to "
        f"{limit} only. Is this another set, or one of your own? Then name it so: data.name=auto or csv"
    )


def _difference(counts: tuple[int, int], expected: tuple[int, int]) -> str:
    parts = [
        f"{abs(difference):,} {what} {'more' if difference > 0 else 'fewer'}"
        for what, difference in (("ids", counts[0] - expected[0]), ("images", counts[1] - expected[1]))
        if difference
    ]
    if not parts:
        return ""
    return f"  (differs: {', '.join(parts)})" if counts[1] else "  (differs: not here)"


def labelled_split(paths: Sequence[str], parse: Callable[[str], tuple[int, int]]) -> ReIDSplit:
    """A split of files whose names say identity and camera; junk is left out.

    Args:
        paths: full paths.
        parse: path -> (identity, camera from 0).
    """
    labels = np.array([parse(path) for path in paths], dtype=np.int64).reshape(-1, 2)
    kept = np.flatnonzero(labels[:, 0] != JUNK_PID)
    return ReIDSplit([paths[index] for index in kept], labels[kept, 0], labels[kept, 1])


def relabelled(split: ReIDSplit) -> ReIDSplit:
    """The same images with identities 0 ... n-1, in ascending order of the original ones."""
    return ReIDSplit(split.paths, np.unique(split.pids, return_inverse=True)[1].astype(np.int64), split.camids)


def empty_split() -> ReIDSplit:
    """No image."""
    return ReIDSplit([], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
