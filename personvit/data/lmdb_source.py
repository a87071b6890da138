"""Images in an LMDB database: raw image files as values, such as LUPerson is handed out."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from PIL import Image

from personvit.data.decode import decode_image
from personvit.data.path_sources import PathTable
from personvit.data.places import KEYS_FILE, find_lmdb
from personvit.errors import DataError

logger = logging.getLogger(__name__)

_PROBED = 16

_Identity = tuple[int, int]  # device and inode: what LMDB itself tells files apart by
_environments: dict[_Identity, tuple[int, lmdb.Environment]] = {}  # file -> (process, environment)
_opening = threading.Lock()


class LmdbSource:
    """The records that `keys.pkl` names, in its order; without it every record, in the order of the keys.

    The database is opened in each process when it first reads: read-only, without lock and readahead. Sources of one
    process share it. `keys.pkl` is a pickled list of keys, or a dictionary with such a list under `keys`; nothing in
    it is executed. A key that the database lacks is an error of that record alone.

    Attributes:
        root: the database file.

    Args:
        root: folder with `data.mdb` (or one other `.mdb` file, or a folder `lmdb` with `data.mdb`), or the file.

    Raises:
        DataError: no database, damaged or cut short, `keys.pkl` is not a list of keys, or none of its keys fits.
    """

    def __init__(self, root: str | Path) -> None:
        file = find_lmdb(Path(root))
        if file is None:
            raise DataError(
                f"data.root={root}: no LMDB database (data.mdb, or one .mdb file). Give the folder that holds data.mdb "
                f"and {KEYS_FILE}, or unpack the archive first."
            )
        self.root = os.path.realpath(file)
        status = os.stat(self.root)
        self._identity = (status.st_dev, status.st_ino)
        keys_file = _find_keys(file)
        if keys_file is None:
            logger.warning(
                "%s: no %s beside it: taking every record of the database, in the order of its keys", file, KEYS_FILE
            )
            self._keys = PathTable(_all_keys(self._environment()))
        else:
            self._keys = PathTable(read_keys(keys_file))
        if not len(self._keys):
            raise DataError(f"{keys_file or file}: no key in it. Is the copy complete?")
        self._probe(keys_file or file)

    def __len__(self) -> int:
        return len(self._keys)

    def path(self, index: int) -> str:
        """Database file and key of image `index`."""
        return f"{self.root}/{self._keys[index]}"

    def read(self, index: int) -> bytes:
        """Value of image `index`.

        Raises:
            DataError: the database lacks the key, or is damaged there.
        """
        key = self._keys.raw(index)
        try:
            with self._environment().begin() as transaction:
                value = transaction.get(key)
        except lmdb.Error as error:  # a damaged page, or a key that LMDB does not accept (empty, too long)
            raise DataError(f"{self.path(index)}: cannot be read ({error})") from None
        if value is None:
            raise DataError(f"{self.path(index)}: cannot be read (the database has no such key)")
        return bytes(value)

    def load(self, index: int) -> Image.Image:
        """Decode image `index` wholly, as RGB (see `decode_image`)."""
        return decode_image(self.read(index), self.path(index))

    def _environment(self) -> lmdb.Environment:
        return _environment(self._identity, self.root)

    def _probe(self, origin: Path) -> None:
        """Fail at once if the keys are those of another database."""
        places = np.unique(np.linspace(0, len(self) - 1, _PROBED).astype(np.int64))
        for index in places:
            try:
                self.read(int(index))
                return
            except DataError as error:
                last = error
        raise DataError(f"{origin}: none of {len(places)} keys tried can be read: {last}. Do the two files fit?")


def _find_keys(database: Path) -> Path | None:
    """LUPerson's loader has `keys.pkl` beside the database's folder, its converter's users put it inside."""
    folders = (database.parent, database.parent.parent) if database.name == "data.mdb" else (database.parent,)
    return next((folder / KEYS_FILE for folder in folders if (folder / KEYS_FILE).is_file()), None)


