"""Image sources: where the pictures of a pre-training run come from, and how one of them is read."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from PIL import Image

from personvit.config import DataConfig
from personvit.data.decode import EXTENSIONS, decode_image, read_image
from personvit.data.path_sources import FolderSource, ListSource, PathTable
from personvit.data.places import find_lmdb, is_shards
from personvit.errors import ConfigError, DataError

__all__ = [
    "EXTENSIONS",
    "LAYOUT_FOLDERS",
    "SOURCE_NAMES",
    "FolderSource",
    "ImageSource",
    "ListSource",
    "PathTable",
    "decode_image",
    "find_train_folder",
    "layout_root",
    "open_source",
    "read_image",
]

LAYOUT_FOLDERS = {
    "market1501": ("market1501", "Market-1501", "Market-1501-v15.09.15"),
    "dukemtmcreid": ("dukemtmcreid", "DukeMTMC-reID", "dukemtmc-reid"),
    "occluded_duke": ("Occluded_Duke", "Occluded-DukeMTMC", "occluded_duke"),
    "msmt17": ("MSMT17", "MSMT17_V1", "MSMT17_V2", "msmt17"),
    "cuhk03_labeled": ("labeled", "cuhk03-np/labeled", "CUHK03-NP/labeled", "cuhk03_labeled"),
    "cuhk03_detected": ("detected", "cuhk03-np/detected", "CUHK03-NP/detected", "cuhk03_detected"),
    "occluded_reid": ("Occluded_REID", "Occluded-REID", "OccludedREID", "occluded_reid"),
    "partial_reid": ("Partial_REID", "Partial-REID", "PartialREID", "Partial-REID_Dataset", "partial_reid"),
}
"""Labelled layouts, with the names that their folder usually has below a common root."""

SOURCE_NAMES = ("auto", "generated", "folder", "list", "lmdb", "shards", *LAYOUT_FOLDERS)


class ImageSource(Protocol):
    """A numbered set of images. The order is part of the contract: the same source gives the same numbers."""

    def __len__(self) -> int:
        """Number of images."""

    def path(self, index: int) -> str:
        """Where image `index` lies; for messages and lists."""

    def read(self, index: int) -> bytes:
        """Image `index` as it is stored, encoded.

        Raises:
            DataError: it cannot be read.
        """

    def load(self, index: int) -> Image.Image:
        """Decode image `index` wholly, as RGB (see `decode_image`).

        Raises:
            DataError: it cannot be read, is damaged, cut short, or not an image.
        """


def open_source(cfg: DataConfig) -> ImageSource:
    """The unlabelled images that a configuration names.

    `auto` looks at `data.root`: None -> generated persons; an .mdb file or a folder with one -> LMDB; a .tar file, a
    pattern of them, or a folder that holds nothing else -> tar shards; another file -> list of paths; a folder with
    `pool/` (generated persons) -> that; a labelled layout -> its training images; any other folder -> everything below.

    Raises:
        ConfigError: `data.name` is unknown.
        DataError: the source is missing, empty, or not of the named layout.
    """
    if cfg.name not in SOURCE_NAMES:
        raise ConfigError(f"data.name={cfg.name} is not one of {', '.join(SOURCE_NAMES)}.")
    if cfg.root is None or cfg.name == "generated":
        return FolderSource(_generated_root(cfg) / "pool")
    root = Path(cfg.root).expanduser()
    packed = _open_packed(cfg.name, root)
    if packed is not None:
        return packed
    if cfg.name == "list" or (cfg.name == "auto" and root.is_file()):
        return ListSource(root)
    if cfg.name == "auto" and (root / "pool").is_dir():
        return FolderSource(root / "pool")
    if cfg.name in LAYOUT_FOLDERS:
        folder = find_train_folder(layout_root(cfg.name, root))
        if folder is None:
            raise DataError(
                f"data.name={cfg.name} data.root={root}: no training folder (bounding_box_train, or train beside "
                f"list_train.txt). Check data.root, or use data.name=folder to take every image below it."
            )
        return FolderSource(folder)
    return FolderSource((find_train_folder(root) if cfg.name == "auto" else None) or root)


def _open_packed(name: str, root: Path) -> ImageSource | None:
    """Images that are not files of their own; None: `root` is nothing of the kind."""
    # Their modules are loaded by those who have such data: a checkout without py-lmdb still trains from folders.
    if name == "shards" or (name == "auto" and is_shards(root)):
        from personvit.data.shards import ShardSource

        return ShardSource(root)
    if name == "lmdb" or (name == "auto" and find_lmdb(root) is not None):
        from personvit.data.lmdb_source import LmdbSource

        return LmdbSource(root)
    return None


def layout_root(name: str, root: Path) -> Path:
    """The folder of a labelled layout: `root` itself, or a folder of the usual name below it."""
    if (root / "query").is_dir() or (root / "list_query.txt").is_file():
        return root
    for folder in LAYOUT_FOLDERS.get(name, ()):
        if (root / folder).is_dir():
            return root / folder
    return root


def find_train_folder(root: Path) -> Path | None:
    """The folder of training images of a labelled layout, or None if `root` is not one."""
    if (root / "bounding_box_train").is_dir():
        return root / "bounding_box_train"
    if (root / "list_train.txt").is_file():
        return next((root / name for name in ("train", "mask_train_v2") if (root / name).is_dir()), None)
    return None


def _generated_root(cfg: DataConfig) -> Path:
    """Folder of the generated persons: `data.root` if they already lie there, else the cache (written once)."""
    if cfg.root is not None and (Path(cfg.root) / "pool").is_dir():
        return Path(cfg.root)
    from personvit.data.generated.dataset import ensure_generated  # needs the renderer: not for those with images

    return ensure_generated(cfg)
