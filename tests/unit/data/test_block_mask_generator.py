from __future__ import annotations

import pytest
import torch

from personvit.config import MasksConfig
from personvit.data import BlockMaskGenerator
from personvit.errors import ConfigError


@pytest.mark.parametrize("shape", ["block", "rand"])
def test_a_crop_depends_on_seed_and_number_only(shape):
    generator = BlockMaskGenerator(MasksConfig(shape=shape), (16, 8))
    whole = generator(40, seed=5, first=100)
    parts = torch.cat([generator(7, 5, first=100), generator(1, 5, first=107), generator(32, 5, first=108)])
    assert whole.shape == (40, 16, 8)
    assert whole.dtype == torch.bool
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, generator(40, seed=6, first=100))
    assert len({mask.numpy().tobytes() for mask in whole if mask.any()}) == int(whole.flatten(1).any(1).sum())


def test_ratios_are_a_fair_choice_between_the_pairs():
    ratios = BlockMaskGenerator(MasksConfig(ratio=(0.0, 0.3, 0.6), ratio_var=(0.0, 0.2, 0.0)), (16, 8)).ratios(30000, 1)
    middle = ratios[(ratios > 0) & (ratios != 0.6)]
    for share in ((ratios == 0).mean(), (ratios == 0.6).mean(), len(middle) / len(ratios)):
        assert share == pytest.approx(1 / 3, abs=0.01)
    assert 0.1 <= middle.min() < 0.102
    assert 0.498 < middle.max() < 0.5
    assert middle.std() == pytest.approx(0.4 / 12**0.5, abs=0.002)


def test_rand_masks_exactly_the_floor_of_the_target():
    generator = BlockMaskGenerator(MasksConfig(shape="rand", ratio=(0.3,), ratio_var=(0.2,)), (16, 8))
    counts = generator(500, seed=3).flatten(1).sum(1)
    wanted = (torch.from_numpy(generator.ratios(500, 3)) * 128).to(torch.int64)
    assert torch.equal(counts, wanted)


def test_disabled_and_empty():
    generator = BlockMaskGenerator(MasksConfig(), (4, 2))
    assert not generator(10, seed=0, enabled=False).any()
    assert generator(0, seed=0).shape == (0, 4, 2)


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    BlockMaskGenerator(MasksConfig(), (16, 8))(5, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_grid_that_the_operator_cannot_draw_on_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"100x8.*model\.patch_size"):
        BlockMaskGenerator(MasksConfig(), (100, 8))
