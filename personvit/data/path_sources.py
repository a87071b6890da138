"""Images that lie as files in a folder, or that a text file names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from personvit.data.decode import EXTENSIONS, decode_image
from personvit.errors import DataError

logger = logging.getLogger(__name__)

_SEPARATOR = os.fsencode(os.sep)
_ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)
_BATCH = 1 << 16  # paths
_BLOCK = 1 << 20  # bytes of a list
_BAR_DELAY_S = 2
_UNTIDY = (b"..", b"./", b"//")  # a path without these is what os.path.normpath makes of it


class PathTable:
    """Paths kept as one block of bytes and int64 offsets: 4 million of them cost no Python objects.

    Garbage collection and forked workers never touch the entries, so the table is shared between processes for free.
    The paths are taken one by one: they may come from a generator and are never all in memory as objects.
    """

    def __init__(self, paths: Iterable[bytes]) -> None:
        self._blob = bytearray()
        lengths = [np.zeros(1, dtype=np.int64)]
        entries = iter(paths)
        while batch := list(islice(entries, _BATCH)):
            lengths.append(np.fromiter(map(len, batch), dtype=np.int64, count=len(batch)))
            self._blob += b"".join(batch)
        self._offsets = np.cumsum(np.concatenate(lengths))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """Entry `index` as bytes."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return bytes(self._blob[self._offsets[index] : self._offsets[index + 1]])


class PathSource:
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
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None

    def load(self, index: int) -> Image.Image:
        """Decode image `index` wholly, as RGB (see `decode_image`)."""
        return decode_image(self.read(index), self.path(index))


class FileSource(PathSource):
    """Images at full paths.

    Args:
        paths: full paths, in the order of the source.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__("", PathTable(os.fsencode(path) for path in paths))


class FolderSource(PathSource):
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
        DataError: no such folder, a folder that cannot be listed, or no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        if not Path(root).is_dir():
            raise DataError(
                f"data.root={root}: no such folder. Check the path, or leave data.root out to use generated persons."
            )
        resolved = os.path.realpath(root)
        walk = _Walk(os.fsencode(resolved))
        with tqdm(walk, f"listing {root}", unit=" images", disable=None, delay=_BAR_DELAY_S, leave=False) as bar:
            table = PathTable(bar)
        self.skipped_links = walk.skipped_links
        if self.skipped_links:
            logger.warning("%s: skipped %d links (out of the folder, or to folders)", root, self.skipped_links)
        if not len(table):
            links = (
                f" {self.skipped_links} links were skipped: they leave the folder or lead to folders; write the "
                f"target files into a text file and give that as data.root."
                if self.skipped_links
                else ""
            )
            raise DataError(
                f"data.root={root}: no image in this folder or below it ({walk.folders:,} folders; looked for "
                f"{' '.join(EXTENSIONS)}).{links} Point data.root at the folder of crops or at a text file of paths, "
                f"or leave it out to use generated persons."
            )
        super().__init__(resolved, table)


class ListSource(PathSource):
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
        resolved = os.path.realpath(root if root is not None else Path(file).parent)
        try:
            table = PathTable(_list_entries(file, resolved))
        except OSError as error:
            raise DataError(f"list {file}: cannot be read ({error.strerror}). Check data.root.") from None
        if not len(table):
            raise DataError(f"list {file}: no path in it. Write one image path a line, relative to {resolved}.")
        super().__init__(resolved, table)
        if not os.path.isfile(self.path(0)):
            raise DataError(
                f"list {file}: its first image {self.path(0)} does not exist. Relative paths start from {resolved}: "
                f"move the list into the folder of the images, or write absolute paths."
            )


def _list_entries(file: str | Path, root: str) -> Iterator[bytes]:
    number = 0
    for block in _whole_lines(file):
        if b"\0" in block:
            raise DataError(
                f"list {file}: not a text file (pickles and archives are not read as lists). Write one path a line."
            )
        tidy = not any(mark in block for mark in _UNTIDY)
        for line in block.splitlines():
            number += 1
            if entry := line.strip():
                yield entry if tidy else _checked_entry(file, number, entry, root)


def _whole_lines(file: str | Path) -> Iterator[bytes]:
    """A text file in blocks that end with a line, without the mark of UTF-8 that some editors put in front."""
    with open(file, "rb") as stream:
        rest = stream.read(_BLOCK).removeprefix(b"\xef\xbb\xbf")
        while block := stream.read(_BLOCK):
            end = block.rfind(b"\n") + 1
            if end:
                yield rest + block[:end]
                rest = block[end:]
            else:
                rest += block
        yield rest


def _checked_entry(file: str | Path, number: int, line: bytes, root: str) -> bytes:
    entry = os.path.normpath(line)
    if not os.path.isabs(entry) and entry.split(_SEPARATOR, 1)[0] == b"..":
        raise DataError(
            f"list {file}, line {number}: {os.fsdecode(line)} climbs out of {root}. Move the list to a folder above "
            f"its images, or write absolute paths."
        )
    return entry


class _Walk:
    """The relative paths of the images below a resolved folder, in the order of their bytes.

    Each folder is sorted by itself with its subfolders' names ending in the separator: depth first, that is the order
    of the whole, and no more than the names of the folders that are open has to be kept.

    Attributes:
        folders: folders listed so far.
        skipped_links: links skipped so far.
    """

    def __init__(self, root: bytes) -> None:
        self.folders = 0
        self.skipped_links = 0
        self._inside = root.rstrip(_SEPARATOR) + _SEPARATOR

    def __iter__(self) -> Iterator[bytes]:
        pending = [iter(self._listed(b""))]
        while pending:
            relative = next(pending[-1], None)
            if relative is None:
                pending.pop()
            elif relative.endswith(_SEPARATOR):
                pending.append(iter(self._listed(relative)))
            else:
                yield relative

    def _listed(self, prefix: bytes) -> list[bytes]:
        """Images and subfolders of a folder, relative to the root, sorted."""
        folder = self._inside + prefix
        found: list[bytes] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        found.append(prefix + entry.name + _SEPARATOR)
                    elif entry.is_symlink() and not self._stays_inside(entry.path):
                        self.skipped_links += 1
                    elif entry.name.lower().endswith(_ENDINGS):
                        found.append(prefix + entry.name)
        except OSError as error:
            raise DataError(
                f"{os.fsdecode(folder)}: cannot be listed ({error.strerror}). Check its permissions (ls -ld), or give "
                f"the readable images as a text file of paths."
            ) from None
        self.folders += 1
        found.sort()
        return found

    def _stays_inside(self, link: bytes) -> bool:
        return os.path.realpath(link).startswith(self._inside) and os.path.isfile(link)
