"""Image sources: where the pictures of a pre-training run come from, and how one of them is read."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from personvit.config import DataConfig
from personvit.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""File name endings that count as images, in any case."""

LAYOUT_FOLDERS = {
    "market1501": ("market1501", "Market-1501", "Market-1501-v15.09.15"),
    "dukemtmcreid": ("dukemtmcreid", "DukeMTMC-reID", "dukemtmc-reid"),
    "occluded_duke": ("Occluded_Duke", "Occluded-DukeMTMC", "occluded_duke"),
    "msmt17": ("MSMT17", "MSMT17_V1", "MSMT17_V2", "msmt17"),
}
"""Labelled layouts, with the names that their folder usually has below a common root."""

SOURCE_NAMES = ("auto", "generated", "folder", "list", *LAYOUT_FOLDERS)

_SEPARATOR = os.fsencode(os.sep)
_ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)


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


class PathTable:
    """Paths kept as one block of bytes and int64 offsets: 4 million of them cost no Python objects.

    Garbage collection and forked workers never touch the entries, so the table is shared between processes for free.
    """

    def __init__(self, paths: Iterable[bytes]) -> None:
        entries = list(paths)
        self._offsets = np.zeros(len(entries) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, entries), dtype=np.int64, count=len(entries)), out=self._offsets[1:])
        self._blob = b"".join(entries)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return os.fsdecode(self._blob[self._offsets[index] : self._offsets[index + 1]])


class _PathSource:
    """Images at the paths of a table, relative to a root."""

    def __init__(self, root: str, table: PathTable) -> None:
        self.root = root
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def path(self, index: int) -> str:
        """Full path of image `index`."""
        return os.path.join(self.root, self._table[index])

    def read(self, index: int) -> bytes:
        """Content of the file of image `index`."""
        path = self.path(index)
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    def load(self, index: int) -> Image.Image:
        """Decode image `index` wholly, as RGB (see `decode_image`)."""
        return decode_image(self.read(index), self.path(index))


class FolderSource(_PathSource):
    """Every image below a folder, in the order of the bytes of the relative paths.

    Hidden files and folders (a leading dot, such as macOS's `._name.jpg`) are passed over. A symbolic link to a file
    counts if its target stays inside the root. Links that leave the root, dangling links and links to folders (which
    may run in circles) are skipped and counted.

    Attributes:
        root: the folder, resolved.
        skipped_links: number of links that were skipped.

    Args:
        root: folder to search.

    Raises:
        DataError: no such folder, or no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        if not Path(root).is_dir():
            raise DataError(
                f"data.root={root}: no such folder. Check the path, or leave data.root out to use generated persons."
            )
        resolved = os.path.realpath(root)
        found, self.skipped_links = _scan(os.fsencode(resolved))
        if self.skipped_links:
            logger.warning("%s: skipped %d links (out of the folder, or to folders)", root, self.skipped_links)
        if not found:
            links = (
                f" {self.skipped_links} links were skipped: they leave the folder or lead to folders; write the "
                f"target files into a text file and give that as data.root."
                if self.skipped_links
                else ""
            )
            raise DataError(
                f"data.root={root}: no image in this folder or below it (looked for {' '.join(EXTENSIONS)}).{links} "
                f"Point data.root at the folder of crops or at a text file of paths, or leave it out to use generated "
                f"persons."
            )
        super().__init__(resolved, PathTable(found))


class ListSource(_PathSource):
    """Images named by a text file, one path a line, in the order of the lines.

    A relative path starts at the root and may not climb out of it; an absolute path is taken as it stands. Empty
    lines are passed over. Only the first path is checked for existence here; a file that is missing later counts as
    unreadable.

    Attributes:
        root: the folder that relative paths start from, resolved.

    Args:
        file: text file, UTF-8.
        root: folder that relative paths start from; None: the folder of the list.

    Raises:
        DataError: no such list, not text, empty, a path that leaves the root, or a first path that does not exist.
    """

    def __init__(self, file: str | Path, root: str | Path | None = None) -> None:
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise DataError(f"list {file}: cannot be read ({error.strerror}). Check data.root.") from None
        if b"\0" in content:
            raise DataError(
                f"list {file}: not a text file (pickles and archives are not read as lists). Write one path a line."
            )
        resolved = os.path.realpath(root if root is not None else Path(file).parent)
        lines = [line.strip() for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()]
        entries = [_checked_entry(file, number, line, resolved) for number, line in enumerate(lines, start=1) if line]
        if not entries:
            raise DataError(f"list {file}: no path in it. Write one image path a line, relative to {resolved}.")
        super().__init__(resolved, PathTable(entries))
        if not os.path.isfile(self.path(0)):
            raise DataError(
                f"list {file}: its first image {self.path(0)} does not exist. Relative paths start from {resolved}: "
                f"move the list into the folder of the images, or write absolute paths."
            )


def _checked_entry(file: str | Path, number: int, line: bytes, root: str) -> bytes:
    entry = os.path.normpath(line)
    if not os.path.isabs(entry) and entry.split(_SEPARATOR, 1)[0] == b"..":
        raise DataError(
            f"list {file}, line {number}: {os.fsdecode(line)} climbs out of {root}. Move the list to a folder above "
            f"its images, or write absolute paths."
        )
    return entry


def _scan(root: bytes) -> tuple[list[bytes], int]:
    """Relative paths of the images below a resolved folder, sorted, and the number of links skipped."""
    inside = root.rstrip(_SEPARATOR) + _SEPARATOR
    found: list[bytes] = []
    skipped = 0
    pending = [root]
    while pending:
        for entry in _entries(pending.pop()):
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif entry.is_symlink() and not (
                os.path.realpath(entry.path).startswith(inside) and os.path.isfile(entry.path)
            ):
                skipped += 1
            elif entry.name.lower().endswith(_ENDINGS):
                found.append(entry.path[len(inside) :])
    found.sort()
    return found, skipped


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"{os.fsdecode(folder)}: cannot be listed ({error.strerror}). Check its permissions (ls -ld), or give the "
            f"readable images as a text file of paths."
        ) from None


def read_image(path: str) -> Image.Image:
    """`decode_image` of a file.

    Raises:
        DataError: the file is missing, damaged, cut short, or not an image.
    """
    try:
        return decode_image(Path(path).read_bytes(), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file wholly, as RGB of 8 bits. Orientation tags and alpha are ignored, as in the published code.

    Raises:
        DataError: damaged, cut short, or not an image; the message begins with `name`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    # Decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error, IndexError, zlib.error ...
    except Exception as error:
        raise DataError(f"{name}: cannot be read as an image ({type(error).__name__}: {error})") from None


def open_source(cfg: DataConfig) -> ImageSource:
    """The unlabelled images that a configuration names.

    `auto` looks at `data.root`: None -> generated persons; a file -> list of paths; a folder with `pool/` (generated
    persons) -> that; a labelled layout -> its training images; any other folder -> everything below it.

    Raises:
        ConfigError: `data.name` is unknown.
        DataError: the source is missing, empty, or not of the named layout.
    """
    if cfg.name not in SOURCE_NAMES:
        raise ConfigError(f"data.name={cfg.name} is not one of {', '.join(SOURCE_NAMES)}.")
    if cfg.root is None or cfg.name == "generated":
        return FolderSource(_generated_root(cfg) / "pool")
    root = Path(cfg.root).expanduser()
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
