"""Labelled person re-identification sets: training, query and gallery images with identities and cameras."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personvit.data.sources import EXTENSIONS, LAYOUT_FOLDERS, layout_root
from personvit.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

JUNK_PID = -1
"""Market-1501 marks boxes that are neither right nor wrong with this identity; the protocol leaves them out."""

PUBLISHED = {
    "market1501": ((751, 12936), (750, 3368), (751, 15913)),
    "msmt17": ((1041, 32621), (3060, 11659), (3060, 82161)),
    "dukemtmcreid": ((702, 16522), (702, 2228), (1110, 17661)),
    "occluded_duke": ((702, 15618), (519, 2210), (1110, 17661)),
}
"""(identities, images) of train, query and gallery as published; distractors (pid 0) count as one identity."""

_NAME = re.compile(r"(-?\d+)_c(\d+)")
_Parse = Callable[[str], tuple[int, int]]


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
        root: folder of the set.
        train_pids: original identities of the training images, ascending; empty where they are numbered apart from
            those of query and gallery (MSMT17).
    """

    name: str
    train: ReIDSplit
    query: ReIDSplit
    gallery: ReIDSplit
    root: str
    train_pids: tuple[int, ...] = ()

    def table(self) -> str:
        """Identities, images and cameras of the splits as text, beside the published counts where there are any."""
        published = PUBLISHED.get(self.name)
        lines = [f"{self.name} in {self.root}", f"{'split':8} {'ids':>7} {'images':>8} {'cameras':>8}  published"]
        for number, split in enumerate((self.train, self.query, self.gallery)):
            ids, cameras = len(np.unique(split.pids)), len(np.unique(split.camids))
            row = f"{('train', 'query', 'gallery')[number]:8} {ids:7,} {len(split):8,} {cameras:8}"
            if published:
                row += f"  {published[number][0]:,} ids, {published[number][1]:,} images"
                row += "" if published[number] == (ids, len(split)) else "  (differs)"
            lines.append(row)
        return "\n".join(lines)


def open_reid_set(name: str, root: str | Path, *, keep_same_camera: bool = False) -> ReIDSet:
    """`read_reid_set`, which must be fit for evaluation.

    Args:
        name: as there.
        root: as there.
        keep_same_camera: gallery images of the query's own camera count as matches (protocol keep).

    Raises:
        ConfigError: unknown name.
        DataError: as there, or no query that has a true match in the gallery.
    """
    result = read_reid_set(name, root)
    _check_queries(result, keep_same_camera)
    return result


def read_reid_set(name: str, root: str | Path) -> ReIDSet:
    """Read the split of a labelled set from its folder and file names. No image is opened.

    Args:
        name: market1501, dukemtmcreid, occluded_duke, msmt17, generated (the layout of market1501), or auto (by what
            lies in `root`).
        root: folder of the set, or the folder above it.

    Raises:
        ConfigError: unknown name.
        DataError: no such layout, a file name without identity and camera, or an empty split.
    """
    names = ("auto", "generated", *LAYOUT_FOLDERS)
    if name not in names:
        raise ConfigError(f"data.name={name} is not a labelled set: one of {', '.join(names)}.")
    folder = layout_root(name, Path(root).expanduser())
    if not folder.is_dir():
        raise DataError(f"data.root={root}: no such folder. Give the folder that holds query/ or list_query.txt.")
    if name == "auto":
        name = "msmt17" if (folder / "list_query.txt").is_file() else "market1501"
    return _read_msmt17(folder) if name == "msmt17" else _read_market_family(name, folder)


def _read_market_family(name: str, root: Path) -> ReIDSet:
    for part in ("query", "bounding_box_test"):
        if not (root / part).is_dir():
            raise DataError(
                f"data.root={root}: no folder {part}. A set of this kind has query/, bounding_box_test/ (the gallery) "
                f"and, for training, bounding_box_train/, with names like 0002_c1s1_000451_03.jpg. For images without "
                f"labels use personvit pretrain."
            )
    folder = root / "bounding_box_train"
    train = _read_folder(folder) if folder.is_dir() else _split([], _parse_market)
    return ReIDSet(
        name=name,
        train=_relabelled(train),
        query=_read_folder(root / "query"),
        gallery=_read_folder(root / "bounding_box_test"),
        root=str(root),
        train_pids=tuple(np.unique(train.pids).tolist()),
    )


def _read_folder(folder: Path) -> ReIDSplit:
    files = sorted(
        str(entry)
        for entry in folder.iterdir()
        if entry.suffix.lower() in EXTENSIONS and not entry.name.startswith(".")
    )
    if not files:
        raise DataError(f"{folder}: no image in this folder (looked for {' '.join(EXTENSIONS)}). Check data.root.")
    return _split(files, _parse_market)


