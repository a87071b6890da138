from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from personvit.config import CropsConfig
from personvit.data.views import ViewParameters, crop_boxes, draw_views


def sizes(count: int, size: tuple[int, int] = (128, 64)) -> np.ndarray:
    return np.tile([size], (count, 1))


def assert_same(one: ViewParameters, other: ViewParameters) -> None:
    for entry in dataclasses.fields(ViewParameters):
        np.testing.assert_array_equal(getattr(one, entry.name), getattr(other, entry.name), err_msg=entry.name)


def test_a_batch_may_be_cut_anywhere():
    cfg = CropsConfig(local_crops=3)
    shapes = np.random.default_rng(0).integers(1, 300, (50, 2))
    whole = draw_views(cfg, shapes, seed=7, first=1000)
    for start, stop in ((0, 1), (1, 8), (8, 50)):
        assert_same(whole.rows(slice(start, stop)), draw_views(cfg, shapes[start:stop], seed=7, first=1000 + start))


def test_a_view_does_not_depend_on_the_number_of_views_nor_on_the_other_images():
    few, many = (draw_views(CropsConfig(local_crops=count), sizes(9), seed=7) for count in (1, 8))
    assert_same(few, many.views(slice(0, 3)))
    mixed = sizes(9)
    mixed[::2] = 40, 90
    other = draw_views(CropsConfig(local_crops=8), mixed, seed=7)
    assert_same(many.rows(slice(1, None, 2)), other.rows(slice(1, None, 2)))


def test_images_views_and_seeds_differ():
    p = draw_views(CropsConfig(local_crops=8), sizes(200), seed=7)
    assert len(np.unique(p.brightness[p.jitter])) == p.jitter.sum()
    other = draw_views(CropsConfig(local_crops=8), sizes(200), seed=8)
    assert not np.intersect1d(p.brightness[p.jitter], other.brightness[other.jitter]).size


def test_draws_of_an_image_are_uncorrelated():
    p = draw_views(CropsConfig(local_crops=1), sizes(4000, (400, 200)), seed=1)
    columns = [p.flip, p.grey, p.jitter, p.sigma > 0, p.solarize, p.top, p.left, p.height, p.order[..., 0]]
    table = np.corrcoef(np.stack([column[:, 1].astype(float) for column in columns]))
    table[5:8, 5:8] = np.eye(3)  # a larger box lies nearer the top and the left
    assert np.abs(table - np.eye(len(columns))).max() < 5 / 4000**0.5


def test_factors_come_from_the_published_ranges_in_every_order():
    p = draw_views(CropsConfig(local_crops=0), sizes(4000), seed=0)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ):
        values = getattr(p, name)
        values = values[values > 0] if name == "sigma" else values[p.jitter]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    orders, counts = np.unique(p.order.reshape(-1, 4), axis=0, return_counts=True)
    assert (np.sort(orders, axis=1) == range(4)).all()
    assert len(orders) == 24
    assert counts.min() > 0.7 * counts.mean()


def test_without_jitter_the_factors_are_neutral():
    p = draw_views(CropsConfig(local_crops=2), sizes(500), seed=0)
    off = ~p.jitter
    assert 0.15 < off.mean() < 0.25
    for factor in (p.brightness, p.contrast, p.saturation):
        assert (factor[off] == 1).all()
    assert (p.hue[off] == 0).all()


def test_rates_of_every_operation_by_view():
    draws = 3000
    p = draw_views(CropsConfig(local_crops=1), sizes(draws), seed=5)
    rates = np.stack([column.mean(0) for column in (p.flip, p.jitter, p.grey, p.sigma > 0, p.solarize)], axis=1)
    expected = [[0.5, 0.8, 0.2, 1.0, 0.0], [0.5, 0.8, 0.2, 0.1, 0.2], [0.5, 0.8, 0.2, 0.5, 0.0]]
    np.testing.assert_allclose(rates, expected, atol=4 * 0.5 / draws**0.5)
    assert (rates[:, 3] == 1).tolist() == [True, False, False]  # probability 1 never misses
    assert rates[0, 4] == 0  # nor does 0 ever happen


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((128, 64), (0.4, 1.0), (0.375, 0.6667)),
        ((256, 110), (0.05, 0.8), (0.375, 0.6667)),
        ((128, 57), (0.4, 1.0), (0.75, 1.3333)),  # mostly the fall-back
        ((60, 200), (0.4, 1.0), (0.375, 0.6667)),  # landscape
    ],
)
def test_boxes_have_the_distribution_of_torchvision(size, scale, ratio):
    draws = 3000
    height, width = size
    u = np.random.default_rng(0).random((draws, 1, 22))
    ours = crop_boxes(sizes(draws, size), np.array([scale]), ratio, u)[:, 0].astype(np.float64)
    stock = v2.RandomResizedCrop((4, 2), scale=scale, ratio=ratio)
    image = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    rows = [stock.make_params([image]) for _ in range(draws)]
    theirs = np.array([[row[key] for key in ("top", "left", "height", "width")] for row in rows], dtype=np.float64)
    for column in range(4):
        grid = np.sort(np.concatenate([ours[:, column], theirs[:, column]]))
        cdf = [np.searchsorted(np.sort(boxes[:, column]), grid, side="right") / draws for boxes in (ours, theirs)]
        assert np.abs(cdf[0] - cdf[1]).max() < 1.95 * (2 / draws) ** 0.5  # Kolmogorov-Smirnov, level 0.001


def test_global_and_local_scales_go_to_their_views():
    cfg = CropsConfig(local_crops=4, global_scale=(0.5, 0.5), local_scale=(0.1, 0.1))
    p = draw_views(cfg, sizes(300, (400, 200)), seed=2)
    share = p.height * p.width / (400 * 200)
    np.testing.assert_allclose(share[:, 2:], 0.1, atol=0.005)
    assert math.isclose(np.median(share[:, :2]), 0.5, abs_tol=0.005)
