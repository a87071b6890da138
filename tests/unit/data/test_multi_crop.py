from __future__ import annotations

import itertools
import random
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from personvit.config import CropsConfig
from personvit.data import MultiCrop, crops
from personvit.data.views import draw_views

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


def test_operations_run_in_the_order_and_with_the_factors_that_were_drawn(noise):
    """Against spies: every drawn factor reaches its operation, in the drawn order, only where it was drawn."""
    cfg = CropsConfig(global_size=(4, 2), local_size=(2, 1), local_crops=2)
    make = MultiCrop(cfg)
    done: list[tuple] = []

    def spy(name):
        def operation(image, *args, **kwargs):
            done.append((name, *args))
            return image

        return operation

    factors = ("brightness", "contrast", "saturation", "hue")
    others = {name: spy(name) for name in ("resized_crop", "horizontal_flip", "solarize")}
    colours = {f"adjust_{name}": spy(name) for name in factors}
    drawn = draw_views(cfg, np.tile([[noise.height, noise.width]], (200, 1)), seed=3)
    with (
        mock.patch.multiple(crops.F, rgb_to_grayscale=lambda image, **kwargs: spy("grey")(image), **others, **colours),
        mock.patch.object(Image.Image, "filter", lambda image, kernel: spy("blur")(image, kernel.radius)),
    ):
        for row, view in itertools.product(range(200), range(4)):
            p = drawn.rows(slice(row, row + 1))
            at = (0, view)
            done.clear()
            make.render(noise, p, view)
            size = [4, 2] if view < 2 else [2, 1]
            expected = [("resized_crop", p.top[at], p.left[at], p.height[at], p.width[at], size)]
            expected += [("horizontal_flip",)] * int(p.flip[at])
            if p.jitter[at]:
                expected += [(factors[step], getattr(p, factors[step])[at]) for step in p.order[at]]
            expected += [("grey",)] * int(p.grey[at])
            expected += [("blur", p.sigma[at])] * int(p.sigma[at] > 0)
            expected += [("solarize", 128)] * int(p.solarize[at])
            assert done == expected


def test_views_of_a_solid_image_keep_its_colour_on_average():
    """Brightness, contrast and saturation factors are symmetric about 1: over many draws the colour stays."""
    cfg = CropsConfig(**SMALL, local_crops=0, solarize=(0.0, 0.0, 0.0), grayscale=0.0, jitter=(0.4, 0.4, 0.2, 0.0))
    image = Image.new("RGB", (20, 40), (120, 90, 60))
    make = MultiCrop(cfg)
    mean = torch.stack([pixels(make(image, seed)[0][0], cfg).mean((1, 2)) for seed in range(800)]).mean(0)
    torch.testing.assert_close(mean, torch.tensor([120.0, 90.0, 60.0]), rtol=0, atol=3)