def read_keys(file: Path) -> Iterator[bytes]:
    """Keys of a `keys.pkl`, without executing what it holds.

    Raises:
        DataError: not a pickle, a pickle of anything but builtin containers, text, bytes and numbers, or no list of
            keys.
    """
    try:
        with file.open("rb") as stream:
            content = _Unpickler(stream, encoding="latin-1").load()
    except DataError:
        raise
    # Damaged pickles raise nearly anything: UnpicklingError, EOFError, ValueError, IndexError, KeyError, MemoryError
    except Exception as error:
        raise DataError(
            f"{file}: cannot be read as a list of keys ({type(error).__name__}: {error}). Copy it again, or take it "
            f"away: the keys are then listed from the database."
        ) from None
    keys = content.get("keys") if isinstance(content, dict) else content
    if not isinstance(keys, (list, tuple)):
        raise DataError(
            f"{file}: holds a {type(content).__name__} without a list of keys. Expected: a list of keys, or a "
            f"dictionary with such a list under 'keys'."
        )
    return _encoded(file, keys)


def _encoded(file: Path, keys: Iterable[Any]) -> Iterator[bytes]:
    for number, key in enumerate(keys):
        if not isinstance(key, (str, bytes)):
            raise DataError(f"{file}: key {number} is a {type(key).__name__} ({key!r:.80}); keys are text or bytes.")
        yield key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key


class _Unpickler(pickle.Unpickler):
    """Refuses every class and function by name, so that a file from elsewhere cannot run anything."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what old protocols spell bytes with."""
        if (module, name) == ("_codecs", "encode"):
            return _encode_text
        raise DataError(
            f"{KEYS_FILE} asks for {module}.{name}: a list of keys needs no code, so nothing of it was run. Do not "
            f"use this file; take it away and the keys are listed from the database."
        )

    def persistent_load(self, pid: Any) -> Any:
        """There is nothing outside the file."""
        raise DataError(f"{KEYS_FILE} refers to objects outside itself. It is not a list of keys.")


def _encode_text(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise DataError(f"{KEYS_FILE}: not a list of keys.")
    return text.encode("latin-1")


def _environment(identity: _Identity, file: str) -> lmdb.Environment:
    """This process's environment of a database file, opened when first asked for.

    LMDB refuses to open a file twice in one process, and a forked process inherits the mark (and must not use the
    environment itself): there it is closed first.
    """
    known = _environments.get(identity)
    if known is not None and known[0] == os.getpid():
        return known[1]
    with _opening:
        known = _environments.pop(identity, None)
        if known is not None and known[0] == os.getpid():
            _environments[identity] = known
            return known[1]
        if known is not None:
            known[1].close()
        environment = _open(file)
        _environments[identity] = (os.getpid(), environment)
        return environment


def _open(file: str) -> lmdb.Environment:
    try:
        environment = lmdb.open(
            file, subdir=False, readonly=True, lock=False, readahead=False, meminit=False, create=False
        )
    except lmdb.Error as error:
        raise DataError(
            f"{file}: cannot be opened as an LMDB database ({error}). Copied wholly? Compare its size with the "
            f"original (ls -l)."
        ) from None
    # A page beyond the end of the file would end the process with SIGBUS, not with an error.
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if os.path.getsize(file) < needed:
        environment.close()
        raise DataError(
            f"{file}: {os.path.getsize(file):,} bytes, but its pages take {needed:,}: cut short. Copy it again."
        )
    return environment


def _all_keys(environment: lmdb.Environment) -> Iterator[bytes]:
    """Keys in the order of the database. Names in double underscores (`__len__`) are notes of converters."""
    with environment.begin() as transaction, transaction.cursor() as cursor:
        for key in cursor.iternext(keys=True, values=False):
            if not bytes(key).startswith(b"__"):
                yield bytes(key)
