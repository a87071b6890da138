"""Why an evaluation would be empty, told before it begins."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from personvit.data.reid.preflight import empty_evaluation, other_set, unscored
from personvit.data.reid.published import CAMERAS, PUBLISHED
from personvit.data.reid_sets import ReIDSet, ReIDSplit, check_evaluation, read_reid_set
from personvit.data.split_report import identified, split_problems
from personvit.errors import DataError


def split_of(*images: tuple[int, int]) -> ReIDSplit:
    labels = np.array(images, dtype=np.int64).reshape(-1, 2)
    return ReIDSplit([f"/d/{number}.jpg" for number in range(len(images))], labels[:, 0], labels[:, 1])


def set_of(query, gallery, name: str = "generated", **more) -> ReIDSet:
    return ReIDSet(name, split_of(), split_of(*query), split_of(*gallery), "/d", **more)


def of_counts(name: str, counts) -> ReIDSet:
    splits = []
    for ids, images in counts:
        pids = np.arange(images) % max(ids, 1)
        splits.append(ReIDSplit([f"/d/{n}.jpg" for n in range(images)], pids, np.arange(images) // max(ids, 1) % 2))
    return ReIDSet(name, *splits, "/d")


def test_unscored_queries_against_a_plain_restatement():
    rng = np.random.default_rng(0)
    for _ in range(50):
        query, gallery = (
            list(zip(rng.integers(-1, 8, n).tolist(), rng.integers(0, 3, n).tolist(), strict=True))
            for n in rng.integers(1, 20, 2)
        )
        query.append((10**15, 10**9))  # large numbers do not run into each other
        found = unscored(set_of(query, gallery))
        seen = {pid: {camera for p, camera in gallery if p == pid} for pid, _ in query}
        assert found.missing.tolist() == [not seen[pid] for pid, _ in query]
        assert found.lonely.tolist() == [bool(seen[pid]) and seen[pid] <= {camera} for pid, camera in query]


@pytest.mark.parametrize(
    ("query", "gallery", "more", "told"),
    [
        ([], [(1, 0)], {}, "0 query and 1 gallery images, so there is nothing to evaluate"),
        ([(1, 0)], [], {}, "1 query and 0 gallery images"),
        ([(1, 0), (2, 0)], [(3, 1), (9, 1)], {}, r"none of the 2 query identities .* queries 1 to 2, gallery 3 to 9"),
        ([(1, 0)], [(3, 1)], {"train_pids": (1, 2)}, "all query identities are those of the training images"),
        (
            [(0, 0), (3, 0)],
            [(1, 1), (2, 1)],
            {"pid_names": ("1", "0001", "0002", "2"), "name": "csv"},
            r"first query: 1; first of the gallery: 0001\). Cause: identities are written in two ways: '1' among the "
            r"queries, '0001' in the gallery \(2 such\)",
        ),
        ([(0, 0)], [(1, 1)], {"pid_names": ("ID_7", "7.0")}, "'ID_7' among the queries, '7.0' in the gallery"),
        ([(1, 0)], [(1, 0)], {}, r"Cause: all images are of camera 1\. .*--protocol keep"),
        ([(1, 0)], [(1, 0)], {"name": "csv"}, r"Cause: no camera is given \(a column camid would\)"),
        ([(1, 0)], [(1, 0)], {"name": "csv", "camera_names": ("hall",)}, "all images are of camera hall"),
        ([(1, 0), (2, 1)], [(1, 0), (2, 1)], {}, r"Every query identity .* no identity was seen by two cameras"),
        ([(1, 0), (2, 1)], [(1, 0)], {}, r"1 queries have their identity .* The other 1 are not in the gallery at all"),
    ],
)
def test_the_true_cause_of_an_empty_evaluation(query, gallery, more, told):
    with pytest.raises(DataError, match=told):
        check_evaluation(set_of(query, gallery, **more))


def test_protocol_keep_scores_pairs_of_one_camera_and_nothing_else():
    one_camera = set_of([(1, 0)], [(1, 0)])
    assert empty_evaluation(one_camera, keep_same_camera=True) is None
    assert empty_evaluation(one_camera, keep_same_camera=False) is not None
    assert empty_evaluation(set_of([(1, 0)], [(2, 0)]), keep_same_camera=True) is not None


def test_queries_that_are_not_scored_are_counted_by_protocol(caplog):
    some = set_of([(1, 0), (1, 1), (2, 0)], [(1, 0)])
    with caplog.at_level(logging.WARNING):
        check_evaluation(some)
        check_evaluation(some, keep_same_camera=True)
    assert ["2 of 3 queries" in line for line in caplog.messages] == [True, False]
    assert "1 of 3 queries" in caplog.messages[1]


def test_query_and_gallery_of_two_published_sets_are_named():
    market, duke = PUBLISHED["market1501"], PUBLISHED["dukemtmcreid"]
    mixed = of_counts("market1501", (market[0], market[1], duke[2]))
    mixed.gallery.pids[:] += 5000
    with pytest.raises(
        DataError, match="the queries are those of Market-1501, the gallery that of DukeMTMC-reID or Occ"
    ):
        check_evaluation(mixed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_set_under_another_name_is_refused_whether_or_not_its_training_images_are_there(name):
    for train in (PUBLISHED[name][0], (0, 0)):
        counts = (train, *PUBLISHED[name][1:])
        assert other_set(of_counts(name, counts)) is None
        assert other_set(of_counts("generated", counts)) is None
        wrong = "msmt17" if name != "msmt17" else "market1501"
        with pytest.raises(DataError, match=rf"data\.name={wrong} .*by the counts .*Use data\.name={name}, or correct"):
            check_evaluation(of_counts(wrong, counts))
    ids, images = PUBLISHED[name][2]
    assert other_set(of_counts("msmt17", (*PUBLISHED[name][:2], (ids, images - 1)))) is None  # no more than a doubt


def test_msmt17_without_val_is_msmt17():
    short = of_counts("msmt17", ((1041, 30248), *PUBLISHED["msmt17"][1:]))
    assert other_set(short) is None
    assert identified(short) == ("msmt17", "by its counts: MSMT17 without its validation list")


def test_auto_takes_the_name_that_the_counts_tell(tmp_path):
    name, counts = "partial", ((2, 4), (2, 2), (2, 2))
    for folder, (ids, images) in zip(("bounding_box_train", "query", "bounding_box_test"), counts, strict=True):
        (tmp_path / folder).mkdir()
        for number in range(images):
            (tmp_path / folder / f"{number % ids + 1:04}_c{len(folder) % 2 + 1}_{number}.png").touch()
    assert read_reid_set("auto", tmp_path).name == "market1501"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED, "cuhk03_detected", counts)
        found = read_reid_set("auto", tmp_path)
    assert found.name == "cuhk03_detected", name
    assert CAMERAS[found.name] == 2


def test_formats_that_differ_are_a_problem_even_where_others_can_be_scored():
    mixed = set_of([(0, 0), (2, 0)], [(1, 1), (2, 1)], name="csv", pid_names=("5", "05", "anna"))
    problems = split_problems(mixed)
    assert problems[0].startswith("1 query identity (5) not in the gallery")
    assert "'5' among the queries, '05' in the gallery (1 such)" in problems[1]
    assert len(problems) == 2
