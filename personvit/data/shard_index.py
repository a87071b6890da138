"""Where the members of a tar shard lie: index files as DALI's wds2idx writes them, and a scan of the headers.

An index file has a line `v1.2 SAMPLES` and one line for each sample, with four fields for each of its members: ending,
offset of the content, size, name. Members of one sample follow each other and have the same name up to the first dot.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personvit.data.decode import EXTENSIONS
from personvit.data.path_sources import PathTable
from personvit.errors import DataError

BLOCK = 512
"""Bytes; every header and every content starts at a multiple."""

_VERSION = b"v1.2"
_GZIP = b"\x1f\x8b"
_PROBED = 8
_ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)


class UnfitIndexError(Exception):
    """An index file is damaged, or is not of the tar file beside it."""


@dataclass(frozen=True)
class TarMembers:
    """Regular files of a tar file, in its order.

    Attributes:
        names: as stored.
        offsets: [n] int64, bytes from the start of the tar file to the content.
        sizes: [n] int64, bytes.
        problem: what is wrong with the tar file; empty: nothing.
    """

    names: list[bytes]
    offsets: np.ndarray
    sizes: np.ndarray
    problem: str

    def images(self) -> TarMembers:
        """Those whose name ends like an image's. Hidden ones (a leading dot) are left out."""
        kept = [
            number
            for number, name in enumerate(self.names)
            if name.lower().endswith(_ENDINGS) and not name.rpartition(b"/")[2].startswith(b".")
        ]
        return TarMembers([self.names[number] for number in kept], self.offsets[kept], self.sizes[kept], self.problem)

    def table(self) -> PathTable:
        """The names as one block."""
        return PathTable(self.names)


def index_path(tar: Path) -> Path:
    """The index file of a tar file: a.tar -> a.idx."""
    return tar.with_suffix(".idx")


def scan_tar(tar: Path) -> TarMembers:
    """Read the headers of a tar file. Of one that is cut off or damaged, the whole members before that place count.

    Raises:
        DataError: not a tar file, or compressed.
    """
    names: list[bytes] = []
    places: list[tuple[int, int]] = []
    with tar.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        if file.read(2) == _GZIP:
            raise DataError(
                f"{tar}: compressed, so no image can be read by itself. Unpack it: gunzip -c {tar} > plain.tar"
            )
        file.seek(0)
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it owns nothing: `file` does)
        except (tarfile.TarError, ValueError) as error:
            raise DataError(f"{tar}: not a tar file ({error}). Is the copy complete?") from None
        problem = ""
        try:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep an object for each
                if member.isreg() and not member.issparse():
                    if member.offset_data + member.size > total:
                        problem = f"cut off within {member.name}"
                        break
                    names.append(os.fsencode(member.name))
                    places.append((member.offset_data, member.size))
        # Damaged headers: ReadError, but also ValueError, OverflowError and others from the numbers in them
        except Exception as error:
            problem = f"damaged or cut off at byte {archive.offset:,} ({error})"
        if not problem:
            problem = _end_problem(file.fileno(), archive.offset)
    table = np.array(places, dtype=np.int64).reshape(-1, 2)
    return TarMembers(names, table[:, 0], table[:, 1], problem)


def _end_problem(descriptor: int, end: int) -> str:
    """A whole tar file ends with a block of zeros; tarfile stops without a word at anything that is no header."""
    around = os.pread(descriptor, BLOCK, max(0, end - BLOCK)) + os.pread(descriptor, BLOCK, end)
    has_end = b"\0" * BLOCK in around
    return "" if has_end else f"damaged or cut off at byte {end:,} (no end mark)"


def read_index(tar: Path) -> TarMembers:
    """Members of a tar file from the index file beside it. Members beyond a cut in the tar file are left out.

    Raises:
        UnfitIndexError: damaged, of another version, or not of this tar file.
        FileNotFoundError: there is none.
    """
    first, _, body = index_path(tar).read_bytes().partition(b"\n")
    head = first.split()
    fields = body.split()
    if len(head) != 2 or head[0] != _VERSION or not head[1].isdigit() or len(fields) % 4:
        raise UnfitIndexError(f"not a {_VERSION.decode()} index (or names with spaces)")
    if int(head[1]) != body.count(b"\n") + (not body.endswith(b"\n")):
        raise UnfitIndexError(f"{int(head[1])} samples announced, {body.count(bytes([10]))} there")
    try:
        offsets = np.array(fields[1::4], dtype=bytes).astype(np.int64)
        sizes = np.array(fields[2::4], dtype=bytes).astype(np.int64)
    except (ValueError, OverflowError):
        raise UnfitIndexError("offsets or sizes are not numbers") from None
    if np.any(offsets < BLOCK) or np.any(offsets % BLOCK) or np.any(sizes < 0):
        raise UnfitIndexError("offsets or sizes that no tar file has")
    with tar.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        # Not offsets + sizes: the sum of two numbers from a file may overflow.
        whole = (offsets <= total) & (sizes <= total - np.minimum(offsets, total))
        kept = np.flatnonzero(whole)
        for number in np.unique(np.linspace(0, max(len(kept) - 1, 0), _PROBED).astype(np.int64)) if len(kept) else ():
            _check_header(file.fileno(), int(offsets[kept[number]]), int(sizes[kept[number]]))
    lost = len(offsets) - len(kept)
    problem = f"cut off: {lost:,} of {len(offsets):,} members of its index are missing" if lost else ""
    return TarMembers([fields[4 * number + 3] for number in kept], offsets[kept], sizes[kept], problem)


def _check_header(descriptor: int, offset: int, size: int) -> None:
    try:
        header = tarfile.TarInfo.frombuf(os.pread(descriptor, BLOCK, offset - BLOCK), "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise UnfitIndexError(f"no member ends its header at byte {offset:,} ({error})") from None
    if header.size != size:
        raise UnfitIndexError(f"the member at byte {offset:,} has {header.size:,} bytes, not {size:,}")


def format_index(names: list[bytes], offsets: np.ndarray, sizes: np.ndarray) -> bytes:
    """Content of an index file. White space in names, which the format cannot hold, becomes `%20`."""
    samples: list[list[bytes]] = []
    last = None
    for name, offset, size in zip(names, offsets.tolist(), sizes.tolist(), strict=True):
        folder, slash, base = name.rpartition(b"/")
        stem, _, ending = base.partition(b".")
        if not stem:
            continue  # hidden files are no samples
        field = b"%s %d %d %s" % (b"%20".join(ending.split()) or b"-", offset, size, b"%20".join(name.split()))
        if (folder, slash, stem) == last:
            samples[-1].append(field)
        else:
            samples.append([field])
        last = (folder, slash, stem)
    return b"%s %d\n" % (_VERSION, len(samples)) + b"".join(b" ".join(sample) + b"\n" for sample in samples)
