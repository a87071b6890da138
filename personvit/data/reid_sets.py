"""Labelled person re-identification sets by name: training, query and gallery images with identities and cameras."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from personvit.config import DataConfig, FinetuneDataConfig
from personvit.data.reid.csv_table import read_csv
from personvit.data.reid.market import read_market_family
from personvit.data.reid.msmt17 import read_msmt17
from personvit.data.reid.own import own_set, read_own_folder
from personvit.data.reid.paired import GALLERY_FOLDER, read_paired
from personvit.data.reid.preflight import empty_evaluation, other_set, unscored
from personvit.data.reid.published import PUBLISHED, TITLES
from personvit.data.reid.types import JUNK_PID, ReIDSet, ReIDSplit, cameras_outside, empty_split
from personvit.data.sources import LAYOUT_FOLDERS, layout_root
from personvit.data.split_report import identified
from personvit.errors import ConfigError, DataError

__all__ = [
    "JUNK_PID",
    "LABELLED_NAMES",
    "PUBLISHED",
    "ReIDSet",
    "ReIDSplit",
    "camera_offsets",
    "check_evaluation",
    "data_of_each_set",
    "is_labelled",
    "join_training",
    "open_reid_set",
    "open_training",
    "read_reid_set",
    "read_training_sets",
]

logger = logging.getLogger(__name__)

LABELLED_NAMES = ("auto", "generated", "csv", "folder", *LAYOUT_FOLDERS)
"""What `data.name` of a labelled set may be."""

_PAIRED = ("occluded_reid", "partial_reid")
_MSMT17_ROOTS = ("MSMT17_V1", "MSMT17_V2")


def open_reid_set(name: str, root: str | Path, *, keep_same_camera: bool = False, merge_val: bool = True) -> ReIDSet:
    """`read_reid_set`, which must be fit for evaluation.

    Args:
        name: as there.
        root: as there.
        keep_same_camera: gallery images of the query's own camera count as matches (protocol keep).
        merge_val: as there.

    Raises:
        ConfigError: unknown name.
        DataError: as there; the counts are those of another published set; or no query has a true match in the
            gallery, with the cause.
    """
    result = read_reid_set(name, root, merge_val=merge_val)
    check_evaluation(result, keep_same_camera)
    return result


def check_evaluation(result: ReIDSet, keep_same_camera: bool = False) -> None:
    """Fail if no query of a set can be scored, or it is another set than its name says; warn of less.

    Raises:
        DataError: see above.
    """
    _check_identity(result)
    cause = empty_evaluation(result, keep_same_camera)
    if cause is not None:
        raise DataError(cause)
    found = unscored(result)
    lost = int((found.missing if keep_same_camera else found.missing | found.lonely).sum())
    if lost:
        logger.warning(
            "%s: %d of %d queries have no true match and are not scored", result.root, lost, len(result.query)
        )


def _check_identity(result: ReIDSet) -> None:
    other = other_set(result)
    if other is not None:
        raise DataError(
            f"data.name={result.name} data.root={result.root}: by the counts of its splits this is {TITLES[other]}, so "
            f"its figures would stand under a wrong name. Use data.name={other}, or correct data.root."
        )
    outside = cameras_outside(result)
    if outside:
        logger.warning("%s: %s", result.root, outside)


def read_reid_set(name: str, root: str | Path, *, merge_val: bool = True) -> ReIDSet:
    """Read the split of a labelled set from its lists, folders and file names. No image is opened.

    Args:
        name: one of `LABELLED_NAMES`. generated has the layout of market1501; csv and folder are data of one's own;
            auto takes what lies in `root`, and names a set of Market-1501's layout by its counts.
        root: folder of the set, or the folder above it; csv: the file.
        merge_val: MSMT17: train on the lists train and val together (published).

    Raises:
        ConfigError: unknown name.
        DataError: no such layout, a name or line without identity and camera, an empty or unreadable folder, or a
            list that is missing or damaged.
    """
    if name not in LABELLED_NAMES:
        near = difflib.get_close_matches(name, LABELLED_NAMES, n=1)
        hint = f" Did you mean data.name={near[0]}?" if near else ""
        raise ConfigError(f"data.name={name} is not a labelled set: one of {', '.join(LABELLED_NAMES)}.{hint}")
    given = Path(root).expanduser()
    if name == "csv" or (name == "auto" and given.suffix.lower() == ".csv"):
        return own_set("csv", read_csv(given))
    folder = layout_root(name, given)
    if not folder.is_dir():
        what = "a file. A table of images is read by data.name=csv" if folder.is_file() else "no such folder"
        raise DataError(f"data.root={root}: {what}. Give the folder that holds query/ or list_query.txt.")
    if name == "auto":
        return _recognised(folder, merge_val)
    if name == "msmt17":
        if folder != given and all((given / version).is_dir() for version in _MSMT17_ROOTS):
            raise DataError(
                f"data.root={root}: both versions of MSMT17 are here, and their figures are not comparable. Say which: "
                f"data.root={given / _MSMT17_ROOTS[0]} (as published), or {given / _MSMT17_ROOTS[1]} (masked faces)."
            )
        return read_msmt17(folder, merge_val)
    if name == "folder":
        return own_set("folder", read_own_folder(folder))
    if name in _PAIRED:
        return read_paired(name, folder)
    return read_market_family(name, folder)


def _recognised(folder: Path, merge_val: bool) -> ReIDSet:
    if (folder / "list_query.txt").is_file():
        return read_msmt17(folder, merge_val)
    if (folder / GALLERY_FOLDER).is_dir():
        return read_paired("partial_reid" if (folder / "partial_body_images").is_dir() else "occluded_reid", folder)
    if not (folder / "bounding_box_test").is_dir() and any((folder / part).is_dir() for part in ("gallery", "train")):
        return own_set("folder", read_own_folder(folder))
    result = read_market_family("market1501", folder)
    return dataclasses.replace(result, name=identified(result)[0])


def is_labelled(name: str, root: Path) -> bool:
    """Whether `data.name` and `data.root` mean a labelled set, rather than images without labels."""
    if name == "auto" and root.is_file():
        return root.suffix.lower() == ".csv"
    if name == "folder":
        return (root / "gallery").is_dir() and (root / "query").is_dir()
    signs = ("query", "list_query.txt", GALLERY_FOLDER)
    return name in ("csv", *LAYOUT_FOLDERS) or (
        name == "auto" and any((layout_root(name, root) / sign).exists() for sign in signs)
    )


def data_of_each_set(data: DataConfig) -> list[DataConfig]:
    """The configuration of every set that `data.name` lists, separated by commas.

    `data.root` is then one folder that holds them all, or as many folders, in the same order.

    Raises:
        ConfigError: a set without a folder, listed twice, or a common folder that is itself a set.
    """
    names = [name.strip() for name in data.name.split(",")]
    if len(names) == 1:
        return [data]
    own = [name for name in names if name in ("csv", "folder")]
    if len(set(names)) < len(names) or not all(names) or "auto" in names:
        raise ConfigError(
            f"data.name={data.name}: expected different names of labelled sets, as in data.name=msmt17,market1501."
        )
    if data.root is None:
        raise ConfigError(
            f"data.name={data.name} needs data.root: the folder above all sets, or one folder for each, separated by "
            f"commas, as in data.root=/data/MSMT17,/data/Market-1501"
        )
    roots = [root.strip() for root in data.root.split(",")]
    if len(roots) != len(names):
        roots = [data.root] * len(names)
        if own:
            raise ConfigError(
                f"data.name={data.name} with data.root={data.root}: {own[0]} has no usual place in a common folder. "
                f"Give one path for each of the {len(names)} sets, separated by commas."
            )
        if any((Path(data.root) / sign).exists() for sign in ("query", "list_query.txt", GALLERY_FOLDER)):
            raise ConfigError(
                f"data.root={data.root} is the folder of one set, but data.name={data.name} lists {len(names)}. Give "
                f"the folder above them, or one folder for each, separated by commas."
            )
    return [dataclasses.replace(data, name=name, root=root) for name, root in zip(names, roots, strict=True)]


def join_training(sets: Sequence[ReIDSet]) -> ReIDSplit:
    """The training images of several sets as one split.

    Identities and cameras of later sets are numbered after those of earlier ones; cameras that a set shows only in
    its test images keep their place (see `camera_offsets`).
    """
    parts = [each.train for each in sets]
    ids = np.cumsum([0, *(int(part.pids.max(initial=-1)) + 1 for part in parts)])
    offsets = camera_offsets(sets)
    nothing = empty_split()
    return ReIDSplit(
        [path for part in parts for path in part.paths],
        np.concatenate([nothing.pids, *(part.pids + ids[number] for number, part in enumerate(parts))]),
        np.concatenate([nothing.camids, *(part.camids + offsets[number] for number, part in enumerate(parts))]),
    )


def camera_offsets(sets: Sequence[ReIDSet]) -> list[int]:
    """What to add to the cameras of each set to have them apart, and the number of all cameras as last entry."""
    return [0, *np.cumsum([each.num_cameras for each in sets]).tolist()]


def open_training(cfg: FinetuneDataConfig, *, keep_same_camera: bool = False) -> tuple[ReIDSplit, list[ReIDSet]]:
    """The joined training images that a configuration names, and the sets to evaluate on, each apart.

    Args:
        cfg: data.name and data.root, with test_name and test_root for other sets to evaluate on.
        keep_same_camera: protocol keep.

    Raises:
        ConfigError: names and folders that do not go together.
        DataError: a set that cannot be read, has nothing to train on, or (of those to evaluate on) cannot be scored.
    """
    training = read_training_sets(cfg)
    opened = {(data.name, data.root): each for data, each in zip(data_of_each_set(cfg), training, strict=True)}
    testing = []
    for data in _test_data(cfg):
        each = opened.get((data.name, data.root)) or _read_configured(data, cfg.merge_val)
        check_evaluation(each, keep_same_camera)
        testing.append(each)
    return join_training(training), testing


def read_training_sets(cfg: FinetuneDataConfig) -> list[ReIDSet]:
    """The sets that a configuration trains on, in the order that `join_training` takes them.

    Raises:
        ConfigError: names and folders that do not go together.
        DataError: a set that cannot be read, is another one by its counts, or has nothing to train on.
    """
    training = [_read_configured(data, cfg.merge_val) for data in data_of_each_set(cfg)]
    for each in training:
        _check_identity(each)
        if not len(each.train):
            raise DataError(_nothing_to_train(each))
    return training


def _read_configured(data: DataConfig, merge_val: bool) -> ReIDSet:
    if data.root is not None:
        return read_reid_set(data.name, data.root, merge_val=merge_val)
    if data.name not in ("auto", "generated"):
        what = "FILE, the CSV file of the images" if data.name == "csv" else "FOLDER, the folder that holds the set"
        raise DataError(f"data.name={data.name} needs data.root={what}.")
    from personvit.data.generated.dataset import ensure_generated  # needs the renderer: not for those with images

    logger.info("no data.root given: generated persons")
    return read_reid_set("generated", ensure_generated(data))


def _test_data(cfg: FinetuneDataConfig) -> list[DataConfig]:
    """The sets to evaluate on; those that are trained on too keep their folders."""
    if cfg.test_name is None and cfg.test_root is None:
        return data_of_each_set(cfg)
    name = cfg.test_name or cfg.name
    if cfg.test_root is not None:
        return data_of_each_set(dataclasses.replace(cfg, name=name, root=cfg.test_root))
    trained = {data.name: data for data in data_of_each_set(cfg)}
    names = [part.strip() for part in name.split(",")]
    if all(part in trained for part in names):
        return [trained[part] for part in names]
    if names == ["generated"]:
        return [dataclasses.replace(cfg, name="generated", root=None)]
    single = cfg.root is not None and len(trained) == 1 and is_labelled("auto", Path(cfg.root).expanduser())
    if cfg.root is None or single or (len(trained) > 1 and "," in cfg.root):
        raise ConfigError(
            f"data.test_name={cfg.test_name} is not among data.name={cfg.name}, and data.root={cfg.root} is no folder "
            f"above it. Say where it lies: data.test_root=FOLDER"
        )
    return data_of_each_set(dataclasses.replace(cfg, name=name))


def _nothing_to_train(each: ReIDSet) -> str:
    if each.name in _PAIRED:
        return (
            f"data.name={each.name}: {TITLES[each.name]} has no training images. Train on another set and evaluate on "
            f"it: data.name=market1501 data.root=... data.test_name={each.name} data.test_root={each.root}"
        )
    where = {"csv": "a row with split train", "folder": "train/", "msmt17": "train/ with list_train.txt"}
    return (
        f"data.name={each.name} data.root={each.root}: nothing to train on "
        f"({where.get(each.name, 'bounding_box_train/')} is missing or empty). Is the copy complete? To measure a "
        "model only: personvit evaluate"
    )
