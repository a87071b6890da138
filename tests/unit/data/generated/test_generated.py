"""The generated set: same files for the same settings, honest layout, nothing of the user's overwritten."""

from __future__ import annotations

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personvit.config import DataConfig
from personvit.data.generated import GeneratedConfig, ensure_generated, generate
from personvit.data.generated import dataset as dataset_module
from personvit.data.generated.plan import Item, make_plan
from personvit.errors import ConfigError, DataError

TINY = GeneratedConfig(
    pool_images=20, pool_cameras=5, train_ids=2, test_ids=3, cameras=3, train_images=1, gallery_images=1, seed=5
)
TINY_FIELDS = dataclasses.asdict(TINY)
MARKET = re.compile(r"(-1|\d{4})_c(\d)s\d_\d{6}_\d{2}\.jpg")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generated") / "set"
    generate(root, TINY, workers=1, progress=False)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_seed_gives_same_bytes_whatever_the_workers(tiny: Path, tmp_path: Path) -> None:
    generate(tmp_path / "other", TINY, workers=2, progress=False)
    assert contents(tmp_path / "other") == contents(tiny)


def test_other_seed_gives_other_pictures(tiny: Path, tmp_path: Path) -> None:
    generate(tmp_path / "other", GeneratedConfig(**{**TINY_FIELDS, "seed": 6}), workers=1, progress=False)
    ours = {data for name, data in contents(tiny).items() if name.endswith(".jpg")}
    theirs = {data for name, data in contents(tmp_path / "other").items() if name.endswith(".jpg")}
    assert not ours & theirs


def test_the_size_of_the_pool_changes_nothing_in_the_labelled_split() -> None:
    def labelled(config: GeneratedConfig) -> list[Item]:
        return [item for item in make_plan(config) if not item.name.startswith("pool/")]

    assert labelled(TINY) == labelled(GeneratedConfig(**{**TINY_FIELDS, "pool_images": 50}))


def test_identities_and_cameras_are_disjoint() -> None:
    persons: dict[str, set[int]] = {}
    cameras: dict[str, set[int]] = {}
    for item in make_plan(GeneratedConfig(pool_images=400, test_ids=20, train_ids=20)):
        folder = item.name.split("/")[0]
        group = "test" if folder in ("query", "bounding_box_test") else folder
        persons.setdefault(group, set()).add(item.shot.pid)
        cameras.setdefault(group, set()).add(item.shot.camera)
    assert set(persons) == {"pool", "test", "bounding_box_train"}
    assert not persons["pool"] & persons["test"]
    assert not persons["pool"] & persons["bounding_box_train"]
    assert not persons["test"] & persons["bounding_box_train"]
    assert not cameras["pool"] & (cameras["test"] | cameras["bounding_box_train"])


def test_every_query_has_a_match_in_another_camera() -> None:
    plan = make_plan(GeneratedConfig(pool_images=0, test_ids=30, camera_probability=0.1))
    gallery = [item.shot for item in plan if item.name.startswith("bounding_box_test")]
    queries = [item.shot for item in plan if item.name.startswith("query")]
    assert len(queries) >= 60
    for query in queries:
        assert any(shot.pid == query.pid and shot.camera != query.camera for shot in gallery)


def test_names_follow_market1501(tiny: Path) -> None:
    labels: dict[str, set[int]] = {}
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        for path in (tiny / folder).iterdir():
            match = MARKET.fullmatch(path.name)
            assert match is not None, path.name
            assert 1 <= int(match[2]) <= TINY.cameras
            labels.setdefault(folder, set()).add(int(match[1]))
    assert labels["query"] == {1, 2, 3}
    assert labels["bounding_box_test"] == {-1, 0, 1, 2, 3}
    assert labels["bounding_box_train"] == {4, 5}
    assert len(list((tiny / "pool").glob("*.jpg"))) == TINY.pool_images


def test_pictures_are_rgb_jpegs_of_varying_size(tiny: Path) -> None:
    sizes = set()
    for path in (tiny / "pool").iterdir():
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            sizes.add(image.size)
            pixels = np.asarray(image)
        assert 90 <= pixels.shape[0] <= 256
        assert 0.3 <= pixels.shape[1] / pixels.shape[0] <= 0.6
        assert pixels.std() > 8
    assert len(sizes) > 10


def test_card_tells_what_is_there(tiny: Path) -> None:
    card = json.loads((tiny / "card.json").read_text())
    assert card["config"]["seed"] == TINY.seed
    assert card["key"] == TINY.key()
    for row in card["splits"]:
        assert row["images"] == len(list((tiny / row["split"]).iterdir()))
    assert sum(card["heights"].values()) == sum(row["images"] for row in card["splits"])
    assert [row["name"] for row in card["baselines"]] == ["mean colour", "raw pixels"]
    assert all((tiny / name).is_file() for name in card["occluded"])
    text = (tiny / "README.md").read_text()
    assert "mean colour" in text
    assert "| pool | 20 |" in text
    with Image.open(tiny / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match=r"is not empty.*--out DIR"):
        generate(tmp_path, TINY, workers=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(DataError, match="is a file"):
        generate(tmp_path / "mine.txt", TINY, workers=1, progress=False)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cameras=12 .*at most 9"):
        GeneratedConfig(cameras=12)
    with pytest.raises(ConfigError, match=r"occlusion=1\.5"):
        GeneratedConfig(occlusion=1.5)


class TestCache:
    data = DataConfig(generated_train=6, generated_test_ids=2, generated_seed=3)

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def test_is_rendered_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = ensure_generated(self.data, workers=1)
        assert root.parent == tmp_path / "personvit"
        assert len(list((root / "pool").iterdir())) == 6
        monkeypatch.setattr(dataset_module, "generate", lambda *_: pytest.fail("rendered twice"))
        assert ensure_generated(self.data, workers=1) == root

    def test_other_settings_are_another_set(self) -> None:
        key = GeneratedConfig.from_data_config(self.data).key()
        other = DataConfig(generated_train=6, generated_test_ids=2, generated_seed=4)
        assert GeneratedConfig.from_data_config(other).key() != key

    def test_an_interrupted_set_is_never_visible(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(dataset_module, "make_card", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ensure_generated(self.data, workers=1)
        left = [path.name for path in (tmp_path / "personvit").iterdir() if path.is_dir()]
        assert left == []
        assert (ensure_generated(self.data, workers=1) / "card.json").is_file()

    def test_a_damaged_set_is_rendered_again(self) -> None:
        root = ensure_generated(self.data, workers=1)
        (root / "card.json").unlink()
        assert (ensure_generated(self.data, workers=1) / "card.json").is_file()

    def test_two_at_a_time_render_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        real = dataset_module.generate

        def counted(*args: object, **kwargs: object) -> object:
            calls.append(1)
            return real(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(dataset_module, "generate", counted)
        with ThreadPoolExecutor(2) as pool:
            roots = list(pool.map(lambda _: ensure_generated(self.data, workers=1), range(2)))
        assert roots[0] == roots[1]
        assert len(calls) == 1

    def test_unwritable_cache_names_the_remedy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
        with pytest.raises(DataError, match="XDG_CACHE_HOME"):
            ensure_generated(self.data, workers=1)
