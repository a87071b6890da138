"""`personvit data split`: training images, queries and gallery of images with identities."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from personvit.data.__main__ import main
from personvit.data.reid.own import OwnTable
from personvit.data.reid.preflight import unscored
from personvit.data.reid_sets import open_reid_set
from personvit.data.split import make_split, write_split
from personvit.data.split_report import split_problems
from personvit.errors import ConfigError, DataError


def table_of(cameras_of: dict[str, str]) -> OwnTable:
    """`{"anna": "aab"}` -> two images of anna by camera a, one by camera b."""
    rows = [(f"/x/{pid}_{n}.jpg", pid, camera) for pid, seen in cameras_of.items() for n, camera in enumerate(seen)]
    return OwnTable("x", [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], None)


def random_table(seed: int, ids: int = 60) -> OwnTable:
    rng = np.random.default_rng(seed)
    return table_of({f"p{pid}": "".join(rng.choice(list("abcd"), rng.integers(1, 9))) for pid in range(ids)})


def by_identity(table: OwnTable) -> dict[str, list[tuple[str, str]]]:
    """Identity -> (camera, split) of each of its images."""
    found = defaultdict(list)
    for pid, camera, split in zip(table.pids, table.cameras or [""] * len(table.pids), table.splits or [], strict=True):
        found[pid].append((camera, split))
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_identities_are_on_one_side_and_every_query_has_its_match(seed, share):
    split = make_split(random_table(seed), share, seed)
    several = one_camera = train = 0
    for images in by_identity(split.table).values():
        parts = {part for _, part in images}
        if len(images) == 1:
            assert parts == {"gallery"}
            continue
        several += 1
        if "train" in parts:
            assert parts == {"train"}
            train += 1
            continue
        queries = [camera for camera, part in images if part == "query"]
        gallery = {camera for camera, part in images if part == "gallery"}
        cameras = {camera for camera, _ in images}
        assert len(queries) == len(set(queries)) >= 1  # one of each camera
        if len(cameras) == 1:
            one_camera += 1
            assert gallery == cameras
        else:
            assert all(gallery - {camera} for camera in queries)
            assert len(queries) >= len(cameras) - 1
    assert (split.train_ids, split.test_ids) == (train, several - train)
    assert train == round(share * several)
    assert split.one_camera == one_camera
    assert split.single == 60 - several


@pytest.mark.parametrize(
    ("seen", "queries"),
    [
        ("aabb", "ab"),  # images to spare everywhere: one query of each camera
        ("aabbc", "abc"),  # the single one may go: a and b have others
        ("aab", "a"),  # a's query needs the only image of b
        ("aabc", None),  # a's, and one of b's and c's
        ("ab", None),
        ("abc", None),
        ("aaa", "a"),
    ],
)
def test_a_query_never_takes_the_last_match_of_another(seen, queries):
    for seed in range(8):
        split = make_split(table_of({"p": seen}), 0.0, seed)
        found = sorted(camera for camera, part in by_identity(split.table)["p"] if part == "query")
        if queries is not None:
            assert "".join(found) == queries
        else:
            assert len(found) == len(set(seen)) - 1
        assert split.one_camera == (len(set(seen)) == 1)


def test_the_same_arguments_give_the_same_split_and_another_seed_another():
    first = make_split(random_table(0)).table.splits
    assert make_split(random_table(0)).table.splits == first
    assert make_split(random_table(0), seed=1).table.splits != first
    assert all(type(split) is str for split in first or [])


def test_identities_are_drawn_and_not_taken_in_their_order():
    table = table_of({f"p{pid}": "ab" for pid in range(20)})
    drawn = []
    for seed in range(3):
        images = by_identity(make_split(table, seed=seed).table)
        drawn.append({pid for pid, parts in images.items() if parts[0][1] == "train"})
    assert all(len(ids) == 10 for ids in drawn)
    assert drawn[0] != drawn[1] != drawn[2] != {f"p{pid}" for pid in range(10)}


@pytest.mark.parametrize(("seen", "share"), [({"p": "ab"}, 0.5), ({"p": "ab", "q": "a"}, 0.5), ({"p": "a"}, 0.0)])
def test_too_few_identities(seen, share):
    with pytest.raises(DataError, match="identities have two images or more, and a split takes at least"):
        make_split(table_of(seen), share)
    with pytest.raises(ConfigError, match=r"--train-share 1\.0 is out of range"):
        make_split(random_table(0), 1.0)


def test_a_small_share_still_leaves_somebody_on_both_sides():
    seen = {"p": "ab", "q": "ab", "r": "ab"}
    for share in (0.01, 0.99):
        split = make_split(table_of(seen), share)
        assert split.train_ids >= 1 <= split.test_ids


def folder_of_identities(root: Path, cameras: bool = True) -> Path:
    for pid in ("anna", "Zoë K", "7", "007", "lone"):
        (root / pid).mkdir(parents=True)
        for number in range(1 if pid == "lone" else 4):
            (root / pid / (f"x_c{number // 2 + 1}_{number}.jpg" if cameras else f"{number}.jpg")).touch()
    return root


def test_command_splits_a_folder(tmp_path, capsys):
    root = folder_of_identities(tmp_path / "own")
    assert main(["split", str(root), "--out", str(tmp_path / "split.csv")]) == 0
    out = capsys.readouterr().out
    assert "1 identities with one image can be neither learned nor found" in out
    assert "one camera only" not in out
    assert f"next: personvit finetune data.name=csv data.root={tmp_path}/split.csv" in out
    lines = (tmp_path / "split.csv").read_text().splitlines()
    assert lines[0] == "path,pid,camid,split"
    assert "own/lone/x_c1_0.jpg,lone,1,gallery" in lines
    found = open_reid_set("csv", tmp_path / "split.csv")
    assert (len(found.train), len(found.query), len(found.gallery)) == (8, 4, 5)
    assert {"7", "007"} <= set(found.pid_names)
    assert split_problems(found) == []
    assert not unscored(found).missing.any()


def test_command_splits_a_csv_and_writes_paths_that_its_folder_can_follow(tmp_path, monkeypatch, capsys):
    folder_of_identities(tmp_path / "a" / "own", cameras=False)
    rows = [f"own/{file.parent.name}/{file.name},{file.parent.name}" for file in (tmp_path / "a").rglob("*.jpg")]
    (tmp_path / "a" / "in.csv").write_text("path,pid\n" + "\n".join(rows))
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["split", "a/in.csv", "--out", "b/out.csv", "--train-share", "0.25", "--seed", "3"]) == 0
    assert "3 of 3 test identities were seen by one camera only" in capsys.readouterr().out
    lines = (tmp_path / "b" / "out.csv").read_text().splitlines()
    assert lines[0] == "path,pid,split"
    assert all(line.startswith(f"{tmp_path}/a/own/") for line in lines[1:])
    with pytest.raises(DataError, match="--protocol keep"):
        open_reid_set("csv", "b/out.csv")
    found = open_reid_set("csv", "b/out.csv", keep_same_camera=True)
    assert (len(found.train), len(found.query), len(found.gallery)) == (4, 3, 10)


def test_paths_through_a_linked_folder_are_written_relative(tmp_path):
    root = folder_of_identities(tmp_path / "real" / "own")
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert main(["split", str(tmp_path / "link" / "own"), "--out", str(tmp_path / "link" / "split.csv")]) == 0
    assert "own/anna/x_c1_0.jpg" in (root.parent / "split.csv").read_text()


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, capsys):
    root = folder_of_identities(tmp_path / "own")
    out = tmp_path / "split.csv"
    out.write_text("mine")
    with pytest.raises(DataError, match=r"split\.csv: exists already and is not overwritten"):
        main(["split", str(root), "--out", str(out)])
    with pytest.raises(DataError, match=r"split\.csv: exists already and is not overwritten"):
        write_split(make_split(random_table(0)), out)  # came into being after the command had looked
    assert out.read_text() == "mine"
    with pytest.raises(DataError, match=r"no folder .*absent"):
        main(["split", str(root), "--out", str(tmp_path / "absent" / "split.csv")])
    with open(os.fsencode(root / "anna") + b"/\xff_c1.jpg", "w"):
        pass
    with pytest.raises(DataError, match="this name is not UTF-8"):
        main(["split", str(root), "--out", str(tmp_path / "new.csv")])
    assert not (tmp_path / "new.csv").exists()


def test_sources_that_cannot_be_split(tmp_path):
    out = ["--out", str(tmp_path / "out.csv")]
    with pytest.raises(DataError, match=r"absent: no such file or folder"):
        main(["split", str(tmp_path / "absent"), *out])
    for name in ("query/a/1.jpg", "gallery/a/2.jpg"):
        (tmp_path / "own" / name).parent.mkdir(parents=True)
        (tmp_path / "own" / name).touch()
    with pytest.raises(DataError, match=r"is split already, by its folders .*\(data\.name=folder data\.root="):
        main(["split", str(tmp_path / "own"), *out])
    (tmp_path / "own" / "in.csv").write_text("path,pid,split\nquery/a/1.jpg,a,query\ngallery/a/2.jpg,a,gallery\n")
    with pytest.raises(DataError, match=r"is split already, by its column split\. Use it as it is \(data\.name=csv"):
        main(["split", str(tmp_path / "own" / "in.csv"), *out])
    with pytest.raises(ConfigError, match="--seed -1"):
        main(["split", str(tmp_path / "own"), "--seed", "-1", *out])
    assert not (tmp_path / "out.csv").exists()
