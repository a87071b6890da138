"""Occluded-REID and Partial-REID: hidden or cut persons as queries, whole ones as gallery; nothing to train on."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from personvit.data.decode import EXTENSIONS
from personvit.data.reid.market import list_images
from personvit.data.reid.types import ReIDSet, ReIDSplit, empty_split
from personvit.errors import DataError

ENDINGS = (*EXTENSIONS, ".tif", ".tiff")
"""Occluded-REID comes as TIFF."""

QUERY_FOLDERS = ("occluded_body_images", "partial_body_images")
GALLERY_FOLDER = "whole_body_images"

_NUMBER = re.compile(r"\d{1,15}")


def read_paired(name: str, root: Path) -> ReIDSet:
    """Read `root`/{occluded_body_images,whole_body_images}, of <identity>/*.tif or files that begin with the identity.

    Partial-REID may have partial_body_images in place of occluded_body_images; where both are there, the occluded
    ones are the queries. No camera is known, so queries get camera 0 and the gallery camera 1: no pair is left out.

    Args:
        name: occluded_reid or partial_reid.
        root: the folder with these folders.

    Raises:
        DataError: a folder is missing, empty or cannot be listed, or an image has no identity.
    """
    candidates = QUERY_FOLDERS if name == "partial_reid" else QUERY_FOLDERS[:1]
    queries = next((root / folder for folder in candidates if (root / folder).is_dir()), None)
    if queries is None or not (root / GALLERY_FOLDER).is_dir():
        raise DataError(
            f"data.root={root}: not {name}. It has {' or '.join(candidates)} (the queries) and {GALLERY_FOLDER} (the "
            f"gallery), each with a folder per identity, or files like 001_001.jpg."
        )
    return ReIDSet(
        name=name,
        train=empty_split(),
        query=_read_side(queries, 0),
        gallery=_read_side(root / GALLERY_FOLDER, 1),
        root=str(root),
        version=f"queries of {queries.name}" if name == "partial_reid" else "",
    )


def _read_side(folder: Path, camera: int) -> ReIDSplit:
    files = list_images(folder, ENDINGS)
    try:
        folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}). Check its permissions: ls -ld {folder}"
        ) from None
    files += [file for inner in folders for file in list_images(inner, ENDINGS)]
    if not files:
        raise DataError(
            f"{folder}: no image in it or in its folders (looked for {' '.join(ENDINGS)}). Check data.root."
        )
    pids = np.array([_identity(file, folder) for file in files], dtype=np.int64)
    return ReIDSplit(files, pids, np.full(len(files), camera, dtype=np.int64))


def _identity(path: str, folder: Path) -> int:
    parent = os.path.dirname(path)
    label = os.path.basename(path if parent == str(folder) else parent)
    match = _NUMBER.match(label)
    if match is None:
        raise DataError(
            f"{path}: {label!r} does not begin with the number of an identity, as 001/ or 001_001.jpg do. Rename it or "
            f"take it out of the folder."
        )
    return int(match[0])
