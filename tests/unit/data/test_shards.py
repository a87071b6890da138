from __future__ import annotations

import io
import logging
import multiprocessing
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from personvit.config import DataConfig
from personvit.data.shard_index import read_index, scan_tar
from personvit.data.shards import ShardSource
from personvit.data.sources import FolderSource, open_source
from personvit.errors import DataError


@pytest.fixture
def jpegs(make_images):
    return [path.read_bytes() for path in sorted(make_images(6).iterdir())]


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def names(source: ShardSource) -> list[str]:
    return [os.path.relpath(source.path(index), os.path.dirname(source.shards[0])) for index in range(len(source))]


def test_images_of_all_shards_in_order(tmp_path, jpegs):
    write_tar(tmp_path / "s" / "b.tar", [("3.jpg", jpegs[3])])
    write_tar(
        tmp_path / "s" / "a.tar",
        [("0.jpg", jpegs[0]), ("0.json", b"{}"), ("dir/ü x.JPG", jpegs[1]), (".hid.jpg", b"x"), ("n.txt", b"text")],
    )
    (tmp_path / "s" / "notes.txt").touch()
    source = open_source(DataConfig(root=str(tmp_path / "s")))
    assert isinstance(source, ShardSource)
    assert names(source) == ["a.tar/0.jpg", "a.tar/dir/ü x.JPG", "b.tar/3.jpg"]
    assert [source.read(index) for index in range(3)] == [jpegs[0], jpegs[1], jpegs[3]]
    assert source.load(1).size == (24, 48)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source.read(index)


def test_a_missing_index_is_written_once_as_dali_writes_it(tmp_path, jpegs):
    wds2idx = Path(sys.executable).with_name("wds2idx")
    tar = write_tar(
        tmp_path / "a.tar",
        [("x/0.jpg", jpegs[0]), ("x/0.cls", b"1"), ("x/1.seg.png", jpegs[1]), ("y/1.jpg", jpegs[2]), ("x/.h", b"")],
    )
    ShardSource(tar)
    written = (tmp_path / "a.idx").read_text()
    assert written.splitlines()[0] == "v1.2 3"
    assert written.splitlines()[1].startswith("jpg 512 ")
    members = read_index(tar)
    assert members.names == [b"x/0.jpg", b"x/0.cls", b"x/1.seg.png", b"y/1.jpg"]
    stamp = os.stat(tmp_path / "a.idx").st_mtime_ns
    assert ShardSource(tar).read(2) == jpegs[2]
    assert os.stat(tmp_path / "a.idx").st_mtime_ns == stamp
    assert not list(tmp_path.glob("*.part"))
    if wds2idx.is_file():  # DALI is installed
        subprocess.run([wds2idx, tar, tmp_path / "dali.idx"], check=True, capture_output=True)
        assert (tmp_path / "dali.idx").read_text() == written


def test_an_index_that_cannot_be_written_stays_in_memory(tmp_path, jpegs, caplog, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", jpegs[0])])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with caplog.at_level(logging.INFO):
        assert ShardSource(tar).read(0) == jpegs[0]
    assert "not written (Permission denied)" in caplog.text
    assert [path.name for path in tmp_path.glob("a*")] == ["a.tar"]


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"v1.1 1\njpg 512 10\n",
        b"v1.2 1\njpg 512 x 0.jpg\n",
        b"v1.2 2\njpg 512 10 0.jpg\n",
        b"v1.2 1\njpg 512 10 0.jpg\n",  # another size
        b"v1.2 1\njpg 1024 10 0.jpg\n",  # no header there
        b"v1.2 1\njpg -512 10 0.jpg\n",
        b"v1.2 1\njpg 512 99999999999999999999 0.jpg\n",
        b"v1.2 1\njpg 512 10 a b.jpg\n",
    ],
)
def test_an_unfit_index_is_replaced_in_memory_and_left_alone(tmp_path, jpegs, caplog, index):
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", jpegs[0]), ("1.jpg", jpegs[1])])
    (tmp_path / "a.idx").write_bytes(index)
    source = ShardSource(tar)
    assert [source.read(0), source.read(1)] == jpegs[:2]
    assert "indexed by its tar file instead" in caplog.text
    assert (tmp_path / "a.idx").read_bytes() == index


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("where", ["content", "header", "end"])
def test_a_tar_cut_in_the_middle_gives_its_whole_images_and_is_reported(tmp_path, jpegs, caplog, with_index, where):
    tar = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", jpeg) for number, jpeg in enumerate(jpegs)])
    places = scan_tar(tar)
    if with_index:
        ShardSource(tar)
    last = int(places.offsets[4])
    cut = {"content": last + 100, "header": last - 200, "end": last - 512}[where]
    os.truncate(tar, cut)
    source = ShardSource(tar)
    assert [source.read(index) for index in range(len(source))] == jpegs[:4]
    assert "cut off" in source.problems[str(tar)]
    assert "its 4 whole images count" in caplog.text
    assert (tmp_path / "a.idx").exists() == with_index  # no index of half a file is left behind


