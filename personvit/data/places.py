"""Which files a `data.root` means that is not a plain folder of images: databases and tar shards."""

from __future__ import annotations

import glob
import logging
import math
import os
import re
from itertools import product
from pathlib import Path

from personvit.data.decode import EXTENSIONS
from personvit.errors import DataError

logger = logging.getLogger(__name__)

KEYS_FILE = "keys.pkl"

_MAX_SHARDS = 1 << 20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_lmdb(root: Path) -> Path | None:
    """The database file that `root` means, or None."""
    if root.is_file():
        return root if root.suffix == ".mdb" else None
    for file in (root / "data.mdb", root / "lmdb" / "data.mdb"):
        if file.is_file():
            return file
    others = [file for file in root.glob("*.mdb") if file.name != "lock.mdb"] if (root / KEYS_FILE).is_file() else []
    return others[0] if len(others) == 1 else None


def find_shards(root: str | Path) -> list[Path]:
    """Tar files that `root` means, sorted within a folder, in the order written for braces.

    Raises:
        DataError: none, or one that is missing.
    """
    text = os.path.expanduser(root)
    if os.path.isdir(text):
        found = _shards_of_folder(Path(text))
        if not found:
            raise DataError(f"data.root={root}: no .tar file in this folder. Was the right folder given?")
        return found
    if os.path.isfile(text):
        return [Path(text)]
    expanded = _expand_braces(text)
    shards = [
        Path(path)
        for pattern in expanded
        for path in (sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern])
    ]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing or not shards:
        what = (
            f"{len(missing)} of {len(shards)} tar files are missing (first: {missing[0]})"
            if missing
            else "no such tar file"
        )
        raise DataError(f"data.root={root}: {what}. Check the path (ls).")
    return shards


def is_shards(root: str | Path) -> bool:
    """Whether `root` names tar files: one, a pattern ending in .tar, or a folder with tar files and no image or folder.

    Downloads often leave an archive beside the folder that was unpacked from it: that is not a folder of shards.
    """
    text = os.path.expanduser(root)
    if not os.path.isdir(text):
        return text.endswith(".tar")
    found = False
    try:
        with os.scandir(text) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() or entry.name.lower().endswith(EXTENSIONS):
                    return False
                found |= entry.name.endswith(".tar")
    except OSError:
        return False  # whoever lists the folder in earnest says what is wrong with it
    return found


def _shards_of_folder(folder: Path) -> list[Path]:
    """Links that leave the folder are skipped, as in a folder of images; name such shards by a pattern."""
    inside = os.path.realpath(folder).rstrip(os.sep) + os.sep
    found = sorted(path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    kept = [path for path in found if os.path.realpath(path).startswith(inside)]
    if len(kept) < len(found):
        logger.warning("%s: skipped %d links out of the folder", folder, len(found) - len(kept))
    return kept


def _expand_braces(text: str) -> list[str]:
    """`a{1,2}{00..02}` -> a100, a101, a102, a200 ... Numbers keep the width of the first one."""
    choices: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(text):
        span = _RANGE.fullmatch(match[1])
        if span:
            last = min(int(span[2]), int(span[1]) + _MAX_SHARDS)
            names = [str(number).zfill(len(span[1])) for number in range(int(span[1]), last + 1)]
        else:
            names = match[1].split(",")
        choices += [[text[end : match.start()]], names]
        end = match.end()
    if math.prod(map(len, choices)) > _MAX_SHARDS:
        raise DataError(
            f"data.root={text}: the braces name more than {_MAX_SHARDS:,} files. Is a digit too many in them?"
        )
    return ["".join(parts) for parts in product(*choices, [text[end:]])]
