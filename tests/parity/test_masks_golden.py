"""Mask statistics against bytedance/ibot loader.py run as published (tests/golden/mask_gen.npz)."""

from __future__ import annotations

import numpy as np
import pytest

from personvit.config import MasksConfig
from personvit.data import BlockMaskGenerator

DRAWS = 40_000
RATIOS = {
    "scalar": ((0.3,), (0.2,)),
    "list": ((0.0, 0.3), (0.0, 0.2)),
    "fixed": ((0.3,), (0.0,)),
    "high": ((0.6,), (0.1,)),
}


def draw(grid: tuple[int, int], tag: str, shape: str = "block", count: int = DRAWS) -> np.ndarray:
    ratio, ratio_var = RATIOS[tag]
    cfg = MasksConfig(ratio=ratio, ratio_var=ratio_var, shape=shape)
    return BlockMaskGenerator(cfg, grid)(count, seed=2024).numpy()


def total_variation(counts: np.ndarray, reference: np.ndarray) -> float:
    ours = np.bincount(counts, minlength=len(reference)) / len(counts)
    return 0.5 * float(np.abs(ours - reference / reference.sum()).sum())


@pytest.mark.parametrize("tag", RATIOS)
def test_block_masks_on_16x8(golden, tag):
    expected = golden("mask_gen")
    masks = draw((16, 8), tag)
    counts = masks.sum((1, 2))
    # The published draws are 5,000, so their own mean ratio has a standard error of up to 0.0023.
    assert masks.mean() == pytest.approx(expected[f"{tag}_count"].mean() / 128, abs=0.005)
    np.testing.assert_allclose(masks.mean(0), expected[f"{tag}_pos_mean"], atol=0.03)
    assert total_variation(counts, expected[f"{tag}_count_hist"]) < 0.05
    assert (counts == 0).mean() == pytest.approx((expected[f"{tag}_count"] == 0).mean(), abs=0.02)


@pytest.mark.parametrize("tag", RATIOS)
def test_targets_are_missed_by_as_little_and_never_exceeded(golden, tag):
    expected = golden("mask_gen")
    ratio, ratio_var = RATIOS[tag]
    generator = BlockMaskGenerator(MasksConfig(ratio=ratio, ratio_var=ratio_var), (16, 8))
    wanted = generator.ratios(DRAWS, seed=2024) * 128
    short = wanted - generator(DRAWS, seed=2024).numpy().sum((1, 2))
    published = expected[f"{tag}_target"].astype(np.float64) * 128 - expected[f"{tag}_count"]
    assert short.min() > -1e-4  # targets travel as float32
    assert short.mean() == pytest.approx(published.mean(), abs=0.05)


def test_block_masks_on_14x14(golden):
    expected = golden("mask_gen")
    masks = draw((14, 14), "scalar")
    np.testing.assert_allclose(masks.mean(0), expected["sq14_pos_mean"], atol=0.03)
    # 5,000 published draws over 80 counts are 0.050 from their own distribution in the median; over 40 pairs, 0.035.
    pairs = np.append(expected["sq14_count_hist"], 0).reshape(-1, 2).sum(1)
    assert total_variation(masks.sum((1, 2)) // 2, pairs) < 0.05


def test_rand_masks(golden):
    expected = golden("mask_gen")
    np.testing.assert_array_equal(expected["rand_count"], np.floor(expected["rand_target"] * 128))
    masks = draw((16, 8), "scalar", shape="rand")
    assert masks.mean() == pytest.approx(expected["rand_count"].mean() / 128, abs=0.02)  # 500 published draws
    np.testing.assert_allclose(masks.mean(0), masks.mean(), atol=0.01)  # every cell is as likely
