from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personvit.config import DataConfig
from personvit.data.__main__ import main
from personvit.data.pack import pack
from personvit.data.shards import ShardSource
from personvit.data.sources import FolderSource, ListSource, open_source
from personvit.errors import ConfigError, DataError

MIB = 1 << 20


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def big_images(tmp_path, write_image):
    """30 images of about 100 kB: three shards of 1 MiB."""
    for number in range(30):
        write_image(tmp_path / "big" / f"{number:02}.jpg", number, size=(290, 400))
    return tmp_path / "big"


def test_round_trip_keeps_bytes_and_order(tmp_path, big_images, write_image):
    write_image(big_images / "00b Ünï 中.x.png", 99)
    source = FolderSource(big_images)
    manifest = pack(source, tmp_path / "out", 1, workers=0)
    packed = open_source(DataConfig(root=str(tmp_path / "out")))
    assert isinstance(packed, ShardSource)
    assert [packed.read(index) for index in range(len(packed))] == [source.read(index) for index in range(len(source))]
    assert packed.path(0).endswith("shard-000000.tar/000000000_00.jpg")
    assert Path(packed.path(1)).name == "000000001_00b%20%C3%9Cn%C3%AF%20%E4%B8%AD%2Ex.png"
    assert len(manifest.shards) == 3
    for shard in manifest.shards:
        assert os.path.getsize(tmp_path / "out" / shard.name) == shard.bytes <= MIB
    assert not packed.problems
    with tarfile.open(packed.shards[0]) as tar:
        member = tar.getmembers()[0]
        assert (member.mtime, member.uid, member.gid, member.mode, member.uname) == (0, 0, 0, 0o644, "")


def test_bytes_do_not_depend_on_workers(tmp_path, big_images):
    for workers in (0, 1, 3):
        pack(FolderSource(big_images), tmp_path / str(workers), 1, workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "3")


def test_long_names_and_duplicates_stay_apart(tmp_path, write_image):
    for name in ("a/x.jpg", "b/x.jpg", f"{'long' * 60}.jpg"):
        write_image(tmp_path / "in" / name, len(name))
    (tmp_path / "in" / "l.txt").write_text(f"a/x.jpg\nb/x.jpg\na/x.jpg\n{'long' * 60}.jpg\n")
    source = ListSource(tmp_path / "in" / "l.txt")
    pack(source, tmp_path / "out", 1, 0)
    packed = ShardSource(tmp_path / "out")
    assert [packed.read(index) for index in range(4)] == [source.read(index) for index in range(4)]
    assert len({packed.path(index) for index in range(4)}) == 4


def test_an_image_larger_than_a_shard_has_one_for_itself(tmp_path, write_image):
    write_image(tmp_path / "in" / "0.png", 0)
    write_image(tmp_path / "in" / "1.png", 1, size=(700, 700))
    write_image(tmp_path / "in" / "2.png", 2)
    manifest = pack(FolderSource(tmp_path / "in"), tmp_path / "out", 1, 0)
    assert [shard.records for shard in manifest.shards] == [1, 1, 1]
    assert len(ShardSource(tmp_path / "out")) == 3


def test_bad_images_are_left_out_and_listed(tmp_path, make_images, truncate, write_image):
    folder = make_images(5)
    truncate(folder / "00001.jpg")
    (folder / "00003.jpg").write_bytes(b"")
    (folder / "zz last.jpg").write_bytes(b"<html>")
    pack(FolderSource(folder), tmp_path / "out", 1, 2)
    packed = ShardSource(tmp_path / "out")
    assert [packed.read(index) for index in range(3)] == [(folder / f"0000{n}.jpg").read_bytes() for n in (0, 2, 4)]
    rows = [line.split("\t") for line in (tmp_path / "out" / "bad_images.txt").read_text().splitlines()]
    assert [row[0] for row in rows] == [str(folder / name) for name in ("00001.jpg", "00003.jpg", "zz last.jpg")]
    assert "truncated" in rows[0][1]


def test_without_verification_only_what_is_no_image_is_left_out(tmp_path, make_images, truncate):
    folder = make_images(3)
    truncate(folder / "00001.jpg")
    (folder / "00002.jpg").write_bytes(b"<html>")
    pack(FolderSource(folder), tmp_path / "out", 1, 0, verify=False)
    assert len(ShardSource(tmp_path / "out")) == 2


def test_the_ending_tells_the_content(tmp_path, make_images):
    folder = make_images(1)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "liar.jpg", format="PNG")
    pack(FolderSource(folder), tmp_path / "out", 1, 0)
    assert Path(ShardSource(tmp_path / "out").path(1)).suffix == ".png"


def test_no_readable_image(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="none of 1 images can be read"):
        pack(FolderSource(tmp_path / "in"), tmp_path / "out", 1, 0)


class Stops(FolderSource):
    """A source whose images end the run from some index on."""

    stop = 25

    def read(self, index):
        if index >= self.stop:
            raise KeyboardInterrupt
        return super().read(index)


Stops.__name__ = "FolderSource"  # the manifest tells sources apart by it


