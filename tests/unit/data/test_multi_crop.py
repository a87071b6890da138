from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from personvit.config import CropsConfig
from personvit.data import MultiCrop, crops
from personvit.data.crops import crop_box

PLAIN = {"flip": 0.0, "jitter_probability": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.0, 0.0)}
SMALL = {"global_size": (32, 16), "local_size": (16, 8)}


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8))


def pixels(view: torch.Tensor, cfg: CropsConfig) -> torch.Tensor:
    """Undo the normalisation: [3, H, W] in [0, 255]."""
    return (view * torch.tensor(cfg.std).view(3, 1, 1) + torch.tensor(cfg.mean).view(3, 1, 1)) * 255


def test_order_sizes_and_dtype(noise):
    global_crops, local_crops = MultiCrop(CropsConfig(local_crops=3))(noise, 1)
    assert [tuple(view.shape) for view in global_crops] == [(3, 256, 128)] * 2
    assert [tuple(view.shape) for view in local_crops] == [(3, 128, 64)] * 3
    assert all(view.dtype == torch.float32 and view.is_contiguous() for view in global_crops + local_crops)


def test_no_local_crops(noise):
    global_crops, local_crops = MultiCrop(CropsConfig(**SMALL, local_crops=0))(noise, 1)
    assert (len(global_crops), local_crops) == (2, [])


def test_the_seed_decides_and_nothing_else(noise):
    make = MultiCrop(CropsConfig(**SMALL))
    random.seed(1)
    first = make(noise, 7)
    random.seed(2)
    torch.manual_seed(99)
    second = make(noise, 7)
    for one, other in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first[0][0], make(noise, 8)[0][0])
    assert not torch.equal(first[0][0], first[0][1])


def test_a_view_does_not_depend_on_the_number_of_views(noise):
    few, many = (MultiCrop(CropsConfig(**SMALL, local_crops=count))(noise, 3) for count in (1, 5))
    assert torch.equal(few[1][0], many[1][0])


def test_global_generators_are_left_alone(noise):
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    MultiCrop(CropsConfig(**SMALL))(noise, 7)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_without_augmentation_a_view_is_the_resized_normalised_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8))
    cfg = CropsConfig(global_size=(32, 16), global_scale=(1.0, 1.0), aspect_ratio=(0.5, 0.5), local_crops=0, **PLAIN)
    view = MultiCrop(cfg)(image, 0)[0][0]
    expected = torch.from_numpy(np.array(image.resize((16, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(cfg.mean).view(3, 1, 1)) / torch.tensor(cfg.std).view(3, 1, 1)
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0, 100, 127, 128, 200, 255])
def test_solarize_inverts_from_128_on(value):
    cfg = CropsConfig(**SMALL, **{**PLAIN, "solarize": (1.0, 0.0, 0.0)}, local_crops=0)
    first, second = MultiCrop(cfg)(Image.new("RGB", (40, 90), (value,) * 3), 0)[0]
    assert pixels(first, cfg).mean().round() == (255 - value if value >= 128 else value)
    assert pixels(second, cfg).mean().round() == value


def test_grey_has_three_equal_channels_with_the_usual_weights():
    cfg = CropsConfig(**SMALL, **{**PLAIN, "grayscale": 1.0}, local_crops=0)
    view = pixels(MultiCrop(cfg)(Image.new("RGB", (40, 90), (200, 100, 50)), 0)[0][0], cfg)
    assert view.std() < 1e-3
    assert view.mean().item() == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50, abs=1)


def test_blur_keeps_the_mean_and_takes_detail_by_the_radius(noise):
    spread = []
    for sigma in (0.1, 1.0, 2.0):
        cfg = CropsConfig(**SMALL, **{**PLAIN, "blur": (1.0, 0.0, 0.0)}, blur_sigma=(sigma, sigma), local_crops=0)
        blurred, sharp = (pixels(view, cfg) for view in MultiCrop(cfg)(noise, 5)[0])
        assert blurred.mean().item() == pytest.approx(sharp.mean().item(), abs=6)
        spread.append(blurred.std().item())
    assert spread[0] > 2 * spread[1] > 2 * spread[2]


