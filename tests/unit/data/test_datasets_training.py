"""Several sets joined for training, and evaluated apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from personvit.config import DataConfig, FinetuneDataConfig
from personvit.data import reid_sets
from personvit.data.reid_sets import (
    camera_offsets,
    data_of_each_set,
    join_training,
    open_reid_set,
    open_training,
    read_training_sets,
)
from personvit.errors import ConfigError, DataError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.fixture
def common(tmp_path):
    """Market-1501, DukeMTMC-reID, MSMT17 and Occluded-REID in miniature, below one folder."""
    market, duke, msmt = tmp_path / "Market-1501", tmp_path / "DukeMTMC-reID", tmp_path / "MSMT17"
    touch(market, "bounding_box_train/0007_c1.jpg", "bounding_box_train/0002_c3.jpg", "bounding_box_train/0007_c2.jpg")
    touch(market, "query/0003_c1.jpg", "bounding_box_test/0003_c6.jpg")
    touch(duke, "bounding_box_train/0001_c2.jpg", "bounding_box_train/0001_c1.jpg")
    touch(duke, "query/0003_c1.jpg", "bounding_box_test/0003_c8.jpg")
    touch(tmp_path / "Occluded_REID", "occluded_body_images/001/1.tif", "whole_body_images/001/1.tif")
    (msmt / "train").mkdir(parents=True)
    (msmt / "test").mkdir()
    for part, line in (("train", "01"), ("val", "02"), ("query", "03"), ("gallery", "04")):
        (msmt / f"list_{part}.txt").write_text(f"0000/0000_{part}_{line}_x.jpg 0\n")
    return tmp_path


def configured(name: str, root, **more) -> FinetuneDataConfig:
    return FinetuneDataConfig(name=name, root=None if root is None else str(root), **more)


def test_sets_are_joined_with_identities_and_cameras_apart(common):
    names = "market1501,msmt17,dukemtmcreid"
    train, testing = open_training(configured(names, common))
    assert train.pids.tolist() == [0, 1, 1, 2, 2, 3, 3]
    # Market-1501 has cameras up to 6 (in its gallery), MSMT17 up to 4: what only test images show keeps its place too.
    assert train.camids.tolist() == [2, 0, 1, 6 + 0, 6 + 1, 10 + 0, 10 + 1]
    assert [Path(path).name for path in train.paths[:3]] == ["0002_c3.jpg", "0007_c1.jpg", "0007_c2.jpg"]
    assert (train.pids.dtype, train.camids.dtype) == (np.int64, np.int64)
    assert [each.name for each in testing] == names.split(",")
    assert [each.query.camids.tolist() for each in testing] == [[0], [2], [0]]  # their own, not joined
    assert camera_offsets(testing) == [0, 6, 10, 18]
    assert [len(each.train) for each in read_training_sets(configured(names, common))] == [3, 2, 2]


def test_one_set_is_joined_to_itself(common):
    train, testing = open_training(configured("market1501", common / "Market-1501"))
    assert train.pids.tolist() == testing[0].train.pids.tolist() == [0, 1, 1]
    assert train.camids.tolist() == testing[0].train.camids.tolist()
    assert len(join_training([])) == 0


def test_own_data_joins_published_sets(common):
    touch(common / "own", "train/anna/1_c1.jpg", "train/anna/2_c2.jpg", "query/b/1_c1.jpg", "gallery/b/1_c2.jpg")
    roots = f"{common}/own,{common}/Market-1501"
    train, testing = open_training(configured("folder,market1501", roots))
    assert train.pids.tolist() == [0, 0, 1, 2, 2]
    assert train.camids.tolist() == [0, 1, 2 + 2, 2 + 0, 2 + 1]
    assert [each.name for each in testing] == ["folder", "market1501"]
    with pytest.raises(ConfigError, match="folder has no usual place in a common folder"):
        open_training(configured("folder,market1501", common))


def test_merge_val_decides_what_msmt17_trains_on(common):
    assert len(open_training(configured("msmt17", common))[0]) == 2
    assert len(open_training(configured("msmt17", common, merge_val=False))[0]) == 1


def test_sets_to_evaluate_on_may_be_others(common):
    market = common / "Market-1501"
    for config in (
        configured("market1501", common, test_name="occluded_reid,market1501"),
        configured("market1501", market, test_name="occluded_reid,market1501", test_root=str(common)),
    ):
        train, testing = open_training(config)
        assert len(train) == 3
        assert [each.name for each in testing] == ["occluded_reid", "market1501"]
    (only,) = open_training(configured("market1501,msmt17", f"{market},{common}/MSMT17", test_name="msmt17"))[1]
    assert only.root == str(common / "MSMT17")
    touch(common / "copy", "query/0009_c1.jpg", "bounding_box_test/0009_c2.jpg")
    (other,) = open_training(configured("market1501", market, test_root=str(common / "copy")))[1]
    assert other.query.pids.tolist() == [9]


@pytest.mark.parametrize("root", ["Market-1501", "Market-1501,{}/MSMT17"])
def test_a_test_set_without_a_place_is_asked_for(common, root):
    name = "market1501,msmt17" if "," in root else "market1501"
    with pytest.raises(ConfigError, match=r"data\.test_name=occluded_reid is not among .*data\.test_root=FOLDER"):
        open_training(configured(name, f"{common}/{root.format(common)}", test_name="occluded_reid"))


def test_a_set_without_training_images_is_no_set_to_train_on(common):
    with pytest.raises(DataError, match=r"Occluded-REID has no training images.*data\.test_name=occluded_reid"):
        open_training(configured("market1501,occluded_reid", common))
    assert len(open_reid_set("occluded_reid", common).query) == 1
    for file in (common / "Market-1501" / "bounding_box_train").iterdir():
        file.unlink()
    (common / "Market-1501" / "bounding_box_train").rmdir()
    with pytest.raises(DataError, match=r"nothing to train on \(bounding_box_train/ is missing or empty\)"):
        open_training(configured("market1501", common))


def test_a_set_to_evaluate_on_must_be_fit_for_it_and_one_to_train_on_need_not(common):
    touch(common / "bad", "bounding_box_train/0001_c1.jpg", "query/0001_c1.jpg", "bounding_box_test/0001_c1_2.jpg")
    with pytest.raises(DataError, match="own camera only"):
        open_training(configured("generated", common / "bad"))
    assert len(open_training(configured("generated", common / "bad"), keep_same_camera=True)[1]) == 1
    good = configured("generated", common / "bad", test_name="market1501", test_root=str(common))
    assert len(open_training(good)[0]) == 1


def test_without_a_folder_the_generated_persons_are_used(common, monkeypatch):
    monkeypatch.setattr("personvit.data.generated.dataset.ensure_generated", lambda data: common / "Market-1501")
    train, testing = open_training(configured("auto", None))
    assert (len(train), testing[0].name) == (3, "generated")
    _, testing = open_training(configured("market1501", common, test_name="generated"))
    assert testing[0].name == "generated"
    for name, told in (("market1501", "FOLDER, the folder"), ("csv", "FILE, the CSV file")):
        with pytest.raises(DataError, match=rf"data\.name={name} needs data\.root={told}"):
            open_training(configured(name, None))


@pytest.mark.parametrize(
    ("name", "root", "told"),
    [
        ("market1501,market1501", "/d", "expected different names"),
        ("market1501,auto", "/d", "expected different names"),
        ("market1501,", "/d", "expected different names"),
        ("market1501,msmt17", None, r"needs data\.root: the folder above all sets"),
        ("market1501,msmt17", "{}/Market-1501", "is the folder of one set"),
        ("market1501,msmt17", "{}/Occluded_REID", "is the folder of one set"),
        ("csv,msmt17", "/d", "csv has no usual place"),
    ],
)
def test_names_and_folders_that_do_not_go_together(common, name, root, told):
    with pytest.raises(ConfigError, match=told):
        data_of_each_set(DataConfig(name=name, root=None if root is None else root.format(common)))


def test_each_set_gets_its_folder_and_keeps_the_rest_of_the_configuration():
    data = configured("msmt17, market1501", "/a, /b", threads=3)
    found = data_of_each_set(data)
    assert [(each.name, each.root, each.threads) for each in found] == [("msmt17", "/a", 3), ("market1501", "/b", 3)]
    assert data_of_each_set(configured("market1501", "/a,b"))[0].root == "/a,b"  # one set: a comma is a comma


def test_a_set_that_is_trained_and_tested_is_read_once(common, monkeypatch):
    calls = []
    read = reid_sets.read_reid_set
    monkeypatch.setattr(reid_sets, "read_reid_set", lambda *a, **k: calls.append(a[0]) or read(*a, **k))
    open_training(configured("market1501,msmt17", common))
    assert calls == ["market1501", "msmt17"]
