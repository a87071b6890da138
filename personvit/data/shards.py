"""Images in tar shards (WebDataset), read one by one where they lie."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from personvit.data.decode import decode_image
from personvit.data.path_sources import PathTable
from personvit.data.places import find_shards
from personvit.data.shard_index import TarMembers, UnfitIndexError, format_index, index_path, read_index, scan_tar
from personvit.errors import DataError

logger = logging.getLogger(__name__)

_MAX_OPEN = 256  # descriptors kept by a process, a quarter of what systems usually allow
_BAR_DELAY_S = 2


class ShardSource:
    """The images of tar files, in the order of the files and of their members.

    The index beside a tar file (`a.tar`, `a.idx`, as DALI's wds2idx writes it) says where its members lie. A missing
    one, or one that is not of the tar file, is made by scanning the headers; a missing one is also written if the
    folder permits it. Names of members are labels: nothing is ever unpacked. Only the index is in memory.

    Attributes:
        root: as given, made absolute.
        shards: paths of the tar files.
        problems: shard -> what is wrong with it: cut off, damaged.

    Args:
        root: folder of tar files, one tar file, or several as `data-{000000..000099}.tar`, `{a,b}.tar` or `*.tar`.

    Raises:
        DataError: no tar file there, one that is missing, compressed or no tar file, or no image in them.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.abspath(root)
        self.shards = [os.path.realpath(shard) for shard in find_shards(root)]
        self.problems: dict[str, str] = {}
        counts, offsets, sizes, names = [0], [], [], []
        for shard in tqdm(self.shards, "indexing", unit=" shards", disable=None, delay=_BAR_DELAY_S, leave=False):
            members = _members(Path(shard)).images()
            if members.problem:
                self.problems[shard] = members.problem
                logger.warning("%s: %s; its %d whole images count", shard, members.problem, len(members.names))
            counts.append(len(members.names))
            offsets.append(members.offsets)
            sizes.append(members.sizes)
            names.append(members.table())
        self._starts = np.cumsum(np.array(counts, dtype=np.int64))
        if not self._starts[-1]:
            raise DataError(f"data.root={root}: no image in {len(self.shards)} tar files. Was the right folder given?")
        self._offsets = np.concatenate(offsets)
        self._sizes = np.concatenate(sizes)
        self._names = PathTable(chain.from_iterable(map(_entries, names)))
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._offsets)

    def path(self, index: int) -> str:
        """Tar file and member name of image `index`: a label, not a place in the file system."""
        name = self._names[index]
        return f"{self.shards[self._shard_of(index)]}/{name}"

    def read(self, index: int) -> bytes:
        """Content of image `index`.

        Raises:
            DataError: the tar file is gone, or shorter than when it was indexed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        size, offset = int(self._sizes[index]), int(self._offsets[index])
        shard = self._shard_of(index)
        try:
            descriptor = self._descriptors.get(shard)
            if descriptor is not None:
                data = os.pread(descriptor, size, offset)
            else:
                data = self._read_first(shard, size, offset)
        except OSError as error:
            raise DataError(f"{self.path(index)}: cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise DataError(f"{self.path(index)}: cannot be read (the tar file has been cut since it was indexed)")
        return data

    def load(self, index: int) -> Image.Image:
        """Decode image `index` wholly, as RGB (see `decode_image`)."""
        return decode_image(self.read(index), self.path(index))

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _read_first(self, shard: int, size: int, offset: int) -> bytes:
        """Read from a shard that is not open, and leave it open while there is room. Safe among threads."""
        descriptor = os.open(self.shards[shard], os.O_RDONLY)
        data = b""
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            keep = len(self._descriptors) < _MAX_OPEN
            if not keep or self._descriptors.setdefault(shard, descriptor) != descriptor:
                os.close(descriptor)
        return data

    def __getstate__(self) -> dict[str, Any]:
        """Descriptors mean nothing in another process."""
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit the module may be gone before
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            close(descriptor)


def _members(tar: Path) -> TarMembers:
    """From the index, or from the tar file itself."""
    try:
        return read_index(tar)
    except FileNotFoundError:
        members = scan_tar(tar)
    except UnfitIndexError as error:
        logger.warning("%s: %s; indexed by its tar file instead (the index is left as it is)", index_path(tar), error)
        return scan_tar(tar)
    if not members.problem:
        _write_index(tar, members)
    return members


def _write_index(tar: Path, members: TarMembers) -> None:
    """Beside the tar file, unless the folder is read-only or another process was faster."""
    target = index_path(tar)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(format_index(members.names, members.offsets, members.sizes))
        try:
            os.link(temporary, target)  # unlike a rename, never over a file that has come into being
            logger.info("%s: written, so that the next start need not scan the tar file", target)
        finally:
            temporary.unlink()
    except OSError as error:
        logger.info("%s: not written (%s); the index is in memory", target, error.strerror)


def _entries(table: PathTable) -> list[bytes]:
    return [table.raw(number) for number in range(len(table))]
