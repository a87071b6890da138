from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from personvit.data.reid import market, msmt17
from personvit.data.reid.published import CAMERAS, TITLES
from personvit.data.reid_sets import LABELLED_NAMES, PUBLISHED, ReIDSet, ReIDSplit, open_reid_set, read_reid_set
from personvit.errors import ConfigError, DataError

MARKET = {
    "bounding_box_train": ["0007_c1s1_000001_00.jpg", "0002_c3s1_000001_00.jpg", "0007_c6s1_000001_00.jpg"],
    "query": ["0003_c1s1_000001_00.jpg", "0004_c2s1_000001_00.jpg"],
    "bounding_box_test": [
        "0003_c2s1_000001_00.jpg",
        "0004_c1s1_000001_00.jpg",
        "-1_c1s1_000401_03.jpg",
        "0000_c3s1_000001_00.jpg",
    ],
}


def lay_out(root: Path, layout: dict[str, list[str]]) -> Path:
    """Empty files are enough: nothing is decoded."""
    root.mkdir(parents=True, exist_ok=True)
    for folder, names in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).touch()
    return root


def msmt(root: Path, train: str = "train", test: str = "test") -> Path:
    for folder in (train, test):
        (root / folder).mkdir(parents=True)
    (root / "list_train.txt").write_text(
        "0000/0000_000_01_0303morning_0015_0.jpg 0\n0001/0001_000_15_0303noon_0015_0.jpg 1\n"
    )
    (root / "list_val.txt").write_text("0000/0000_001_02_0303morning_0015_0.jpg 0\n")
    (root / "list_query.txt").write_text("0000/0000_000_03_0303morning_0015_0.jpg 0\n")
    (root / "list_gallery.txt").write_text("0000/0000_001_07_0303morning_0015_0.jpg 0\n")
    return root


def test_market(tmp_path):
    found = open_reid_set("market1501", lay_out(tmp_path, MARKET))
    assert [Path(path).name for path in found.train.paths] == sorted(MARKET["bounding_box_train"])
    np.testing.assert_array_equal(found.train.pids, [0, 1, 1])  # relabelled in ascending order of identity
    np.testing.assert_array_equal(found.train.camids, [2, 0, 5])
    np.testing.assert_array_equal(found.query.pids, [3, 4])
    np.testing.assert_array_equal(found.query.camids, [0, 1])
    np.testing.assert_array_equal(found.gallery.pids, [0, 3, 4])  # junk dropped, distractor kept
    np.testing.assert_array_equal(found.gallery.camids, [2, 1, 0])
    for split in (found.train, found.query, found.gallery):
        assert len(split.paths) == len(split) == len(split.pids)
        assert split.pids.dtype == split.camids.dtype == np.int64
        assert all(Path(path).is_file() for path in split.paths)


def test_only_the_base_name_is_parsed(tmp_path):
    found = open_reid_set("market1501", lay_out(tmp_path / "9_c9", MARKET))
    assert found.query.pids.tolist() == [3, 4]


@pytest.mark.parametrize("name", ["dukemtmcreid", "occluded_duke", "generated", "auto"])
def test_duke_names_and_cameras_above_nine(tmp_path, name):
    layout = {
        "query": ["0005_c2_f0046985.jpg", ".hidden.jpg", "Thumbs.db"],
        "bounding_box_test": ["0005_c12_f0046985.PNG", "7140_c8_f0046985.jpg"],
    }
    found = open_reid_set(name, lay_out(tmp_path, layout))
    assert found.name == ("market1501" if name == "auto" else name)
    assert found.query.camids.tolist() == [1]
    assert found.gallery.camids.tolist() == [11, 7]
    assert len(found.train) == 0
    assert found.train.pids.dtype == np.int64


def test_msmt17_merges_train_and_val_and_reads_the_camera_from_the_path(tmp_path):
    found = open_reid_set("msmt17", msmt(tmp_path))
    assert found.train.pids.tolist() == [0, 1, 0]
    assert found.train.camids.tolist() == [0, 14, 1]
    assert (found.query.camids.tolist(), found.gallery.camids.tolist()) == ([2], [6])
    assert found.query.paths == [f"{tmp_path}/test/0000/0000_000_03_0303morning_0015_0.jpg"]


