from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from personvit.data.reid_sets import ReIDSplit
from personvit.errors import DataError
from personvit.retrieval import FeatureSet
from personvit.retrieval.cache import FeatureCache, weights_digest

ORIGIN = {"model": "abc", "flip": False}


class Extractor:
    def __init__(self):
        self.calls = 0

    def __call__(self, split):
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        return FeatureSet(torch.rand(len(split), 5, generator=generator), split.pids, split.camids, split.paths)


@pytest.fixture
def split(tmp_path):
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.jpg"))
        (tmp_path / f"{number}.jpg").write_bytes(b"x" * (number + 1))
    return ReIDSplit(paths, np.arange(3), np.array([0, 1, 0]))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def test_second_time_nothing_is_computed(split, folder):
    extract = Extractor()
    first = FeatureCache(folder, ORIGIN).get(split, extract)
    second = FeatureCache(folder, ORIGIN).get(split, extract)
    assert extract.calls == 1
    assert torch.equal(first.features, second.features)
    assert second.paths == split.paths
    np.testing.assert_array_equal(second.pids, split.pids)
    assert len(list(folder.iterdir())) == 1


def test_whatever_changes_the_features_is_in_the_key(split, folder):
    extract = Extractor()
    FeatureCache(folder, ORIGIN).get(split, extract)
    for changed in ({"model": "abd"}, {"flip": True}, {"device": "cuda"}):
        FeatureCache(folder, {**ORIGIN, **changed}).get(split, extract)
    shorter = ReIDSplit(split.paths[:2], split.pids[:2], split.camids[:2])
    backwards = ReIDSplit(split.paths[::-1], split.pids[::-1], split.camids[::-1])
    for other in (shorter, backwards):
        FeatureCache(folder, ORIGIN).get(other, extract)
    assert extract.calls == 6


def test_a_changed_image_of_the_same_size_and_date_is_noticed(split, folder):
    extract = Extractor()
    FeatureCache(folder, ORIGIN).get(split, extract)
    before = os.stat(split.paths[0])
    with open(split.paths[0], "wb") as file:
        file.write(b"y")
    os.utime(split.paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    FeatureCache(folder, ORIGIN).get(split, extract)
    assert extract.calls == 2


def test_labels_are_those_of_the_split_not_of_the_file(split, folder):
    extract = Extractor()
    FeatureCache(folder, ORIGIN).get(split, extract)
    relabelled = ReIDSplit(split.paths, split.pids + 7, split.camids)
    result = FeatureCache(folder, ORIGIN).get(relabelled, extract)
    assert extract.calls == 1
    np.testing.assert_array_equal(result.pids, relabelled.pids)


@pytest.mark.parametrize("damage", [lambda blob: blob[: len(blob) // 2], lambda blob: b"", lambda blob: b"\x80" + blob])
def test_a_damaged_file_is_computed_again(split, folder, damage, caplog):
    extract = Extractor()
    FeatureCache(folder, ORIGIN).get(split, extract)
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    result = FeatureCache(folder, ORIGIN).get(split, extract)
    assert extract.calls == 2
    assert "computed again" in caplog.text
    assert torch.equal(FeatureCache(folder, ORIGIN).get(split, extract).features, result.features)
    assert extract.calls == 2


def test_a_file_under_a_wrong_name_is_not_used(split, folder):
    extract = Extractor()
    FeatureCache(folder, ORIGIN).get(split, extract)
    (file,) = folder.iterdir()
    other = FeatureCache(folder, {**ORIGIN, "model": "other"})
    other.get(split, extract)
    (second,) = set(folder.iterdir()) - {file}
    second.write_bytes(file.read_bytes())
    other.get(split, extract)
    assert extract.calls == 3


def test_faults_are_named(split, folder, tmp_path):
    missing = ReIDSplit([str(tmp_path / "none.jpg")], split.pids[:1], split.camids[:1])
    with pytest.raises(DataError, match=r"none\.jpg: cannot be read"):
        FeatureCache(folder, ORIGIN).get(missing, Extractor())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="without cache=FOLDER"):
        FeatureCache(tmp_path / "file" / "cache", ORIGIN).get(split, Extractor())


def test_digest_of_weights_knows_names_values_and_types():
    def digest(change=lambda model: model):
        torch.manual_seed(5)
        return weights_digest(change(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))))

    def with_buffer(model):
        model[1].running_mean[0] = 1e-7
        return model

    changes = (lambda model: model.half(), lambda model: model[:1], with_buffer, torch.nn.Sequential)
    assert len({digest(), *map(digest, changes)}) == 5
    assert digest() == digest(lambda model: model.train(False))
