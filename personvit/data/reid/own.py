"""Data of one's own: a table of images with identities and, where known, cameras and splits."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personvit.data.path_sources import FolderSource
from personvit.data.reid.types import SPLITS, ReIDSet, ReIDSplit, relabelled
from personvit.errors import DataError

_CAMERA = re.compile(r"(?:^|_)c(\d{1,9})(?!\d)")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class OwnTable:
    """Images as their owner lists them.

    Attributes:
        source: CSV file or folder.
        paths: full paths.
        pids: identity of each image, as text.
        cameras: camera of each image, as text; None: not known.
        splits: train, query or gallery of each image; None: not split yet.
    """

    source: str
    paths: list[str]
    pids: list[str]
    cameras: list[str] | None
    splits: list[str] | None


def natural_order(text: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `p2` before `p10`; texts that differ only in leading zeros stay apart."""
    parts = [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in _DIGITS.split(text) if part]
    return [*parts, (2, 0, text)]


def numbered(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number names 0 ... n-1 in natural order.

    Returns:
        [len(names)] int64 number of each, and the names by number.
    """
    known = tuple(sorted(set(names), key=natural_order))
    places = {name: number for number, name in enumerate(known)}
    return np.array([places[name] for name in names], dtype=np.int64).reshape(-1), known


def read_own_folder(root: Path) -> OwnTable:
    """Images in `root`/{train,query,gallery}/<identity>/..., or in `root`/<identity>/... where nothing is split.

    The camera is the number after `_c` in the file name (`_c3`), if there is one. Hidden files and links out of the
    folder are passed over.

    Raises:
        DataError: an image without a folder of its identity, some names with and some without a camera, no image, or
            a folder that cannot be listed.
    """
    present = [split for split in SPLITS if (root / split).is_dir()]
    paths: list[str] = []
    pids: list[str] = []
    splits: list[str] = []
    for split in present or ("",):
        source = FolderSource(root / split)
        for number in range(len(source)):
            path = source.path(number)
            inner = path[len(source.root.rstrip(os.sep)) + 1 :].split(os.sep)
            if len(inner) < 2:
                raise DataError(
                    f"{path}: this image is in no folder of its identity, as in {root / split}/anna/1.jpg. Move it "
                    f"into one, or list images and identities in a CSV file: data.name=csv"
                )
            paths.append(path)
            pids.append(inner[0])
            splits.append(split)
    return OwnTable(str(root), paths, pids, _cameras(paths), splits if present else None)


def _cameras(paths: list[str]) -> list[str] | None:
    found = [_CAMERA.search(os.path.basename(path)) for path in paths]
    known = sum(match is not None for match in found)
    if known == 0:
        return None
    if known < len(found):
        bare = next(path for path, match in zip(paths, found, strict=True) if match is None)
        raise DataError(
            f"{bare}: no camera (_c1, _c2 ...) in this name, but in {known:,} of {len(found):,} others. Name the "
            f"camera in all of them or in none, or list the cameras in a CSV file: data.name=csv"
        )
    return [str(int(match[1])) for match in found if match is not None]


def own_set(name: str, table: OwnTable) -> ReIDSet:
    """The labelled set of a table; images without a camera share camera 0.

    Raises:
        DataError: the table is not split yet.
    """
    if table.splits is None:
        raise DataError(
            f"data.root={table.source}: nothing says which images are for training, which are queries and which are "
            f"the gallery. Split it: personvit data split {table.source} --out split.csv, then data.name=csv "
            f"data.root=split.csv"
        )
    pids, pid_names = numbered(table.pids)
    cameras, camera_names = numbered(table.cameras) if table.cameras is not None else (np.zeros_like(pids), ())
    splits = np.array(table.splits)

    def part(split: str) -> ReIDSplit:
        chosen = np.flatnonzero(splits == split)
        return ReIDSplit([table.paths[index] for index in chosen], pids[chosen], cameras[chosen])

    train = part("train")
    return ReIDSet(
        name=name,
        train=relabelled(train),
        query=part("query"),
        gallery=part("gallery"),
        root=table.source,
        train_pids=tuple(np.unique(train.pids).tolist()),
        pid_names=pid_names,
        camera_names=camera_names,
        version="" if table.cameras is not None else "no cameras: evaluate under protocol keep",
    )
