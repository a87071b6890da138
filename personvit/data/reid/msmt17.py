"""MSMT17: two folders of images, and lists that say which of them make up a split."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from personvit.data.reid.published import MSMT17_TRAIN_ONLY
from personvit.data.reid.types import ReIDSet, ReIDSplit, relabelled
from personvit.errors import DataError

_FOLDERS = {"version 1": ("train", "test"), "version 2 (masked faces)": ("mask_train_v2", "mask_test_v2")}
_MOST_CAMERAS = 10**9


def read_msmt17(root: Path, merge_val: bool = True) -> ReIDSet:
    """Read list_{train,val,query,gallery}.txt, of lines `0000/0000_000_01_0303morning_0015_0.jpg 0`.

    Args:
        root: folder with the lists.
        merge_val: train on the lists train and val together, as in the published figures; else on train alone.

    Raises:
        DataError: a folder or list is missing, a line is damaged, or a file is listed twice.
    """
    version, train_folder, test_folder = _folders(root)
    parts = ("train", "val") if merge_val else ("train",)
    seen: dict[str, str] = {}
    lists = [_existing(root, part) for part in parts] if train_folder.is_dir() else []
    return ReIDSet(
        name="msmt17",
        train=relabelled(_read_lists(train_folder, lists, seen)),
        query=_read_lists(test_folder, [_existing(root, "query")], seen),
        gallery=_read_lists(test_folder, [_existing(root, "gallery")], seen),
        root=str(root),
        version=version if merge_val else f"{version}, train list only",
        expected=None if merge_val else MSMT17_TRAIN_ONLY,
    )


def _folders(root: Path) -> tuple[str, Path, Path]:
    """Version, training folder, test folder."""
    found = [version for version, (_, test) in _FOLDERS.items() if (root / test).is_dir()]
    if len(found) == 2:
        raise DataError(
            f"data.root={root}: both versions of MSMT17 lie here (test/ and mask_test_v2/), under one set of lists. "
            f"Their figures are not comparable: give each a folder of its own, with its lists."
        )
    if not found:
        raise DataError(
            f"data.root={root}: not MSMT17. It has test/ (version 2: mask_test_v2/), list_query.txt and "
            f"list_gallery.txt, and for training train/ (mask_train_v2/), list_train.txt and list_val.txt."
        )
    train, test = _FOLDERS[found[0]]
    return found[0], root / train, root / test


def _existing(root: Path, part: str) -> Path:
    file = root / f"list_{part}.txt"
    if not file.is_file():
        hint = " Or train without it: data.merge_val=false" if part == "val" else ""
        raise DataError(
            f"{file}: this list of MSMT17 is missing. Copy it from the archive that the images are of.{hint}"
        )
    return file


def _read_lists(folder: Path, lists: list[Path], seen: dict[str, str]) -> ReIDSplit:
    """Images of some lists; `seen` keeps where each was listed, over all calls."""
    paths: list[str] = []
    labels: list[tuple[int, int]] = []
    for file in lists:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            relative, _, pid = line.strip().rpartition(" ")
            fields = relative.split("_")
            sound = len(fields) > 2 and pid.isdecimal() and fields[2].isdecimal() and len(pid) < 16
            if not sound or not 1 <= int(fields[2]) < _MOST_CAMERAS or ".." in Path(relative).parts or "\0" in relative:
                raise DataError(
                    f"{file}, line {number}: {line.strip()!r} is not `path identity` with the camera (from 1) as third "
                    f"field of the path, as in 0000/0000_000_01_0303morning_0015_0.jpg 0. Is the list damaged?"
                )
            key = os.path.normpath(f"{folder.name}/{relative}")
            if key in seen:
                raise DataError(
                    f"{file}, line {number}: {relative} is listed already in {seen[key]}. Lists of two versions, or a "
                    f"damaged copy? Take them again from the archive that the images are of."
                )
            seen[key] = f"{file.name}, line {number}"
            paths.append(f"{folder}/{relative}")
            labels.append((int(pid), int(fields[2]) - 1))
    table = np.array(labels, dtype=np.int64).reshape(-1, 2)
    return ReIDSplit(paths, table[:, 0], table[:, 1])


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Check its permissions: ls -l {file}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a text file in UTF-8. Copy it again from the archive of the set.") from None
