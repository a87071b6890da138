"""What a generated set contains, and the streams of random numbers behind it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from personvit.config import DataConfig
from personvit.errors import ConfigError

RENDERER_VERSION = 2
"""Raised whenever the same configuration would give other images, so that cached sets are drawn anew."""


POOL_CAMERA_FIRST = 1000
"""The pool's scenes are numbered from here on; the labelled cameras from 1."""


class Stream(IntEnum):
    """Independent random streams of one seed."""

    FAMILY = 1
    IDENTITY = 2
    CAMERA = 3
    SCENE = 4
    PLAN = 5
    CROP = 6
    NOISE = 7


@dataclass(frozen=True, kw_only=True)
class GeneratedConfig:
    """Size and difficulty of a generated set.

    The three groups of identities (pool, train, test) never overlap, and neither do the scenes of the pool and the
    cameras of the labelled split.
    """

    pool_images: int = 8000
    """Images of the unlabelled pool."""
    pool_images_per_id: float = 8.0
    """Mean number of pool images of one identity."""
    pool_cameras: int = 400
    """Scenes of the pool. Many, so that recognising a scene is no shortcut to telling images apart."""
    train_ids: int = 100
    test_ids: int = 100
    cameras: int = 6
    """Cameras of the labelled split."""
    train_images: int = 2
    """Images of one training identity in one camera."""
    gallery_images: int = 2
    """Gallery images of one test identity in one camera; the query has one more."""
    camera_probability: float = 0.8
    """Chance that an identity of the labelled split walks past a camera (each is seen by two at least)."""
    distractors: float = 2.0
    """Gallery images with pid 0000, per test identity: persons who are nobody's match."""
    junk: float = 0.5
    """Gallery images with pid -1, per test identity: boxes that missed the person, which the protocol drops."""
    occlusion: float = 0.2
    """Share of pool, training and query images with something in front of the person."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("pool_cameras", 1), ("cameras", 2), ("test_ids", 2)):
            _require(getattr(self, name) >= low, name, getattr(self, name), f"{low} or more")
        for name in ("pool_images", "train_ids", "train_images", "distractors", "junk", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.cameras <= 9, "cameras", self.cameras, "at most 9 (Market-1501 names carry one digit)")
        _require(self.gallery_images >= 1, "gallery_images", self.gallery_images, "1 or more")
        _require(self.pool_images_per_id >= 1, "pool_images_per_id", self.pool_images_per_id, "1 or more")
        for name in ("occlusion", "camera_probability"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "a probability in [0, 1]")

    @property
    def pool_ids(self) -> int:
        """Identities of the pool."""
        return max(1, round(self.pool_images / self.pool_images_per_id))

    @classmethod
    def from_data_config(cls, data: DataConfig) -> GeneratedConfig:
        """The set that the `generated_*` keys of `data` ask for."""
        ids = data.generated_train_ids
        return cls(
            pool_images=data.generated_train,
            train_ids=data.generated_test_ids if ids is None else ids,
            test_ids=data.generated_test_ids,
            seed=data.generated_seed,
        )

    def key(self) -> str:
        """Hexadecimal digest of the configuration and the renderer's version."""
        text = json.dumps({"renderer": RENDERER_VERSION, **dataclasses.asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def random_stream(seed: int, stream: Stream, *parts: int) -> np.random.Generator:
    """A generator that depends on these integers only: not on order, process, or what was drawn elsewhere."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(stream), *parts])))


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"generated persons: {name}={value} is out of range: expected {expected}.")
