"""What a fine-tuning trains on and is evaluated on."""

from __future__ import annotations

import dataclasses
import os
import zlib
from dataclasses import dataclass

from personvit.config import FinetuneConfig
from personvit.data.reid_sets import (
    ReIDSet,
    ReIDSplit,
    camera_offsets,
    open_training,
    read_training_sets,
)
from personvit.errors import ConfigError

GENERATED = "generated"


@dataclass(frozen=True)
class FinetuneData:
    """Labelled images.

    Attributes:
        train: training images of all sets together.
        training: the sets that they come from.
        testing: sets to evaluate on, each apart; their cameras are numbered as in `train` where the model needs them.
        num_cameras: cameras of the training sets.
    """

    train: ReIDSplit
    training: list[ReIDSet]
    testing: list[ReIDSet]
    num_cameras: int

    @property
    def num_ids(self) -> int:
        """Identities of the training images."""
        return int(self.train.pids.max()) + 1

    @property
    def names(self) -> list[str]:
        """Names of the training sets."""
        return [one.name for one in self.training]

    def identity(self) -> dict[str, int]:
        """What tells this training set from another: `images`, `ids`, and a checksum of names, pids and camids."""
        checksum = zlib.crc32("\n".join(os.path.basename(path) for path in self.train.paths).encode("utf-8", "replace"))
        for labels in (self.train.pids, self.train.camids):
            checksum = zlib.crc32(labels.astype("<i8").tobytes(), checksum)
        return {"images": len(self.train), "ids": self.num_ids, "labels": checksum}

    def tables(self) -> list[str]:
        """Identities, images and cameras of every set, beside the official counts."""
        apart = [one for one in self.testing if (one.name, one.root) not in {(t.name, t.root) for t in self.training}]
        return [one.table() for one in (*self.training, *apart)]


def open_finetune_data(cfg: FinetuneConfig) -> FinetuneData:
    """Read the sets that a configuration names. No image is opened.

    Raises:
        ConfigError: names and folders that do not go together; camera embeddings, and a set to evaluate on whose
            cameras are not trained.
        DataError: a set that cannot be read, trained on or scored.
    """
    train, testing = open_training(cfg.data, keep_same_camera=cfg.eval.protocol == "keep")
    same = cfg.data.test_name is None and cfg.data.test_root is None
    training = testing if same else read_training_sets(cfg.data)
    offsets = camera_offsets(training)
    if cfg.model.camera_embed:
        places = {(one.name, one.root): offset for one, offset in zip(training, offsets, strict=False)}
        testing = [_with_cameras_from(one, places) for one in testing]
    return FinetuneData(train, training, testing, offsets[-1])


def _with_cameras_from(one: ReIDSet, places: dict[tuple[str, str], int]) -> ReIDSet:
    """A set to evaluate on with its cameras numbered as in the joined training images."""
    offset = places.get((one.name, one.root))
    if offset is None:
        raise ConfigError(
            f"model.camera_embed=true learns a vector for every camera of data.name={','.join(n for n, _ in places)}, "
            f"and {one.name} in {one.root} has other cameras. Evaluate on the sets that are trained on (leave "
            f"data.test_name out), or use model.camera_embed=false."
        )
    query, gallery = (dataclasses.replace(part, camids=part.camids + offset) for part in (one.query, one.gallery))
    return dataclasses.replace(one, query=query, gallery=gallery)
