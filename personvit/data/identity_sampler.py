"""P x K batches: P identities, K images of each, drawn anew in every epoch."""

from __future__ import annotations

import numpy as np

from personvit.errors import ConfigError, DataError
from personvit.runtime.seed import stream_seed


class IdentitySampler:
    """Draw mini-batches of P identities with K images each (hustvl/PersonViT datasets/sampler.py).

    In every epoch the images of each identity are shuffled and cut in groups of K, the remainder left out; an identity
    of fewer than K images gets one group, drawn with replacement. While at least P identities have groups left, P of
    them are drawn without replacement, and each gives its next group. What then remains, of the identities with the
    most images, sits out. So no identity is twice in a mini-batch, and no image twice in an epoch unless its identity
    has fewer than K.

    Ranks share one draw of mini-batches, of batch_size / ranks images each, and take turns: triplets never cross
    ranks, and every rank makes the same number of steps.

    Args:
        pids: [n] int64 identities of the images.
        batch_size: images of a step, over all ranks.
        instances: K.
        seed: 63-bit seed of a stream.
    """

    def __init__(self, pids: np.ndarray, batch_size: int, instances: int, seed: int) -> None:
        self._batch_size, self._instances, self._seed = batch_size, instances, seed
        _, counts = np.unique(pids, return_counts=True)
        # Images by identity, in the order of their numbers.
        self._members = np.split(np.argsort(pids, kind="stable").astype(np.int64), np.cumsum(counts)[:-1])

    def batches(self, epoch: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """The mini-batches of a rank in an epoch, in order: a function of (seed, epoch).

        Args:
            epoch: from 0.
            rank: of this process.
            world_size: number of ranks.

        Returns:
            [batch_size / world_size] int64 numbers of images for every step, K of one identity in a row.

        Raises:
            ConfigError: the batch does not divide into mini-batches of at least two identities.
            DataError: too few identities for one step.
        """
        chosen = self._identities_per_batch(world_size)
        generator = np.random.Generator(np.random.PCG64(stream_seed(self._seed, epoch)))
        groups = [self._groups(images, generator) for images in self._members]
        left = np.array([len(group) for group in groups])
        drawn: list[np.ndarray] = []
        while len(available := np.flatnonzero(left)) >= chosen:
            identities = generator.choice(available, chosen, replace=False)
            left[identities] -= 1
            drawn.append(np.concatenate([groups[identity][left[identity]] for identity in identities]))
        steps = len(drawn) // world_size
        if steps == 0:
            raise DataError(
                f"an epoch of {len(self._members)} training identities makes {len(drawn)} mini-batches of "
                f"{chosen} identities, fewer than the {world_size} ranks. Start fewer ranks, or set a smaller "
                f"train.batch_size."
            )
        return drawn[rank : steps * world_size : world_size]

    def _groups(self, images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """[groups, K] of one identity."""
        if len(images) < self._instances:
            return generator.choice(images, (1, self._instances))
        shuffled = generator.permutation(images)
        return shuffled[: len(images) // self._instances * self._instances].reshape(-1, self._instances)

    def _identities_per_batch(self, world_size: int) -> int:
        """P of one rank's mini-batch."""
        batch_size, part = self._batch_size, world_size * self._instances
        chosen = batch_size // part
        if batch_size % part or chosen < 2:
            raise ConfigError(
                f"train.batch_size={batch_size} does not divide into {world_size} mini-batches (one for each rank) of "
                f"at least two identities with train.instances={self._instances} images each. Set "
                f"train.batch_size={max(2, chosen) * part}, or start fewer ranks."
            )
        identities = len(self._members)
        if identities < chosen:
            remedy = (
                f"Set train.batch_size={identities * part}, or give more identities with data.root."
                if identities >= 2
                else "A triplet needs at least two: give more identities with data.root."
            )
            raise DataError(
                f"{identities} training identities are fewer than the {chosen} of one mini-batch "
                f"(train.batch_size={batch_size} / {world_size} ranks / train.instances={self._instances}). {remedy}"
            )
        return chosen
