"""Any source of images -> tar shards with indexes, and a manifest that says what is in them and with which checksums.

The bytes of a shard depend on the images, their order and the size asked for alone: not on the number of workers, nor
on interruptions. Workers read, verify and wrap the images; this process cuts them into shards and writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from personvit.data.decode import decode_image, ending_of
from personvit.data.manifest import BAD_IMAGES, MANIFEST, Manifest, ShardEntry, broken_shards, foreign_files
from personvit.data.parallel import ordered_map
from personvit.data.shard_index import BLOCK, format_index, index_path
from personvit.data.sources import ImageSource
from personvit.errors import DataError

logger = logging.getLogger(__name__)

_CHUNK = 64  # images of a piece of work
_END = b"\0" * (2 * BLOCK)
_LABEL = 80  # characters; with number and ending well below the 100 that the header has for a name

_source: ImageSource  # of this worker process
_verify: bool


@dataclass(frozen=True)
class _Wrapped:
    """The images of one chunk as they will lie in a tar file.

    Attributes:
        blob: headers and padded contents.
        starts: [n + 1] int64, where each header starts in the blob; the last: its length.
        sizes: [n] int64, bytes of the contents.
        names: of the members.
        indices: [n], which images of the source these are.
        bad: (index, path, reason) of those left out.
        stop: the first image of the next chunk.
    """

    blob: bytes
    starts: np.ndarray
    sizes: np.ndarray
    names: list[bytes]
    indices: list[int]
    bad: list[tuple[int, str, str]]
    stop: int


def pack(source: ImageSource, out: Path, shard_mib: int, workers: int, verify: bool = True) -> Manifest:
    """Write shards, or finish what an interrupted call began. Shards that are there and whole are kept.

    Args:
        source: images.
        out: folder; it is made, or is empty, or holds what an earlier call for the same source wrote.
        shard_mib: MiB that a shard has at most (more only where a single image is larger).
        workers: processes beside this one; 0: none.
        verify: decode every image; those that cannot be decoded are left out and listed in bad_images.txt.

    Raises:
        DataError: `out` holds something else, another source or other settings; another call is writing there; or no
            image can be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        manifest = _begin(source, out, shard_mib, verify)
        for number, problem in broken_shards(out, manifest, workers).items():
            entry = manifest.shards[number]
            logger.warning("%s: %s; written again", out, problem)
            fresh = _Cutter(out, number, entry.first, limit=None)
            for _ in _fill(source, fresh, range(entry.first, entry.last), workers, verify):
                pass
            manifest.shards[number] = fresh.close(entry.last)
            manifest.write(out)
        if not manifest.complete:
            _write_rest(source, out, manifest, workers, verify)
        for part in out.glob("*.part"):
            part.unlink()
    return manifest


def _begin(source: ImageSource, out: Path, shard_mib: int, verify: bool) -> Manifest:
    wanted = Manifest.describe(source, shard_mib, verify)
    if not (out / MANIFEST).exists():
        if any(out.iterdir()):
            raise DataError(
                f"{out}: not empty, and no {MANIFEST} says that an earlier call wrote it. Give a new folder; nothing "
                f"was changed."
            )
        wanted.write(out)
        return wanted
    found = Manifest.read(out)
    foreign = foreign_files(out, found)
    if foreign:
        raise DataError(f"{out}: holds {foreign[0]}, which no pack wrote. Move it away, or give a new folder.")
    differences = wanted.differences(found)
    if differences:
        raise DataError(
            f"{out}: was begun with other contents or settings ({'; '.join(differences)}). Give a new folder, or the "
            f"same arguments as before."
        )
    return found


def _write_rest(source: ImageSource, out: Path, manifest: Manifest, workers: int, verify: bool) -> None:
    first = manifest.shards[-1].last if manifest.shards else 0
    if first:
        logger.info("%s: %d shards are whole, going on with image %d", out, len(manifest.shards), first)
    cutter = _Cutter(out, len(manifest.shards), first, limit=manifest.shard_mib << 20)
    for entry in _fill(source, cutter, range(first, len(source)), workers, verify):
        manifest.shards.append(entry)
        manifest.write(out)
    if cutter.records:
        manifest.shards.append(cutter.close(len(source)))
    else:
        bad = cutter.abandon()
        if not manifest.shards:
            reason = bad[0][2] if bad else "there is none"
            raise DataError(f"none of {len(source):,} images can be read (first: {reason}). Are these images?")
        manifest.shards[-1] = manifest.shards[-1].extended(bad, len(source))
    left_out = [entry for shard in manifest.shards for entry in shard.bad]
    if left_out:
        lines = (f"{_one_line(path)}\t{_one_line(reason)}\n" for _, path, reason in left_out)
        (out / BAD_IMAGES).write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    manifest.complete = True
    manifest.write(out)


def _fill(source: ImageSource, cutter: _Cutter, images: range, workers: int, verify: bool) -> Iterator[ShardEntry]:
    """Feed images to a cutter; yields the shards that become full."""
    pieces = (range(first, min(first + _CHUNK, images.stop)) for first in range(images.start, images.stop, _CHUNK))
    with tqdm(total=len(source), initial=images.start, desc="packing", unit=" images", disable=None) as bar:
        for wrapped in ordered_map(_wrap, pieces, workers, _open, (source, verify)):
            yield from cutter.add(wrapped)
            bar.update(wrapped.stop - bar.n)


