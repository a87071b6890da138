from __future__ import annotations

import copy
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from personvit.data.identity_sampler import IdentitySampler
from personvit.errors import ConfigError, DataError

P, K = 16, 4


def restated_epoch(pids: np.ndarray, rng: random.Random, np_rng: np.random.Generator) -> list[list[int]]:
    """One epoch of the published sampler, as its specification words it, without a thought for speed."""
    images = defaultdict(list)
    for number, pid in enumerate(pids.tolist()):
        images[pid].append(number)
    groups = {}
    for pid, found in images.items():
        chosen = copy.copy(found)
        if len(chosen) < K:
            chosen = np_rng.choice(chosen, size=K, replace=True).tolist()
        rng.shuffle(chosen)
        groups[pid] = [chosen[start : start + K] for start in range(0, len(chosen) - K + 1, K)]
    batches, available = [], list(groups)
    while len(available) >= P:
        batch = []
        for pid in rng.sample(available, P):
            batch += groups[pid].pop(0)
            if not groups[pid]:
                available.remove(pid)
        batches.append(batch)
    return batches


@pytest.fixture(scope="module")
def occluded_duke_like() -> np.ndarray:
    """15,618 images of 702 identities, of which a few have hundreds: as uneven as Occluded-Duke (211-213 batches)."""
    rank = (np.arange(702) + 0.5) / 702
    counts = np.minimum(426, 12 * (1 - rank) ** -0.53)
    counts = np.rint(counts / counts.sum() * 15_618).astype(int)
    counts[300] += 15_618 - counts.sum()
    return np.random.default_rng(0).permutation(np.repeat(np.arange(702), counts))