def test_msmt17_second_version_and_common_root(tmp_path):
    msmt(tmp_path / "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    found = open_reid_set("msmt17", tmp_path)
    assert "mask_train_v2" in found.train.paths[0]
    assert open_reid_set("auto", tmp_path / "MSMT17_V2").name == "msmt17"


@pytest.mark.parametrize(
    "line",
    [
        "a.jpg 0",
        "0000/0000_000_xx_m.jpg 0",
        "0000/0000_000_00_m.jpg 0",
        "0000/0000_000_01_m.jpg",
        "../0_0_01_m.jpg 0",
        "0000/../../0_0_01_m.jpg 0",
        f"0000/0000_000_01_m.jpg {'9' * 30}",
    ],
)
def test_msmt17_damaged_list(tmp_path, line):
    msmt(tmp_path)
    with (tmp_path / "list_gallery.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"list_gallery\.txt, line 2"):
        open_reid_set("msmt17", tmp_path)


@pytest.mark.parametrize("name", ["person.jpg", "0002_c0s1_000001_00.jpg", "x0002_c1.jpg"])
def test_a_name_without_identity_and_camera_is_named(tmp_path, name):
    lay_out(tmp_path, MARKET)
    (tmp_path / "query" / name).touch()
    with pytest.raises(DataError, match=rf"query/{name}: the name does not start with"):
        open_reid_set("market1501", tmp_path)


@pytest.mark.parametrize("missing", ["query", "bounding_box_test"])
def test_missing_or_empty_folder(tmp_path, missing):
    layout = {folder: names for folder, names in MARKET.items() if folder != missing}
    with pytest.raises(DataError, match=missing):
        open_reid_set("market1501", lay_out(tmp_path, layout))
    (tmp_path / missing).mkdir()
    with pytest.raises(DataError, match=rf"{missing}: no image"):
        open_reid_set("market1501", tmp_path)


def test_missing_root_and_unknown_name(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_reid_set("market1501", tmp_path / "absent")
    with pytest.raises(
        ConfigError, match=r"data\.name=market is not a labelled set.*Did you mean data\.name=market1501\?"
    ):
        open_reid_set("market", tmp_path)
    (tmp_path / "list.txt").touch()
    with pytest.raises(DataError, match=r"a file\. A table of images is read by data\.name=csv"):
        open_reid_set("market1501", tmp_path / "list.txt")


def test_query_identities_missing_from_the_gallery(tmp_path):
    layout = {"query": ["0001_c1.jpg"], "bounding_box_test": ["0002_c2.jpg"]}
    with pytest.raises(DataError, match=r"none of the 1 query identities is in the gallery \(first query: 1; first"):
        open_reid_set("market1501", lay_out(tmp_path, layout))


def test_query_identities_under_their_own_camera_only(tmp_path):
    layout = {"query": ["0001_c1_1.jpg"], "bounding_box_test": ["0001_c1_2.jpg", "0002_c2.jpg"]}
    with pytest.raises(DataError, match="own camera only"):
        open_reid_set("market1501", lay_out(tmp_path, layout))


def test_some_queries_without_a_match_are_counted(tmp_path, caplog):
    layout = {
        "query": ["0001_c1.jpg", "0002_c1.jpg", "0003_c1.jpg"],
        "bounding_box_test": ["0001_c1_2.jpg", "0001_c2.jpg", "0002_c1_2.jpg"],
    }
    with caplog.at_level(logging.WARNING):
        open_reid_set("market1501", lay_out(tmp_path, layout))
    assert "2 of 3 queries have no true match" in caplog.text


def test_table_counts_identities_images_and_cameras(tmp_path):
    lay_out(tmp_path, MARKET)
    text = open_reid_set("market1501", tmp_path).table()
    rows = {line.split()[0]: line.split()[1:4] for line in text.splitlines()[2:]}
    assert rows["train"] == ["2", "3", "3"]
    assert rows["query"] == ["2", "2", "2"]
    assert rows["gallery"] == ["3", "3", "3"]
    assert "751 ids, 12,936 images  (differs: 749 ids fewer, 12,933 images fewer)" in text
    assert "train: 1 identity has one image only" in text
    assert "cameras: 4 instead of 6" in text
    generated = open_reid_set("generated", tmp_path).table()
    assert "published" not in generated
    assert "instead" not in generated


def test_every_published_set_can_be_named_and_has_all_its_facts():
    assert set(PUBLISHED) == set(CAMERAS) == set(TITLES)
    assert set(PUBLISHED) < set(LABELLED_NAMES)


def counted_set(name: str, counts, cameras: int, **more) -> ReIDSet:
    splits = []
    for ids, images in counts:
        pids = np.arange(images) % max(ids, 1)
        splits.append(ReIDSplit([f"/d/{number}.jpg" for number in range(images)], pids, np.arange(images) % cameras))
    return ReIDSet(name, *splits, "/d", **more)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_complete_set_does_not_differ(name):
    text = counted_set(name, PUBLISHED[name], CAMERAS[name]).table()
    assert "differs" not in text
    assert "cameras:" not in text
    (ids, images) = PUBLISHED[name][2]
    assert f"{ids:,} ids, {images:,} images" in text.splitlines()[4]
    more = counted_set(name, (*PUBLISHED[name][:2], (ids + 1, images + 1)), CAMERAS[name]).table()
    assert "(differs: 1 ids more, 1 images more)" in more.splitlines()[4]


def test_a_split_that_is_not_there_differs_in_one_word():
    text = counted_set("market1501", ((0, 0), *PUBLISHED["market1501"][1:]), 6).table()
    assert text.splitlines()[2].endswith("(differs: not here)")


def test_cuhk03_in_its_prepared_folders(tmp_path):
    layout = {
        "bounding_box_train": ["0001_c1_1.png", "0001_c2_6.png"],
        "query": ["0003_c1_21.png"],
        "bounding_box_test": ["0003_c2_26.png"],
    }
    for folder in ("labeled", "detected"):
        lay_out(tmp_path / "CUHK03-NP" / folder, layout)
        found = open_reid_set(f"cuhk03_{folder}", tmp_path)
        assert (found.name, found.root) == (f"cuhk03_{folder}", str(tmp_path / "CUHK03-NP" / folder))
        assert (found.query.pids.tolist(), found.query.camids.tolist()) == ([3], [0])
        assert found.gallery.camids.tolist() == [1]
        assert open_reid_set(f"cuhk03_{folder}", tmp_path / "CUHK03-NP" / folder).train_pids == (1,)


def test_cuhk03_as_published_is_told_what_to_prepare(tmp_path):
    (tmp_path / "cuhk03_release").mkdir()
    (tmp_path / "cuhk03_release" / "cuhk-03.mat").touch()
    with pytest.raises(DataError, match=r"cuhk-03\.mat holds CUHK03 as it was published.*prepared folders"):
        open_reid_set("cuhk03_labeled", tmp_path)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("name", "queries", "below"),
    [
        ("occluded_reid", "occluded_body_images", "Occluded_REID"),
        ("partial_reid", "partial_body_images", "Partial_REID"),
        ("partial_reid", "occluded_body_images", ""),
    ],
)
def test_sets_of_pairs_get_virtual_cameras_and_nothing_to_train_on(tmp_path, name, queries, below, nested):
    for folder in (queries, "whole_body_images"):
        for pid in ("002", "001"):
            place = tmp_path / below / folder / (pid if nested else "")
            lay_out(place, {"": [f"{pid}_01.tif", f"{pid}_02.TIF", ".hidden.tif", "readme.txt"][: 4 if nested else 3]})
    for named, root in ((name, tmp_path), (name, tmp_path / below), ("auto", tmp_path / below)):
        if named == "auto" and name == "partial_reid" and not below:
            continue  # looks like Occluded-REID: only its name tells
        found = open_reid_set(named, root)
        assert found.name == name
        assert (found.query.pids.tolist(), found.gallery.pids.tolist()) == ([1, 1, 2, 2], [1, 1, 2, 2])
        assert (set(found.query.camids), set(found.gallery.camids)) == ({0}, {1})
        assert all(Path(path).is_file() for path in (*found.query.paths, *found.gallery.paths))
        assert len(found.train) == 0


def test_partial_reid_says_which_queries_it_took(tmp_path):
    for folder in ("occluded_body_images", "partial_body_images", "whole_body_images"):
        lay_out(tmp_path / folder, {"": ["001_001.jpg"]})
    assert "partial_reid, queries of occluded_body_images in" in open_reid_set("partial_reid", tmp_path).table()


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"whole_body_images": ["001_1.tif"]}, "not occluded_reid. It has occluded_body_images"),
        ({"occluded_body_images": ["001_1.tif"], "whole_body_images": []}, "whole_body_images: no image in it"),
        ({"occluded_body_images": ["x_1.tif"], "whole_body_images": ["001_1.tif"]}, "'x_1.tif' does not begin with"),
    ],
)
def test_damaged_sets_of_pairs(tmp_path, files, told):
    with pytest.raises(DataError, match=told):
        open_reid_set("occluded_reid", lay_out(tmp_path, files))


