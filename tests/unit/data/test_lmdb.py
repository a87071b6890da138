from __future__ import annotations

import logging
import multiprocessing
import pickle
import sys
from pathlib import Path

import lmdb
import pytest

from personvit.config import DataConfig
from personvit.data.lmdb_source import LmdbSource, read_keys
from personvit.data.sources import open_source
from personvit.errors import DataError

KEYS = ["00_01_0002_00000001", "00_01_0002_00000000", "03_00_0000_00000007"]


@pytest.fixture
def jpegs(make_images):
    return [path.read_bytes() for path in sorted(make_images(3).iterdir())]


def write_database(folder: Path, records: dict[bytes, bytes], subdir: bool = True) -> Path:
    environment = lmdb.open(str(folder), map_size=1 << 24, subdir=subdir)
    with environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key, value)
    environment.close()
    return folder


@pytest.fixture
def database(tmp_path, jpegs):
    return write_database(tmp_path / "lup", dict(zip(map(str.encode, KEYS), jpegs, strict=True)))


@pytest.mark.parametrize(
    "content", [KEYS, {"keys": KEYS, "vids": [0, 0, 1]}, [key.encode() for key in KEYS], tuple(KEYS)]
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_keys_as_list_or_dict_of_text_or_bytes(database, jpegs, content, protocol):
    (database / "keys.pkl").write_bytes(pickle.dumps(content, protocol))
    source = LmdbSource(database)
    assert [source.read(index) for index in range(len(source))] == jpegs  # in the order of the list
    assert source.path(1) == f"{database}/data.mdb/{KEYS[1]}"
    assert source.load(0).size == (24, 48)


def test_auto_finds_every_usual_place(tmp_path, database, jpegs):
    keys = pickle.dumps(KEYS)
    (tmp_path / "keys.pkl").write_bytes(keys)  # beside the folder of the database
    assert len(open_source(DataConfig(root=str(database)))) == 3
    database.rename(tmp_path / "lmdb")
    assert isinstance(open_source(DataConfig(root=str(tmp_path))), LmdbSource)
    (tmp_path / "other").mkdir()
    write_database(tmp_path / "other" / "lup.mdb", {key.encode(): jpegs[0] for key in KEYS}, subdir=False)
    (tmp_path / "other" / "keys.pkl").write_bytes(keys)
    for root in (tmp_path / "other", tmp_path / "other" / "lup.mdb"):
        assert isinstance(open_source(DataConfig(root=str(root))), LmdbSource)
    with pytest.raises(DataError, match="no LMDB database"):
        open_source(DataConfig(name="lmdb", root=str(tmp_path / "nowhere")))


def test_without_keys_file_the_database_is_listed_and_says_so(database, jpegs, caplog):
    write_database(database, {b"__len__": b"3"})
    with caplog.at_level(logging.WARNING):
        source = LmdbSource(database)
    assert "no keys.pkl" in caplog.text
    assert [Path(source.path(index)).name for index in range(len(source))] == sorted(KEYS)
    assert source.read(0) == jpegs[1]


def test_a_key_that_is_missing_is_an_error_of_that_record_alone(database, jpegs):
    (database / "keys.pkl").write_bytes(pickle.dumps([*KEYS[:2], "99_gone", "", "x" * 600, KEYS[2]]))
    source = LmdbSource(database)
    for index in (2, 3, 4):
        with pytest.raises(DataError, match="cannot be read"):
            source.read(index)
    with pytest.raises(DataError, match="99_gone"):
        source.read(2)
    assert source.read(5) == jpegs[2]
    with pytest.raises(IndexError):
        source.read(6)


def test_keys_of_another_database_fail_at_once(database):
    (database / "keys.pkl").write_bytes(pickle.dumps(["a", "b"]))
    with pytest.raises(DataError, match=r"none of 2 keys tried .* fit"):
        LmdbSource(database)


class Runs:
    """A pickle that would run a program where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: ["a", bad], lambda bad: {"keys": ["a"], "x": bad}])
def test_code_in_a_pickle_is_refused_and_not_run(database, tmp_path, wrap):
    marker = tmp_path / "it ran"
    (database / "keys.pkl").write_bytes(pickle.dumps(wrap(Runs(marker))))
    with pytest.raises(DataError, match="needs no code"):
        LmdbSource(database)
    assert not marker.exists()
    pickle.loads((database / "keys.pkl").read_bytes())  # the same file in other hands
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (b"no pickle", "cannot be read as a list of keys"),
        (pickle.dumps(KEYS)[:-20], "cannot be read as a list of keys"),
        (pickle.dumps({"names": KEYS}), "without a list of keys"),
        (pickle.dumps(7), "without a list of keys"),
        (pickle.dumps(["a", 7]), "key 1 is a int"),
        (pickle.dumps([]), "no key in it"),
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    ],
)
def test_damaged_keys_files(database, content, message):
    (database / "keys.pkl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        LmdbSource(database)


def test_bytes_of_old_protocols_are_read_without_their_codec(tmp_path):
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps([b"\xff\x00key"], 1))
    assert list(read_keys(tmp_path / "keys.pkl")) == [b"\xff\x00key"]


@pytest.mark.parametrize("content", [b"", b"junk" * 3000])
def test_not_a_database(tmp_path, content):
    (tmp_path / "x.mdb").write_bytes(content)
    with pytest.raises(DataError, match="cannot be opened as an LMDB database"):
        open_source(DataConfig(root=str(tmp_path / "x.mdb")))


def test_a_database_cut_short_is_told_before_a_page_is_touched(database):
    file = database / "data.mdb"
    file.write_bytes(file.read_bytes()[:-8192])
    with pytest.raises(DataError, match="cut short"):
        LmdbSource(database)


def _read(source: LmdbSource, index: int) -> bytes:
    return source.read(index)


@pytest.mark.parametrize(
    "method", ["spawn", pytest.param("fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="no fork"))]
)
def test_the_source_travels_to_other_processes(database, jpegs, method):
    (database / "keys.pkl").write_bytes(pickle.dumps(KEYS))
    source, twin = LmdbSource(database), LmdbSource(database)  # LMDB itself opens a file once in a process
    assert source.read(0) == twin.read(0) == jpegs[0]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_read, (source, 1)) == jpegs[1]
    assert source.read(2) == jpegs[2]
