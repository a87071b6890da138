"""Data of one's own: CSV files, and folders of identities."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from personvit.data.reid.csv_table import read_csv
from personvit.data.reid.own import numbered
from personvit.data.reid_sets import is_labelled, open_reid_set, read_reid_set
from personvit.errors import DataError

TABLE = """path,pid,camid,split
a/1.jpg,0001,hall,train
a/2.jpg,0001,door,train
b/1.jpg,anna,hall,query
b/2.jpg,anna,door,gallery
b/3.jpg,Zoë,hall,gallery
"""


def write_table(root: Path, text: str, name: str = "own.csv", encoding: str = "utf-8", files: bool = True) -> Path:
    """A CSV file, with an empty file for every relative path in its first column."""
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text.encode(encoding))
    for line in text.splitlines()[1:] if files else []:
        entry = line.split(",")[0]
        if entry and ".." not in entry and not entry.startswith(("/", '"')):
            (root / entry).parent.mkdir(parents=True, exist_ok=True)
            (root / entry).touch()
    return root / name


def lay_out(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(("separator", "newline"), [(",", "\n"), (";", "\r\n"), ("\t", "\n")])
def test_csv(tmp_path, encoding, separator, newline):
    write_table(tmp_path, TABLE)
    text = TABLE.replace(",", separator).replace("\n", newline)
    file = write_table(tmp_path, text, encoding=encoding, files=False)
    for name in ("csv", "auto"):
        found = open_reid_set(name, file)
        assert (found.name, found.root) == ("csv", str(file))
        assert found.train.paths == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/a/2.jpg"]
        assert found.query.paths == [f"{tmp_path}/b/1.jpg"]
        assert found.gallery.paths == [f"{tmp_path}/b/2.jpg", f"{tmp_path}/b/3.jpg"]
        assert found.train.pids.tolist() == [0, 0]
        assert [found.pid_name(pid) for pid in found.gallery.pids] == ["anna", "Zoë"]
        assert [found.pid_name(pid) for pid in found.train_pids] == ["0001"]
        assert [found.camera_name(camera) for camera in found.train.camids] == ["hall", "door"]
        assert found.query.pids[0] == found.gallery.pids[0]
        assert found.query.camids[0] != found.gallery.camids[0]
        for split in (found.train, found.query, found.gallery):
            assert split.pids.dtype == split.camids.dtype == np.int64


def test_csv_columns_in_any_order_with_others_between_and_quotes(tmp_path):
    lay_out(tmp_path, "x/a, b.jpg", "x/c .jpg")
    text = 'note, PID ,Split,path\n"say ""hi""\n twice",7,QUERY,"x/a, b.jpg"\n\n,7, gallery ,x/c .jpg\n,,,\n'
    found = read_reid_set("csv", write_table(tmp_path, text, files=False))
    assert (found.query.paths, found.gallery.paths) == ([f"{tmp_path}/x/a, b.jpg"], [f"{tmp_path}/x/c .jpg"])
    assert found.query.camids.tolist() == [0]
    assert "no cameras: evaluate under protocol keep" in found.table()


def test_csv_names_are_numbered_in_natural_order():
    numbers, names = numbered(["p10", "p2", "1", "01", "b", "p2"])
    assert names == ("01", "1", "b", "p2", "p10")
    assert numbers.tolist() == [4, 3, 1, 0, 2, 3]
    assert numbered([])[0].shape == (0,)


def test_csv_absolute_paths_are_taken_as_they_stand(tmp_path):
    lay_out(tmp_path / "elsewhere", "1.jpg", "2.jpg")
    rows = [
        f"{tmp_path}/elsewhere/{number}.jpg,1,c{number},{split}" for number, split in ((1, "query"), (2, "gallery"))
    ]
    file = write_table(tmp_path / "here", "\n".join(["path,pid,camid,split", *rows]), files=False)
    assert open_reid_set("csv", file).gallery.paths == [f"{tmp_path}/elsewhere/2.jpg"]


def test_csv_relative_paths_start_from_its_folder_and_not_from_ours(tmp_path, monkeypatch):
    write_table(tmp_path / "far", TABLE)
    monkeypatch.chdir(tmp_path)
    assert open_reid_set("csv", "far/own.csv").query.paths == [f"{tmp_path}/far/b/1.jpg"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("path,pid,", "file,pid,"), r"line 1: no column path; found file, pid, camid, split"),
        (("path,pid,", "file,id,"), r"line 1: no column path and no column pid"),
        (("camid,split", "pid,split"), r"line 1: column pid is named twice"),
        (("door,gallery", "door,test"), r"line 5: split 'test' is not one of train, query, gallery\. .*data split"),
        (("b/2.jpg,anna", "a/../b/1.jpg,anna"), r"line 5: .*/b/1\.jpg is given already in line 4"),
        (("b/2.jpg", "../b/2.jpg"), r"line 5: '\.\./b/2\.jpg' climbs out of"),
        (("b/2.jpg", "a/../../2.jpg"), r"line 5: .* climbs out of"),
        (("b/2.jpg,anna", "b/2.jpg, "), r"line 5: no pid"),
        (("b/2.jpg,anna", ",anna"), r"line 5: no path"),
        (("anna,door", "anna,"), r"line 5: no camid, but other lines have one"),
        (("door,gallery", "door,"), r"line 5: no split, but other lines have one"),
        ((",door,gallery", ""), r"line 5: 2 values for 4 columns .* Is the line cut off\?"),
        (("b/3.jpg,Zoë", 'b/3.jpg,"Zoë'), r"not a readable CSV file .* quotation mark left open"),
        (("a/1.jpg,0001,hall,train\na/2.jpg,0001,door,train\n", ""), None),
    ],
)
def test_csv_damage_is_named_with_its_line(tmp_path, change, told):
    assert TABLE.count(change[0]) == 1
    write_table(tmp_path, TABLE)
    file = write_table(tmp_path, TABLE.replace(*change), files=False)
    if told is None:
        assert len(open_reid_set("csv", file).train) == 0
        return
    with pytest.raises(DataError, match=rf"own\.csv.*{told}"):
        read_reid_set("csv", file)


def test_csv_line_numbers_count_lines_within_quotes(tmp_path):
    text = 'path,pid,note\n1.jpg,1,"a\nb"\n2.jpg,,\n'
    with pytest.raises(DataError, match="line 4: no pid"):
        read_csv(write_table(tmp_path, text, files=False))


def test_csv_that_is_no_table_of_ours(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"nothing\.csv: no such CSV file"):
        read_reid_set("csv", tmp_path / "nothing.csv")
    with pytest.raises(DataError, match=r"not a text file in UTF-8 \(byte .*: 0xeb\)\. Save it as CSV UTF-8"):
        read_reid_set("csv", write_table(tmp_path, TABLE, encoding="latin-1"))
    with pytest.raises(DataError, match="no column path and no column pid; found"):
        read_reid_set("csv", write_table(tmp_path, "", files=False))
    with pytest.raises(DataError, match="no image in it"):
        read_reid_set("csv", write_table(tmp_path, "path,pid\n\n", files=False))

    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"own\.csv: cannot be read \(Permission denied\)"):
        read_reid_set("csv", tmp_path / "own.csv")


def test_csv_of_images_that_are_not_there(tmp_path, caplog):
    file = write_table(tmp_path / "moved", TABLE, files=False)
    with pytest.raises(DataError, match=r"5 of 5 images looked at do not exist .*Relative paths start from .*moved"):
        read_reid_set("csv", file)
    write_table(tmp_path / "moved", TABLE)
    (tmp_path / "moved" / "b" / "3.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        read_reid_set("csv", file)
    assert "1 of 5 images looked at do not exist (first: " in caplog.text
    assert "personvit data check data.name=csv" in caplog.text


def test_csv_without_split_names_the_generator(tmp_path):
    text = "path,pid\n" + "".join(f"{number}.jpg,{number % 2}\n" for number in range(4))
    with pytest.raises(DataError, match=r"personvit data split .*own\.csv --out split\.csv"):
        read_reid_set("csv", write_table(tmp_path, text))


def test_folder_of_splits(tmp_path):
    lay_out(
        tmp_path,
        "train/7/x_c1_1.jpg", "train/7/deep/x_c2_1.PNG", "train/12/x_c1.jpg", "query/Zoë K/a_c2.jpg",
        "query/.hidden/a_c1.jpg", "gallery/Zoë K/a_c10_s.jpg", "gallery/Zoë K/notes.txt",
    )  # fmt: skip
    for name in ("folder", "auto"):
        found = open_reid_set(name, tmp_path)
        assert found.name == "folder"
        assert sorted(zip(found.train.pids.tolist(), found.train.camids.tolist(), strict=True)) == [
            (0, 0),
            (0, 1),
            (1, 0),
        ]
        assert [found.pid_name(pid) for pid in found.train_pids] == ["7", "12"]  # natural order: 7 before 12
        assert [found.pid_name(pid) for pid in found.query.pids] == ["Zoë K"]
        assert [found.camera_name(camera) for camera in (*found.query.camids, *found.gallery.camids)] == ["2", "10"]
    assert is_labelled("folder", tmp_path)
    assert not is_labelled("folder", tmp_path / "train")


def test_folder_without_cameras_is_told_to_keep(tmp_path):
    lay_out(tmp_path, "query/a/1.jpg", "gallery/a/2.jpg", "gallery/b/1_closeup.jpg")
    with pytest.raises(
        DataError, match=r"no camera is given \(_c1, _c2 \.\.\. in the file names would\).*--protocol keep"
    ):
        open_reid_set("folder", tmp_path)
    found = open_reid_set("folder", tmp_path, keep_same_camera=True)
    assert found.gallery.camids.tolist() == [0, 0]
    assert "no cameras: evaluate under protocol keep" in found.table()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("query/1.jpg", "gallery/a/1.jpg"), r"query/1\.jpg: this image is in no folder of its identity"),
        (("query/a/1_c1.jpg", "gallery/a/1.jpg"), r"gallery/a/1\.jpg: no camera .* but in 1 of 2 others"),
        (("query/a/1.jpg", "gallery/a/x.txt"), r"gallery: no image in this folder"),
        (("a/1.jpg", "b/1.jpg"), r"nothing says which.*personvit data split .* --out split\.csv"),
    ],
)
def test_folder_that_cannot_be_used(tmp_path, names, told):
    with pytest.raises(DataError, match=told):
        open_reid_set("folder", lay_out(tmp_path, *names))


def test_folder_links_out_of_it_are_passed_over(tmp_path):
    lay_out(tmp_path, "outside.jpg", "own/query/a/1_c1.jpg", "own/gallery/a/1_c2.jpg")
    os.symlink(tmp_path / "outside.jpg", tmp_path / "own" / "gallery" / "a" / "2_c1.jpg")
    assert len(open_reid_set("folder", tmp_path / "own").gallery) == 1