class _Cutter:
    """Appends wrapped images to a shard, and begins the next one where an image would exceed the limit.

    Args:
        out: folder.
        number: of the first shard.
        first: its first image.
        limit: bytes of a shard; None: all in one.
    """

    def __init__(self, out: Path, number: int, first: int, limit: int | None) -> None:
        self._out, self._number, self._limit = out, number, limit
        self._bad: list[tuple[int, str, str]] = []
        self._begin(first)

    def _begin(self, first: int) -> None:
        self._first = first
        self._name = f"shard-{self._number:06}.tar"
        self._file = (self._out / f"{self._name}.part").open("wb")
        self._sha256 = hashlib.sha256()
        self._written = 0
        self._names: list[bytes] = []
        self._offsets: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self._sizes: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]

    def add(self, wrapped: _Wrapped) -> Iterator[ShardEntry]:
        """Append images; yields the shards that this closed."""
        self._bad += wrapped.bad
        begin, count = 0, len(wrapped.sizes)
        while begin < count:
            end = count
            if self._limit is not None:
                room = self._limit - len(_END) - self._written + wrapped.starts[begin]
                end = int(np.searchsorted(wrapped.starts, room, side="right")) - 1
                end = max(end, begin if self._names else begin + 1)
            self._append(wrapped, begin, min(end, count))
            begin = min(end, count)
            if begin < count:
                yield self.close(wrapped.indices[begin])
                self._number += 1
                self._begin(wrapped.indices[begin])

    def _append(self, wrapped: _Wrapped, begin: int, end: int) -> None:
        starts = wrapped.starts[begin : end + 1]
        self._write(wrapped.blob[starts[0] : starts[-1]])
        self._offsets.append(self._written - starts[-1] + starts[:-1] + BLOCK)
        self._sizes.append(wrapped.sizes[begin:end])
        self._names += wrapped.names[begin:end]

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._written += len(data)

    def close(self, last: int) -> ShardEntry:
        """End the shard before image `last` of the source, and give the whole files their names."""
        self._write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = format_index(self._names, np.concatenate(self._offsets), np.concatenate(self._sizes))
        tar = self._out / self._name
        part = self._out / f"{index_path(tar).name}.part"
        part.write_bytes(index)
        part.replace(index_path(tar))
        Path(self._file.name).replace(tar)
        inside = [entry for entry in self._bad if entry[0] < last]
        self._bad = self._bad[len(inside) :]
        return ShardEntry(
            name=self._name,
            sha256=self._sha256.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            bytes=self._written,
            records=len(self._names),
            first=self._first,
            last=last,
            bad=inside,
        )

    @property
    def records(self) -> int:
        """Images in the shard under way."""
        return len(self._names)

    def abandon(self) -> list[tuple[int, str, str]]:
        """Drop the shard under way; gives the images that were left out since the last one was closed."""
        self._file.close()
        Path(self._file.name).unlink()
        return self._bad


def _open(source: ImageSource, verify: bool) -> None:
    global _source, _verify
    _source, _verify = source, verify


def _wrap(images: range) -> _Wrapped:
    parts: list[bytes] = []
    names: list[bytes] = []
    starts, sizes, indices = [0], [], []
    bad: list[tuple[int, str, str]] = []
    for index in images:
        path = _source.path(index)
        try:
            data = _source.read(index)
            ending = ending_of(data)
            if _verify:
                decode_image(data, path)
            if ending is None:
                raise DataError(f"{path}: neither JPEG, PNG, BMP nor WebP, whatever its name says")
        except DataError as error:
            bad.append((index, path, str(error)))
            continue
        name = _member_name(index, path, ending)
        padding = -len(data) % BLOCK
        parts += [_header(name, len(data)), data, b"\0" * padding]
        starts.append(starts[-1] + BLOCK + len(data) + padding)
        sizes.append(len(data))
        names.append(name)
        indices.append(index)
    return _Wrapped(
        b"".join(parts), np.array(starts), np.array(sizes, dtype=np.int64), names, indices, bad, images.stop
    )


def _member_name(index: int, path: str, ending: str) -> bytes:
    """Number and old base name, in ASCII, without white space or a second dot: what tools take for name and ending."""
    stem = quote(os.fsencode(PurePath(path).stem), safe="").replace(".", "%2E")
    return f"{index:09}_{stem[-_LABEL:]}{ending}".encode("ascii")


def _blank_header() -> bytes:
    fields = (
        b"\0" * 100,  # name
        b"0000644\0" + b"0000000\0" * 2,  # mode, owner, group
        b"\0" * 12 + b"00000000000\0",  # size, time
        b" " * 8 + b"0" + b"\0" * 100,  # checksum, regular file, no link
        b"ustar\x0000" + b"\0" * 64 + b"0000000\0" * 2,  # names of owner and group, device
    )
    return b"".join(fields).ljust(BLOCK, b"\0")


_BLANK = _blank_header()
_BLANK_SUM = sum(_BLANK)


def _header(name: bytes, size: int) -> bytes:
    """A ustar header. tarfile makes the same one in ten times the time, and would be half of the work."""
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (_BLANK_SUM + sum(name) + sum(digits))
    return b"".join((name.ljust(100, b"\0"), _BLANK[100:124], digits, _BLANK[136:148], checksum, _BLANK[156:]))


def _one_line(text: str) -> str:
    return " ".join(text.split())


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second call out of the folder."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network storage may not know locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{out}: another pack is writing there. Wait for it, or give a new folder.") from None
        yield
    finally:
        os.close(descriptor)