@pytest.fixture
def uneven() -> np.ndarray:
    """40 identities of 1 to 23 images."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(40), 1 + np.arange(40) * 7 % 23))


def test_an_epoch_is_as_long_as_the_published_one(occluded_duke_like):
    sampler = IdentitySampler(occluded_duke_like, P * K, K, seed=0)
    rng, np_rng = random.Random(0), np.random.default_rng(0)
    wanted = [len(restated_epoch(occluded_duke_like, rng, np_rng)) for _ in range(8)]
    found = [len(sampler.batches(epoch)) for epoch in range(8)]
    assert 208 <= min(wanted + found) <= max(wanted + found) <= 216
    assert abs(np.mean(found) - np.mean(wanted)) < 1.0


def test_images_and_identities_are_as_frequent_as_in_the_published_one(uneven):
    """The number of images of each identity in an epoch, and the share of each image, over many epochs."""
    epochs = 600
    sampler = IdentitySampler(uneven, P * K, K, seed=3)
    rng, np_rng = random.Random(3), np.random.default_rng(3)
    counts = np.zeros((2, len(uneven)))
    for epoch in range(epochs):
        for row, batches in enumerate((sampler.batches(epoch), restated_epoch(uneven, rng, np_rng))):
            counts[row] += np.bincount(np.concatenate(batches), minlength=len(uneven))
    mine, theirs = counts / epochs
    assert abs(mine - theirs).max() < 0.16  # of one image: 5 deviations of the difference of two rare draws
    by_identity = [np.bincount(uneven, weights=row, minlength=40) for row in (mine, theirs)]
    assert np.abs(by_identity[0] - by_identity[1]).max() < 0.75
    assert by_identity[0].sum() == pytest.approx(by_identity[1].sum(), rel=0.01)


def test_order_within_an_epoch_is_random_in_the_published_way(uneven):
    """How often each identity is in the first mini-batch: 16 of 40, whatever the number of its images."""
    sampler = IdentitySampler(uneven, P * K, K, seed=0)
    first = np.zeros(40)
    for epoch in range(400):
        first[np.unique(uneven[sampler.batches(epoch)[0]])] += 1
    assert abs(first / 400 - P / 40).max() < 0.1


def test_a_batch_has_p_identities_of_k_images_in_a_row(uneven):
    for epoch in range(5):
        for batch in IdentitySampler(uneven, P * K, K, seed=0).batches(epoch):
            assert batch.dtype == np.int64
            pids = uneven[batch].reshape(P, K)
            assert (pids == pids[:, :1]).all()
            assert len(np.unique(pids[:, 0])) == P


def test_no_image_comes_twice_unless_its_identity_is_small(uneven):
    sizes = Counter(uneven.tolist())
    repeated = 0
    for epoch in range(5):
        seen = Counter(np.concatenate(IdentitySampler(uneven, P * K, K, seed=0).batches(epoch)).tolist())
        for image, times in seen.items():
            if sizes[int(uneven[image])] >= K:
                assert times == 1
            else:
                repeated += times > 1
    assert repeated > 10


def test_an_epoch_is_a_function_of_seed_and_epoch(uneven):
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(IdentitySampler(uneven, P * K, K, seed).batches(epoch)).tolist()

    sampler = IdentitySampler(uneven, P * K, K, 0)
    sampler.batches(0)  # leaves nothing behind
    assert np.concatenate(sampler.batches(1)).tolist() == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6


def test_the_global_generators_are_left_alone(uneven):
    state, numpy_state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    IdentitySampler(uneven, P * K, K, seed=0).batches(0)
    assert random.getstate() == state
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_take_turns_and_make_the_same_number_of_steps(uneven, world_size):
    """All mini-batches of B / ranks images come from one draw, as if drawn for one rank of that batch size."""
    sampler = IdentitySampler(uneven, P * K, K, seed=0)
    ranks = [sampler.batches(2, rank, world_size) for rank in range(world_size)]
    whole = IdentitySampler(uneven, P * K // world_size, K, seed=0).batches(2)
    steps = len(whole) // world_size
    assert {len(rank) for rank in ranks} == {steps}
    for rank, batches in enumerate(ranks):
        for step, batch in enumerate(batches):
            assert np.array_equal(batch, whole[step * world_size + rank])
            assert len(np.unique(uneven[batch])) == P // world_size


@pytest.mark.parametrize(
    ("batch_size", "world_size", "remedy"), [(64, 3, 60), (20, 2, 16), (16, 4, 32), (8, 2, 16), (10, 1, 8)]
)
def test_a_batch_that_does_not_divide_is_refused_with_a_size_that_works(uneven, batch_size, world_size, remedy):
    with pytest.raises(ConfigError, match=rf"train\.batch_size={batch_size} .*Set train\.batch_size={remedy},"):
        IdentitySampler(uneven, batch_size, K, seed=0).batches(0, 0, world_size)
    if len(np.unique(uneven)) >= remedy / world_size / K:
        IdentitySampler(uneven, remedy, K, seed=0).batches(0, 0, world_size)


def test_too_few_identities_are_refused_with_a_size_that_works():
    pids = np.repeat(np.arange(5), 8)
    with pytest.raises(DataError, match=r"5 training identities.*fewer than the 16.*Set train\.batch_size=20,"):
        IdentitySampler(pids, 64, K, seed=0).batches(0)
    assert len(IdentitySampler(pids, 20, K, seed=0).batches(0)) == 2
    with pytest.raises(DataError, match="at least two"):
        IdentitySampler(np.zeros(9, dtype=np.int64), 64, K, seed=0).batches(0)


def test_more_ranks_than_mini_batches_are_refused():
    with pytest.raises(DataError, match=r"1 mini-batches.*4 ranks"):
        IdentitySampler(np.repeat(np.arange(3), 4), 32, K, seed=0).batches(0, 0, 4)


def test_labels_need_not_be_contiguous_nor_sorted():
    pids = np.array([70, -3, 70, 9, -3, 9, 70, 9, -3, 70])
    (batch,) = IdentitySampler(pids, 6, 3, seed=0).batches(0)[:1]
    found = pids[batch].reshape(2, 3)
    assert (found == found[:, :1]).all()
