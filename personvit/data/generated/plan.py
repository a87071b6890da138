"""Which pictures a set consists of: file names, persons, cameras. Drawn once, before anything is rendered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from personvit.data.generated.camera import make_camera
from personvit.data.generated.config import POOL_CAMERA_FIRST, GeneratedConfig, Stream, random_stream
from personvit.data.generated.crop import Shot, track_heading

TEST_FIRST, TRAIN_FIRST, EXTRA_FIRST, POOL_FIRST = 0, 1_000_000, 2_000_000, 3_000_000
"""Identity numbers start here: test, train, distractors and junk, pool. Apart, so that the groups never overlap."""

POOL_SERIAL_FIRST = 10_000_000
"""Serial numbers of the pool start here, so that its size changes nothing in the labelled split."""


@dataclass(frozen=True, slots=True)
class Item:
    """A file of the set and how to draw it."""

    name: str
    """Path below the root of the set, with forward slashes."""
    shot: Shot


def make_plan(config: GeneratedConfig) -> list[Item]:
    """All pictures of a set, those of one camera next to each other."""
    items = _pool(config) + _labelled(config)
    return sorted(items, key=lambda item: (item.shot.camera, item.shot.serial))


def _pool(config: GeneratedConfig) -> list[Item]:
    rng = random_stream(config.seed, Stream.PLAN, 0)
    count = config.pool_images
    # Every identity and every camera first appears once, then at random; neither order shows in the file names.
    persons = np.concatenate([np.arange(config.pool_ids), rng.integers(0, config.pool_ids, count)])[:count]
    cameras = rng.integers(0, config.pool_cameras, count)
    occluded = rng.random(count) < config.occlusion
    order = rng.permutation(count)
    return [
        Item(
            f"pool/{int(place):08d}.jpg",
            Shot(
                pid=POOL_FIRST + int(person),
                camera=POOL_CAMERA_FIRST + int(camera),
                serial=POOL_SERIAL_FIRST + int(place),
                occluded=bool(hidden),
            ),
        )
        for place, person, camera, hidden in zip(order, persons, cameras, occluded, strict=True)
    ]


class _Namer:
    """Hands out Market-1501 names and serial numbers."""

    def __init__(self, config: GeneratedConfig) -> None:
        self.config = config
        self.serial = 0
        self.rng = random_stream(config.seed, Stream.PLAN, 1)
        self.items: list[Item] = []

    def add(
        self, folder: str, label: int, pid: int, camera: int, heading: float, hide: float, miss: bool = False
    ) -> None:
        """One picture of `pid`, labelled `label`."""
        shot = Shot(pid, camera, self.serial, heading, bool(self.rng.random() < hide), miss)
        pid_text = "-1" if label < 0 else f"{label:04d}"
        name = f"{folder}/{pid_text}_c{camera}s1_{self.serial:06d}_{int(self.rng.integers(0, 10)):02d}.jpg"
        self.items.append(Item(name, shot))
        self.serial += 1


def _labelled(config: GeneratedConfig) -> list[Item]:
    names = _Namer(config)
    rng = names.rng
    cameras = {number: make_camera(config.seed, number) for number in range(1, config.cameras + 1)}

    def seen_by() -> list[int]:
        chosen = [number for number in cameras if rng.random() < config.camera_probability]
        for number in rng.permutation(list(cameras)):
            if len(chosen) < 2 and int(number) not in chosen:
                chosen.append(int(number))
        return sorted(chosen)

    for index in range(config.test_ids):
        for number in seen_by():
            heading = track_heading(rng, cameras[number])
            names.add("query", 1 + index, TEST_FIRST + index, number, heading, config.occlusion)
            for _ in range(config.gallery_images):
                names.add("bounding_box_test", 1 + index, TEST_FIRST + index, number, heading, config.occlusion / 2)
    for index in range(config.train_ids):
        label = 1 + config.test_ids + index
        for number in seen_by():
            heading = track_heading(rng, cameras[number])
            for _ in range(config.train_images):
                names.add("bounding_box_train", label, TRAIN_FIRST + index, number, heading, config.occlusion)
    distractors, junk = round(config.distractors * config.test_ids), round(config.junk * config.test_ids)
    for index in range(distractors + junk):
        number = int(rng.integers(1, config.cameras + 1))
        heading = track_heading(rng, cameras[number])
        missed = index >= distractors
        names.add("bounding_box_test", -1 if missed else 0, EXTRA_FIRST + index, number, heading, 0.1, missed)
    return names.items