def _parse_market(path: str) -> tuple[int, int]:
    """Identity and camera from the base name alone: a parent folder may well look like `1_c2`."""
    match = _NAME.match(Path(path).name)
    if match is None or int(match[2]) < 1:
        raise DataError(
            f"{path}: the name does not start with identity and camera, as in 0002_c1s1_000451_03.jpg (identity 2, "
            f"camera 1; cameras count from 1). Rename the file or take it out of the folder."
        )
    return int(match[1]), int(match[2]) - 1


def _split(files: list[str], parse: _Parse) -> ReIDSplit:
    labels = np.array([parse(file) for file in files], dtype=np.int64).reshape(-1, 2)
    kept = np.flatnonzero(labels[:, 0] != JUNK_PID)
    return ReIDSplit([files[index] for index in kept], labels[kept, 0], labels[kept, 1])


def _relabelled(split: ReIDSplit) -> ReIDSplit:
    return ReIDSplit(split.paths, np.unique(split.pids, return_inverse=True)[1].astype(np.int64), split.camids)


def _read_msmt17(root: Path) -> ReIDSet:
    """Lists of lines `0000/0000_000_01_0303morning_0015_0.jpg 0`; train and val together are the training set."""
    folders = [
        next((root / name for name in pair if (root / name).is_dir()), None)
        for pair in (("train", "mask_train_v2"), ("test", "mask_test_v2"))
    ]
    if folders[1] is None or not (root / "list_gallery.txt").is_file():
        raise DataError(
            f"data.root={root}: not MSMT17. It has test/ (or mask_test_v2/), list_query.txt and list_gallery.txt, and "
            f"for training train/ (or mask_train_v2/), list_train.txt and list_val.txt."
        )
    train_lists = [root / f"list_{part}.txt" for part in ("train", "val") if (root / f"list_{part}.txt").is_file()]
    return ReIDSet(
        name="msmt17",
        train=_relabelled(_read_lists(folders[0], train_lists if folders[0] else [])),
        query=_read_lists(folders[1], [root / "list_query.txt"]),
        gallery=_read_lists(folders[1], [root / "list_gallery.txt"]),
        root=str(root),
    )


def _read_lists(folder: Path | None, lists: list[Path]) -> ReIDSplit:
    paths: list[str] = []
    labels: list[tuple[int, int]] = []
    for file in lists:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            relative, _, pid = line.strip().rpartition(" ")
            fields = relative.split("_")
            if len(fields) < 3 or not pid.isdecimal() or not fields[2].isdecimal() or ".." in Path(relative).parts:
                raise DataError(
                    f"{file}, line {number}: {line.strip()!r} is not `path identity` with the camera as third field "
                    f"of the path, as in 0000/0000_000_01_0303morning_0015_0.jpg 0. Is the list damaged?"
                )
            paths.append(f"{folder}/{relative}")
            labels.append((int(pid), int(fields[2]) - 1))
    table = np.array(labels, dtype=np.int64).reshape(-1, 2)
    return ReIDSplit(paths, table[:, 0], table[:, 1])


def _check_queries(result: ReIDSet, keep_same_camera: bool) -> None:
    """Fail if no query can be scored, and say how many cannot: a query needs its identity under another camera.

    Under protocol keep any camera will do.
    """
    query, gallery = result.query, result.gallery
    if not len(query) or not len(gallery):
        raise DataError(f"{result.root}: {len(query)} query and {len(gallery)} gallery images. Is the set complete?")
    known = np.isin(query.pids, gallery.pids)
    if not known.any():
        raise DataError(
            f"{result.root}: none of the {len(np.unique(query.pids))} query identities is in the gallery (first: "
            f"{query.pids[0]}). Do query/ and bounding_box_test/ come from the same set?"
        )
    cameras = int(max(query.camids.max(), gallery.camids.max())) + 1
    shot = np.unique(gallery.pids * cameras + gallery.camids)  # distinct (identity, camera) pairs of the gallery
    views = dict(zip(*np.unique(shot // cameras, return_counts=True), strict=True))
    own = np.isin(query.pids * cameras + query.camids, shot)
    scored = known if keep_same_camera else np.array([views.get(pid, 0) for pid in query.pids]) > own
    if not scored.any():
        raise DataError(
            f"{result.root}: every query identity appears in the gallery under the query's own camera only. The "
            f"protocol leaves same-camera pairs out, so nothing can be scored. Are the cameras in the file names "
            f"(_c1, _c2 ...) right? If the set has one camera, count such pairs: personvit evaluate --protocol keep"
        )
    if not scored.all():
        logger.warning(
            "%s: %d of %d queries have no true match and are not scored", result.root, (~scored).sum(), len(query)
        )