def test_msmt17_tells_its_versions_apart_and_compares_with_the_lists_it_took(tmp_path):
    first = open_reid_set("msmt17", msmt(tmp_path / "a"))
    second = open_reid_set("msmt17", msmt(tmp_path / "b", "mask_train_v2", "mask_test_v2"), merge_val=False)
    assert "msmt17, version 1 in" in first.table()
    assert "msmt17, version 2 (masked faces), train list only in" in second.table()
    assert "1,041 ids, 32,621 images" in first.table()
    assert "1,041 ids, 30,248 images" in second.table()
    assert (len(first.train), len(second.train)) == (3, 2)


def test_msmt17_of_both_versions_needs_a_choice(tmp_path):
    msmt(tmp_path / "MSMT17_V1")
    msmt(tmp_path / "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    with pytest.raises(DataError, match=r"both versions of MSMT17 are here.*data\.root=.*MSMT17_V1 \(as published\)"):
        open_reid_set("msmt17", tmp_path)
    assert open_reid_set("msmt17", tmp_path / "MSMT17_V1").version == "version 1"
    msmt(tmp_path / "mixed")
    (tmp_path / "mixed" / "mask_test_v2").mkdir()
    with pytest.raises(DataError, match="both versions of MSMT17 lie here"):
        open_reid_set("msmt17", tmp_path / "mixed")


@pytest.mark.parametrize("part", ["train", "val", "query", "gallery"])
def test_msmt17_names_a_missing_list(tmp_path, part):
    msmt(tmp_path)
    (tmp_path / f"list_{part}.txt").unlink()
    with pytest.raises(DataError, match=rf"list_{part}\.txt: this list of MSMT17 is missing"):
        read_reid_set("msmt17", tmp_path)
    if part == "val":
        assert len(read_reid_set("msmt17", tmp_path, merge_val=False).train) == 2


def test_msmt17_without_training_images_needs_no_training_lists(tmp_path):
    msmt(tmp_path)
    (tmp_path / "train").rmdir()
    (tmp_path / "list_train.txt").unlink()
    assert len(open_reid_set("msmt17", tmp_path).train) == 0


@pytest.mark.parametrize(("first", "second"), [("train", "val"), ("query", "gallery"), ("gallery", "gallery")])
def test_msmt17_names_a_file_that_is_listed_twice(tmp_path, first, second):
    msmt(tmp_path)
    line = (tmp_path / f"list_{first}.txt").read_text().splitlines()[0]
    with (tmp_path / f"list_{second}.txt").open("a") as file:
        file.write("\n./" + line + "\n")
    with pytest.raises(
        DataError, match=rf"list_{second}\.txt, line 3: .* is listed already in list_{first}\.txt, line 1"
    ):
        read_reid_set("msmt17", tmp_path)


def test_msmt17_list_that_is_no_text(tmp_path):
    msmt(tmp_path)
    (tmp_path / "list_query.txt").write_bytes(b"\xff\xfe0\x000")
    with pytest.raises(DataError, match=r"list_query\.txt: not a text file in UTF-8"):
        read_reid_set("msmt17", tmp_path)


def test_msmt17_with_other_letters_and_spaces(tmp_path):
    msmt(tmp_path)
    (tmp_path / "list_query.txt").write_text("Zoë 1/0000_000_03_x é.jpg 0\n", encoding="utf-8-sig")
    assert open_reid_set("msmt17", tmp_path).query.paths == [f"{tmp_path}/test/Zoë 1/0000_000_03_x é.jpg"]


@pytest.mark.parametrize(("reader", "name"), [(market, "market1501"), (market, "occluded_reid")])
def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch, reader, name):
    lay_out(tmp_path, MARKET | {"occluded_body_images": ["1.tif"], "whole_body_images": ["1.tif"]})

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(reader.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be listed \(Permission denied\)\. Check its permissions: ls -ld"):
        open_reid_set(name, tmp_path)


def test_a_list_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(self, encoding):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(msmt17.Path, "read_text", refuse)
    with pytest.raises(DataError, match=r"list_train\.txt: cannot be read \(Permission denied\)"):
        read_reid_set("msmt17", msmt(tmp_path))


def test_a_camera_that_the_set_does_not_have_is_said(tmp_path, caplog):
    lay_out(tmp_path, MARKET)
    (tmp_path / "query" / "0003_c9s1_000001_00.jpg").touch()
    with caplog.at_level(logging.WARNING):
        found = open_reid_set("market1501", tmp_path)
    told = f"cameras: 9 (first: {tmp_path}/query/0003_c9s1_000001_00.jpg), but market1501 has cameras 1 to 6 only"
    assert told in caplog.text
    assert told in found.table()
    assert "cameras: 9" not in open_reid_set("generated", tmp_path).table()


def test_numbers_that_no_integer_holds_are_damaged_names(tmp_path):
    lay_out(tmp_path, MARKET)
    (tmp_path / "query" / f"{'9' * 30}_c1.jpg").touch()
    with pytest.raises(DataError, match="the name does not start with"):
        open_reid_set("market1501", tmp_path)