def test_flip_mirrors():
    ramp = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (90, 1, 3)))
    for flip, sign in ((0.0, 1), (1.0, -1)):
        cfg = CropsConfig(**SMALL, **{**PLAIN, "flip": flip}, local_crops=0)
        view = MultiCrop(cfg)(ramp, 0)[0][0]
        assert (sign * view[0, 0].diff()).median() > 0


def test_jitter_draws_from_the_published_ranges(noise):
    seen: dict[str, list[float]] = {}
    orders = set()
    names = ("brightness", "contrast", "saturation", "hue")

    def spy(name):
        def adjust(image, factor):
            seen.setdefault(name, []).append(factor)
            current.append(name)
            return image

        return adjust

    with mock.patch.multiple(crops.F, **{f"adjust_{name}": spy(name) for name in names}):
        for seed in range(2000):
            current: list[str] = []
            crops._jitter(noise, (0.4, 0.4, 0.2, 0.1), random.Random(seed))
            orders.add(tuple(current))
    assert len(orders) == 24
    for name, (low, high) in zip(names, ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)), strict=True):
        values = np.array(seen[name])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))


def test_rates_of_every_operation_by_view():
    """Share of the seeds for which each operation runs, counted by the view in which it runs."""
    counts = np.zeros((3, 5))  # view x (flip, jitter, grey, blur, solarize)
    image = Image.new("RGB", (4, 8))
    make = MultiCrop(CropsConfig(global_size=(2, 1), local_size=(2, 1), local_crops=1))
    view = 0

    def spy(column):
        def operation(image, *args, **kwargs):
            counts[view, column] += 1
            return image

        return operation

    spies = {"horizontal_flip": spy(0), "rgb_to_grayscale": spy(2), "solarize": spy(4)}
    draws = 3000
    with (
        mock.patch.multiple(crops.F, resized_crop=lambda image, *args, **kwargs: image, **spies),
        mock.patch.object(crops, "_jitter", spy(1)),
        mock.patch.object(Image.Image, "filter", spy(3)),
    ):
        for seed in range(draws):
            for view in range(3):
                make._augment(image, make._views[view], random.Random(3 * seed + view))
    expected = [[0.5, 0.8, 0.2, 1.0, 0.0], [0.5, 0.8, 0.2, 0.1, 0.2], [0.5, 0.8, 0.2, 0.5, 0.0]]
    np.testing.assert_allclose(counts / draws, expected, atol=4 * 0.5 / draws**0.5)
    np.testing.assert_array_equal(counts[:, 3][:1], [draws])  # probability 1 never misses


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
    rng = random.Random(0)
    ours = np.array([crop_box(height, width, scale, ratio, rng) for _ in range(draws)], dtype=np.float64)
    stock = v2.RandomResizedCrop((4, 2), scale=scale, ratio=ratio)
    image = Image.new("RGB", (width, height))
    rows = [stock.make_params([image]) for _ in range(draws)]
    theirs = np.array([[row[key] for key in ("top", "left", "height", "width")] for row in rows], dtype=np.float64)
    for column in range(4):
        grid = np.sort(np.concatenate([ours[:, column], theirs[:, column]]))
        cdf = [np.searchsorted(np.sort(boxes[:, column]), grid, side="right") / draws for boxes in (ours, theirs)]
        assert np.abs(cdf[0] - cdf[1]).max() < 1.95 * (2 / draws) ** 0.5  # Kolmogorov-Smirnov, level 0.001


def test_views_of_a_solid_image_keep_its_colour_on_average():
    """Brightness, contrast and saturation factors are symmetric about 1: over many draws the colour stays."""
    cfg = CropsConfig(**SMALL, local_crops=0, solarize=(0.0, 0.0, 0.0), grayscale=0.0, jitter=(0.4, 0.4, 0.2, 0.0))
    image = Image.new("RGB", (20, 40), (120, 90, 60))
    make = MultiCrop(cfg)
    mean = torch.stack([pixels(make(image, seed)[0][0], cfg).mean((1, 2)) for seed in range(800)]).mean(0)
    torch.testing.assert_close(mean, torch.tensor([120.0, 90.0, 60.0]), rtol=0, atol=3)
