"""manifest.json of packed shards: which images of which source each holds, and the checksums."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from personvit.data.shard_index import index_path
from personvit.data.sources import ImageSource
from personvit.errors import DataError

MANIFEST = "manifest.json"
BAD_IMAGES = "bad_images.txt"

_FORMAT = "personvit shards 1"
_NAME = re.compile(r"shard-\d{6,}\.tar")
_DIGESTED = 1 << 20  # bytes


@dataclass(frozen=True)
class ShardEntry:
    """One shard.

    Attributes:
        name: of the tar file, in the folder of the manifest.
        sha256: of the tar file.
        index_sha256: of its index.
        bytes: of the tar file.
        records: images in it.
        first: its first image of the source.
        last: the first image of the source after it.
        bad: (number, path, reason) of images of the source in this span that were left out.
    """

    name: str
    sha256: str
    index_sha256: str
    bytes: int
    records: int
    first: int
    last: int
    bad: list[tuple[int, str, str]]

    def extended(self, bad: list[tuple[int, str, str]], last: int) -> ShardEntry:
        """The entry with more left-out images at its end."""
        return replace(self, bad=self.bad + bad, last=last)

    def problem(self, folder: Path) -> str:
        """What is wrong with the files of this shard; empty: nothing."""
        tar = folder / self.name
        for file, expected in ((tar, self.sha256), (index_path(tar), self.index_sha256)):
            try:
                size = file.stat().st_size
                if file == tar and size != self.bytes:
                    return f"{file.name}: {size:,} bytes instead of {self.bytes:,}"
                if file_digest(file) != expected:
                    return f"{file.name}: the checksum (SHA-256) differs"
            except OSError as error:
                return f"{file.name}: cannot be read ({error.strerror})"
        return ""


@dataclass
class Manifest:
    """What a folder of packed shards holds.

    Attributes:
        source: kind and root of the images.
        images: number of images of the source.
        names_digest: of all their paths, in order.
        shard_mib: size that was asked for.
        verified: whether every image was decoded.
        complete: whether all shards are written.
        shards: in order.
    """

    source: str
    images: int
    names_digest: str
    shard_mib: int
    verified: bool
    complete: bool = False
    shards: list[ShardEntry] = field(default_factory=list)

    @classmethod
    def describe(cls, source: ImageSource, shard_mib: int, verified: bool) -> Manifest:
        """A manifest without shards."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(len(source)):
            digest.update(source.path(index).encode("utf-8", "surrogateescape") + b"\0")
        kind = f"{type(source).__name__} {getattr(source, 'root', '')}".strip()
        return cls(kind, len(source), digest.hexdigest(), shard_mib, verified)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            DataError: there is none, or it is damaged, of another kind, or names files outside the folder.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT:
                raise ValueError("of another format")
            shards = [_entry(item) for item in content.pop("shards")]
            return cls(**content, shards=shards)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}). Is this a folder of packed shards?") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: damaged, or not the manifest of packed shards ({error}). Pack again into a new folder."
            ) from None

    def write(self, folder: Path) -> None:
        """Replace the manifest of a folder in one go."""
        part = folder / f"{MANIFEST}.part"
        content = {"format": _FORMAT, **asdict(self)}
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / MANIFEST)

    def differences(self, found: Manifest) -> list[str]:
        """How the plan of a manifest that was found differs from this one."""
        names = {"source": "source", "images": "images", "shard_mib": "MiB a shard", "verified": "verification"}
        told = [
            f"{label}: {getattr(found, name)} there, {getattr(self, name)} now"
            for name, label in names.items()
            if getattr(found, name) != getattr(self, name)
        ]
        return told or (["the images have other names"] if found.names_digest != self.names_digest else [])


def check_shards(folder: Path, workers: int) -> tuple[Manifest, list[str]]:
    """Compare every file of packed shards with its checksum.

    Args:
        folder: with manifest.json.
        workers: threads.

    Returns:
        The manifest, and what is wrong (nothing: empty).

    Raises:
        DataError: no manifest, or a damaged one.
    """
    manifest = Manifest.read(folder)
    problems = list(broken_shards(folder, manifest, workers).values())
    if not manifest.complete:
        problems.append("the last shards are missing: packing was interrupted")
    return manifest, problems


def broken_shards(folder: Path, manifest: Manifest, workers: int) -> dict[int, str]:
    """Number of a shard -> what is wrong with its files, by size and checksum."""
    with ThreadPoolExecutor(max(1, workers)) as pool:  # hashing and reading release the interpreter lock
        results = pool.map(lambda entry: entry.problem(folder), manifest.shards)
        bar = tqdm(results, "checking shards", len(manifest.shards), unit=" shards", disable=None, leave=False)
        return {number: problem for number, problem in enumerate(bar) if problem}


def foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of what lies in a folder of shards and is not of them. A shard may be newer than the manifest."""
    ours = {MANIFEST, BAD_IMAGES}
    known = re.compile(rf"({_NAME.pattern}|shard-\d{{6,}}\.idx|{re.escape(MANIFEST)})(\.part)?")
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in ours and (known.fullmatch(entry.name) is None or not entry.is_file())
    )


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_DIGESTED):
            digest.update(block)
    return digest.hexdigest()


def _entry(item: dict[str, Any]) -> ShardEntry:
    """An entry of the file, with nothing in it that could lead out of the folder."""
    expected = {entry.name for entry in fields(ShardEntry)}
    if set(item) != expected or _NAME.fullmatch(item["name"]) is None:
        raise ValueError(f"entry {item.get('name')!r}")
    bad = [(int(number), str(path), str(reason)) for number, path, reason in item["bad"]]
    return ShardEntry(**{**item, "bad": bad})