def test_damage_in_a_header_ends_the_shard(tmp_path, jpegs):
    tar = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", jpeg) for number, jpeg in enumerate(jpegs)])
    place = int(scan_tar(tar).offsets[2]) - 512
    content = bytearray(tar.read_bytes())
    content[place : place + 300] = b"\xff" * 300
    tar.write_bytes(content)
    source = ShardSource(tar)
    assert len(source) == 2
    assert "damaged" in source.problems[str(tar)]


def test_a_tar_cut_while_it_is_in_use(tmp_path, jpegs):
    tar = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", jpeg) for number, jpeg in enumerate(jpegs)])
    source = ShardSource(tar)
    os.truncate(tar, 1000)
    with pytest.raises(DataError, match=r"a\.tar/5\.jpg: cannot be read"):
        source.read(5)


def test_only_regular_members_count_and_names_are_labels(tmp_path, jpegs):
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{ord(kind[:1])}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    long = "d" * 150 + "/" + "é" * 80 + ".jpg"
    with tarfile.open(tar, "a", format=tarfile.PAX_FORMAT) as archive:
        for name, jpeg in (
            ("../../escape.jpg", jpegs[0]),
            ("/abs.jpg", jpegs[1]),
            (long, jpegs[2]),
            ("d.jpg", jpegs[3]),
            ("d.jpg", jpegs[4]),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg)
            archive.addfile(info, io.BytesIO(jpeg))
    before = sorted(tmp_path.parent.iterdir())
    source = ShardSource(tar)
    assert [source.read(index) for index in range(len(source))] == jpegs[:5]  # duplicate names are two images
    assert source.path(0) == f"{tar}/../../escape.jpg"
    assert sorted(tmp_path.parent.iterdir()) == before


@pytest.mark.parametrize(
    "pattern", ["s-{000..002}.tar", "s-{000,001,002}.tar", "s-*.tar", "s-00{0..2}.tar", "{s,s}-00[0-2].tar"]
)
def test_lists_by_braces_and_stars(tmp_path, jpegs, pattern):
    for number in range(3):
        write_tar(tmp_path / f"s-{number:03}.tar", [("0.jpg", jpegs[number])])
    source = open_source(DataConfig(root=str(tmp_path / pattern)))
    expected = jpegs[:3] * (2 if pattern.startswith("{") else 1)
    assert [source.read(index) for index in range(len(source))] == expected


def test_missing_shards_are_counted(tmp_path, jpegs):
    write_tar(tmp_path / "s-0.tar", [("0.jpg", jpegs[0])])
    with pytest.raises(DataError, match=r"2 of 3 tar files are missing \(first: .*s-1\.tar"):
        ShardSource(tmp_path / "s-{0..2}.tar")
    with pytest.raises(DataError, match="no such tar file"):
        ShardSource(tmp_path / "t-*.tar")
    with pytest.raises(DataError, match="more than"):
        ShardSource(tmp_path / "s-{0..99999}{0..99999}.tar")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not a tar file"), (b"no tar" * 200, "not a tar file"), (b"\x1f\x8b" + b"x" * 600, "compressed")],
)
def test_what_is_no_tar(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ShardSource(tmp_path / "a.tar")


def test_tar_without_images(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"text")])
    with pytest.raises(DataError, match="no image in 1 tar files"):
        ShardSource(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.tar file"):
        open_source(DataConfig(name="shards", root=str(tmp_path / "empty")))


def test_links_out_of_a_folder_of_shards_are_skipped(tmp_path, jpegs, caplog):
    write_tar(tmp_path / "s" / "a.tar", [("0.jpg", jpegs[0])])
    (tmp_path / "s" / "b.tar").symlink_to(write_tar(tmp_path / "out.tar", [("1.jpg", jpegs[1])]))
    assert len(ShardSource(tmp_path / "s")) == 1
    assert "skipped 1 links" in caplog.text


def test_an_archive_beside_its_images_does_not_hide_them(tmp_path, jpegs, make_images):
    folder = make_images(2)
    write_tar(folder / "images.tar", [("0.jpg", jpegs[0])])
    assert isinstance(open_source(DataConfig(root=str(folder))), FolderSource)
    write_tar(folder.parent / "images.tar", [("0.jpg", jpegs[0])])
    assert isinstance(open_source(DataConfig(root=str(folder.parent))), FolderSource)


def _read(source: ShardSource, index: int) -> bytes:
    return source.read(index)


@pytest.mark.parametrize(
    "method", ["spawn", pytest.param("fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="no fork"))]
)
def test_the_source_travels_to_other_processes(tmp_path, jpegs, method):
    source = ShardSource(write_tar(tmp_path / "a.tar", [("0.jpg", jpegs[0]), ("1.jpg", jpegs[1])]))
    assert source.read(0) == jpegs[0]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_read, (source, 1)) == jpegs[1]
    assert source.read(1) == jpegs[1]


def test_descriptors_are_bounded_and_given_back(tmp_path, jpegs, monkeypatch):
    monkeypatch.setattr("personvit.data.shards._MAX_OPEN", 2)
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", [("0.jpg", jpegs[number])])
    source = ShardSource(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [source.read(index) for index in range(4)] == jpegs[:4]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del source
    assert len(os.listdir("/proc/self/fd")) == before
