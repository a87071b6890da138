"""The layout of Market-1501, which DukeMTMC-reID, Occluded-Duke, CUHK03-NP and the generated persons share."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from personvit.data.decode import EXTENSIONS
from personvit.data.reid.types import ReIDSet, ReIDSplit, empty_split, labelled_split, relabelled
from personvit.errors import DataError

_NAME = re.compile(r"(-?\d{1,15})_c(\d{1,9})")


def read_market_family(name: str, root: Path) -> ReIDSet:
    """Read `root`/{bounding_box_train,query,bounding_box_test}; the first of them may be absent.

    Args:
        name: layout name that the set gets.
        root: the folder with these folders.

    Raises:
        DataError: a folder is missing, empty or cannot be listed, or a name has no identity and camera.
    """
    for part in ("query", "bounding_box_test"):
        if not (root / part).is_dir():
            raise DataError(_missing(name, root, part))
    folder = root / "bounding_box_train"
    train = _read_folder(folder) if folder.is_dir() else empty_split()
    return ReIDSet(
        name=name,
        train=relabelled(train),
        query=_read_folder(root / "query"),
        gallery=_read_folder(root / "bounding_box_test"),
        root=str(root),
        train_pids=tuple(np.unique(train.pids).tolist()),
    )


def _missing(name: str, root: Path, part: str) -> str:
    if name.startswith("cuhk03") and any(root.rglob("cuhk-03.mat")):
        return (
            f"data.root={root}: cuhk-03.mat holds CUHK03 as it was published, with the images inside; it is not read "
            f"here. Use the prepared folders of the new protocol (CUHK03-NP): detected/ and labeled/, each with "
            f"bounding_box_train/, query/ and bounding_box_test/ of names like 0001_c1_1.png."
        )
    return (
        f"data.root={root}: no folder {part}. A set of this kind has query/, bounding_box_test/ (the gallery) and, for "
        f"training, bounding_box_train/, with names like 0002_c1s1_000451_03.jpg. Other folders with labels are read "
        f"by data.name=folder or csv; for images without labels use personvit pretrain."
    )


def _read_folder(folder: Path) -> ReIDSplit:
    files = list_images(folder)
    if not files:
        raise DataError(f"{folder}: no image in this folder (looked for {' '.join(EXTENSIONS)}). Check data.root.")
    return labelled_split(files, _parse)


def list_images(folder: Path, endings: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Full paths of the images directly in a folder, sorted; hidden files are passed over.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name.lower().endswith(endings) and not e.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}). Check its permissions: ls -ld {folder}"
        ) from None
    return [f"{folder}/{name}" for name in names]


def _parse(path: str) -> tuple[int, int]:
    """Identity and camera from the base name alone: a parent folder may well look like `1_c2`."""
    match = _NAME.match(os.path.basename(path))
    if match is None or int(match[2]) < 1:
        raise DataError(
            f"{path}: the name does not start with identity and camera, as in 0002_c1s1_000451_03.jpg (identity 2, "
            f"camera 1; cameras count from 1). Rename the file or take it out of the folder."
        )
    return int(match[1]), int(match[2]) - 1
