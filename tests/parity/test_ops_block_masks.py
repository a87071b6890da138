"""Native masks equal the Python reference in every bit, and iBOT's masks in distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from personvit.ops import backend, native, reference

IBOT = (math.log(0.3), math.log(1 / 0.3))


@pytest.fixture(autouse=True)
def _extension() -> None:
    if native.load_cpu() is not None:
        pytest.fail(f"{native.load_cpu()}: {native.BUILD_COMMAND}")


@pytest.mark.parametrize(
    ("grid", "aspect"),
    [((16, 8), IBOT), ((14, 14), IBOT), ((8, 4), IBOT), ((64, 64), IBOT), ((3, 64), IBOT), ((1, 5), IBOT),
     ((16, 8), (0.0, 0.0)), ((24, 12), (-6.9, 6.9))],
)  # fmt: skip
def test_same_bits(grid: tuple[int, int], aspect: tuple[float, float]) -> None:
    cells = grid[0] * grid[1]
    targets = torch.cat([torch.rand(60) * cells, torch.tensor([0.0, math.nan, -1.0, 3.0 * cells])])
    for seed, first in ((0, 0), (-5, 2**62), (123456789, 7)):
        fast = native.block_masks(targets, *grid, seed, first, *aspect)
        plain = reference.block_masks(targets, *grid, seed, first, *aspect)
        assert torch.equal(fast, plain)


def test_portable_exp_is_an_exponential() -> None:
    x = np.linspace(-8, 8, 4001)
    ours = np.array([reference.portable_exp(float(value)) for value in x])
    np.testing.assert_allclose(ours, np.exp(x), rtol=1e-13)


def test_splitmix64_known_answer() -> None:
    assert reference.mix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # first output from state 0


@pytest.mark.parametrize(
    ("tag", "grid"), [("scalar", (16, 8)), ("list", (16, 8)), ("fixed", (16, 8)), ("high", (16, 8))]
)
def test_distribution_of_the_published_generator(golden, tag: str, grid: tuple[int, int]) -> None:
    values = golden("mask_gen")
    cells = grid[0] * grid[1]
    # The published draws' own targets, 20 masks for each: what remains is the noise of the published sample.
    targets = torch.from_numpy(values[f"{tag}_target"]).float() * cells
    masks = native.block_masks(targets.repeat(20), *grid, 11, 0, *IBOT)
    counts = masks.sum((1, 2)).numpy()
    assert (counts <= np.floor(targets.repeat(20).double().numpy() + 1e-6)).all()
    assert counts.mean() / cells == pytest.approx(values[f"{tag}_count"].mean() / cells, abs=0.005)
    histogram = np.bincount(counts, minlength=cells + 1) / len(counts)
    published = values[f"{tag}_count_hist"] / values[f"{tag}_count_hist"].sum()
    assert np.abs(histogram - published).sum() / 2 < 0.05
    np.testing.assert_allclose(masks.float().mean(0).numpy(), values[f"{tag}_pos_mean"], atol=0.03)


def test_distribution_on_a_square_grid(golden) -> None:
    values = golden("mask_gen")
    histogram = values["sq14_count_hist"]
    generator = torch.Generator().manual_seed(0)
    targets = (0.1 + 0.4 * torch.rand(50000, generator=generator)) * 196
    masks = native.block_masks(targets, 14, 14, 3, 0, *IBOT)
    published = (histogram * np.arange(197)).sum() / histogram.sum() / 196
    assert masks.float().mean().item() == pytest.approx(published, abs=0.006)
    np.testing.assert_allclose(masks.float().mean(0).numpy(), values["sq14_pos_mean"], atol=0.03)


def test_both_backends_are_registered() -> None:
    assert {("block_masks", "native"), ("block_masks", "reference")} <= set(backend._implementations)
