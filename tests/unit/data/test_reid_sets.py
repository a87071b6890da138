from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from personvit.data.reid_sets import PUBLISHED, open_reid_set
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


@pytest.mark.parametrize("line", ["a.jpg 0", "0000/0000_000_xx_m.jpg 0", "0000/0000_000_01_m.jpg", "../0_0_01_m.jpg 0"])
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
    with pytest.raises(ConfigError, match=r"data\.name=folder"):
        open_reid_set("folder", tmp_path)


def test_query_identities_missing_from_the_gallery(tmp_path):
    layout = {"query": ["0001_c1.jpg"], "bounding_box_test": ["0002_c2.jpg"]}
    with pytest.raises(DataError, match=r"none of the 1 query identities is in the gallery \(first: 1\)"):
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
    assert rows == {"train": ["2", "3", "3"], "query": ["2", "2", "2"], "gallery": ["3", "3", "3"]}
    assert "751 ids, 12,936 images  (differs)" in text
    assert "published" not in open_reid_set("generated", tmp_path).table().splitlines()[2]
    assert set(PUBLISHED) == {"market1501", "msmt17", "dukemtmcreid", "occluded_duke"}