def test_an_interrupted_pack_goes_on_and_ends_with_the_same_bytes(tmp_path, big_images, monkeypatch):
    monkeypatch.setattr("personvit.data.pack._CHUNK", 4)
    pack(FolderSource(big_images), tmp_path / "whole", 1, 0)
    with pytest.raises(KeyboardInterrupt):
        pack(Stops(big_images), tmp_path / "out", 1, 0)
    first = tmp_path / "out" / "shard-000000.tar"
    assert first.exists()
    assert (tmp_path / "out" / "shard-000001.tar.part").exists()
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]
    stamp = first.stat().st_mtime_ns
    pack(FolderSource(big_images), tmp_path / "out", 1, 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert first.stat().st_mtime_ns == stamp


def _is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_a_killed_pack_goes_on(tmp_path, big_images):
    arguments = [sys.executable, "-m", "personvit.data", "pack", str(tmp_path / "out"), str(big_images)]
    process = subprocess.Popen([*arguments, "--shard-mib", "1", "--workers", "1"], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "shard-000000.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    while _is_locked(tmp_path / "out") and time.monotonic() < deadline:  # its workers notice, and end
        time.sleep(0.01)
    pack(FolderSource(big_images), tmp_path / "out", 1, 0)
    pack(FolderSource(big_images), tmp_path / "whole", 1, 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index"])
def test_a_damaged_shard_is_written_again(tmp_path, big_images, damage, capsys):
    source = FolderSource(big_images)
    pack(source, tmp_path / "out", 1, 0)
    whole = contents(tmp_path / "out")
    shard = tmp_path / "out" / ("shard-000001.idx" if damage == "index" else "shard-000001.tar")
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        os.truncate(shard, 5000)
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    with pytest.raises(DataError, match="1 problems in 3 shards"):
        main(["pack", "--check", str(tmp_path / "out")])
    assert shard.name in capsys.readouterr().out
    pack(source, tmp_path / "out", 1, 0)
    assert contents(tmp_path / "out") == whole
    assert main(["pack", "--check", str(tmp_path / "out")]) == 0
    assert "checksums fit" in capsys.readouterr().out


def test_other_contents_or_settings_are_refused(tmp_path, make_images, write_image):
    folder = make_images(3)
    pack(FolderSource(folder), tmp_path / "out", 1, 0)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="MiB a shard: 1 there, 2 now"):
        pack(FolderSource(folder), tmp_path / "out", 2, 0)
    (folder / "00001.jpg").rename(folder / "00001b.jpg")
    with pytest.raises(DataError, match="other names"):
        pack(FolderSource(folder), tmp_path / "out", 1, 0)
    write_image(folder / "new.jpg", 0)
    with pytest.raises(DataError, match="images: 3 there, 4 now"):
        pack(FolderSource(folder), tmp_path / "out", 1, 0)
    assert contents(tmp_path / "out") == before


def test_a_folder_with_something_else_is_refused_untouched(tmp_path, make_images):
    source = FolderSource(make_images(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(DataError, match="not empty"):
        pack(source, tmp_path / "out", 1, 0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    pack(source, tmp_path / "ours", 1, 0)
    (tmp_path / "ours" / "shard-1.tar").touch()
    with pytest.raises(DataError, match=r"holds shard-1\.tar"):
        pack(source, tmp_path / "ours", 1, 0)


@pytest.mark.parametrize("name", ["../shard-000000.tar", "/etc/passwd", "shard-000000.tar/../x.tar", 7])
def test_a_manifest_that_leads_out_of_its_folder(tmp_path, make_images, name):
    pack(FolderSource(make_images(2)), tmp_path / "out", 1, 0)
    file = tmp_path / "out" / "manifest.json"
    content = json.loads(file.read_text())
    content["shards"][0]["name"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        main(["pack", "--check", str(tmp_path / "out")])


def test_two_at_once(tmp_path, make_images):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another pack is writing"):
        pack(FolderSource(make_images(2)), tmp_path / "out", 1, 0)
    os.close(descriptor)


def test_command_packs_any_source_again(tmp_path, make_images, capsys):
    folder = make_images(4)
    arguments = ["--workers", "0", "--shard-mib", "1"]
    assert main(["pack", str(tmp_path / "one"), f"data.root={folder}", *arguments]) == 0
    assert "4 images in 1 shards" in capsys.readouterr().out
    assert main(["pack", str(tmp_path / "two"), str(tmp_path / "one"), *arguments]) == 0
    first, second = ShardSource(tmp_path / "one"), ShardSource(tmp_path / "two")
    assert [first.read(index) for index in range(4)] == [second.read(index) for index in range(4)]
    with pytest.raises(ConfigError, match="one PATH at most"):
        main(["pack", str(tmp_path / "x"), "a", "b"])
    with pytest.raises(ConfigError, match="shard-mib"):
        main(["pack", str(tmp_path / "x"), str(folder), "--shard-mib", "0"])
    with pytest.raises(DataError, match="Is this a folder of packed shards"):
        main(["pack", "--check", str(folder)])


def test_dali_reads_the_shards(tmp_path, make_images):
    fn = pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    from nvidia.dali import pipeline_def

    folder = make_images(5)
    pack(FolderSource(folder), tmp_path / "out", 1, 0)

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def pipeline():
        return fn.readers.webdataset(
            paths=[str(tmp_path / "out" / "shard-000000.tar")],
            index_paths=[str(tmp_path / "out" / "shard-000000.idx")],
            ext=["jpg;png;webp;bmp"],
        )

    built = pipeline()
    built.build()
    (batch,) = built.run()
    assert [batch.at(n).tobytes() for n in range(5)] == [path.read_bytes() for path in sorted(folder.iterdir())]
    assert Image.open(io.BytesIO(batch.at(0).tobytes())).size == (24, 48)
