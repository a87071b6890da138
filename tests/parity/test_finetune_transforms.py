"""The training transforms of fine-tuning against torchvision, operation by operation, and against timm's erasing."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from personvit.config.finetune import InputConfig
from personvit.data.reid_transforms import InputFinish, draw_inputs, resize

CPU = torch.device("cpu")
PUBLISHED = InputConfig()


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ours(cfg: InputConfig, images: list[Image.Image], seed: int = 0, first: int = 0):
    parameters = draw_inputs(cfg, len(images), seed, first)
    resized = torch.stack([resize(i, cfg.size, bool(f)) for i, f in zip(images, parameters.flip, strict=True)])
    out = torch.empty(resized.shape)
    InputFinish(cfg, CPU)(resized, parameters, out)
    return out, parameters


def published(cfg: InputConfig, image: Image.Image, flip: bool, top: int, left: int) -> torch.Tensor:
    """torchvision's functions of the published Compose, up to the erasing."""
    height, width = cfg.size
    image = TF.resize(image, [height, width], interpolation=InterpolationMode.BICUBIC)
    image = TF.hflip(image) if flip else image
    image = TF.crop(TF.pad(image, cfg.pad, fill=0), top, left, height, width)
    return TF.normalize(TF.to_tensor(image), cfg.mean, cfg.std)


@pytest.mark.parametrize("size", [(64, 128), (128, 256), (200, 300), (35, 61), (1, 1), (7, 400)])
@pytest.mark.parametrize("flip", [False, True])
def test_resize_and_flip_equal_torchvision_bit_for_bit(size, flip):
    image = picture(0, size)
    wanted = TF.resize(image, [256, 128], interpolation=InterpolationMode.BICUBIC)
    wanted = TF.hflip(wanted) if flip else wanted
    assert torch.equal(resize(image, (256, 128), flip), TF.pil_to_tensor(wanted))


@pytest.mark.parametrize("pad", [0, 10, 50])
@pytest.mark.parametrize(("mean", "std"), [((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_everything_but_the_erasing_equals_torchvision_bit_for_bit(pad, mean, std):
    cfg = InputConfig(size=(48, 32), pad=pad, mean=mean, std=std, erase=0.0)
    images = [picture(number, (20 + number, 70 - number)) for number in range(24)]
    found, parameters = ours(cfg, images)
    assert 0 < parameters.flip.sum() < 24
    for number, image in enumerate(images):
        flip, top, left = (getattr(parameters, name)[number].item() for name in ("flip", "top", "left"))
        assert torch.equal(found[number], published(cfg, image, flip, top, left)), number


def test_erased_pixels_are_normal_noise_and_the_others_are_untouched():
    cfg = InputConfig(size=(96, 48), erase=1.0)
    images = [picture(number, (48, 96)) for number in range(64)]
    found, parameters = ours(cfg, images)
    noise = []
    for number, image in enumerate(images):
        flip, top, left = (getattr(parameters, name)[number].item() for name in ("flip", "top", "left"))
        wanted = published(cfg, image, flip, top, left)
        top, left, tall, wide = parameters.box[number].tolist()
        inside = torch.zeros(96, 48, dtype=torch.bool)
        inside[top : top + tall, left : left + wide] = True
        assert torch.equal(found[number][:, ~inside], wanted[:, ~inside])
        noise.append(found[number][:, inside])
    values = torch.cat([part.flatten() for part in noise])
    assert abs(values.mean()) < 5 / math.sqrt(len(values))
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * len(values))
    assert (values.abs() > 3).float().mean() == pytest.approx(0.0027, abs=0.0006)
    # Every channel and every image has noise of its own.
    shortest = min(part.shape[1] for part in noise)
    rows = torch.cat([part[:, :shortest] for part in noise])
    assert len(torch.unique(rows[:, 0])) == len(rows)


@pytest.fixture(scope="module")
def timm_boxes() -> np.ndarray:
    """[20000, 4] boxes of timm's RandomErasing with the published arguments; zeros where nothing was erased."""
    erasing = pytest.importorskip("timm.data.random_erasing").RandomErasing(
        probability=0.5, mode="pixel", max_count=1, device="cpu"
    )
    boxes = np.zeros((20_000, 4))
    random.seed(0)

    class Image_:
        """Takes the place of the picture: only where it is written to matters."""

        def __setitem__(self, key, value):
            rows, columns = key[1:]
            self.box = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)

    for number in range(len(boxes)):
        image = Image_()
        erasing._erase(image, 3, 256, 128, torch.float32)
        boxes[number] = getattr(image, "box", (0, 0, 0, 0))
    return boxes


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov-Smirnov: the largest difference of two distribution functions."""
    values = np.concatenate([one, other])
    return max(
        abs((np.sort(one).searchsorted(values, side="right") / len(one))
            - (np.sort(other).searchsorted(values, side="right") / len(other)))
    )  # fmt: skip


def test_erasing_boxes_are_distributed_as_timms(timm_boxes):
    boxes = draw_inputs(PUBLISHED, 20_000, seed=0).box
    shares = [(b[:, 2] > 0).mean() for b in (boxes, timm_boxes)]
    assert shares[0] == pytest.approx(0.5, abs=0.015)
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
    one, other = (b[b[:, 2] > 0].astype(float) for b in (boxes, timm_boxes))
    limit = 1.95 * math.sqrt(1 / len(one) + 1 / len(other))  # exceeded by chance once in a thousand times
    for name, value in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 2] / b[:, 3],
        "height": lambda b: b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "place": lambda b: b[:, 1] / (128 - b[:, 3]),
    }.items():
        assert distance(value(one), value(other)) < limit, name


def test_boxes_stay_inside_and_are_smaller_than_the_image():
    for size in ((256, 128), (32, 16), (8, 4)):
        cfg = dataclasses.replace(PUBLISHED, size=size, erase=1.0)
        top, left, tall, wide = draw_inputs(cfg, 5000, seed=3).box.T
        assert (tall < size[0]).all()
        assert (wide < size[1]).all()
        assert ((top + tall <= size[0]) & (left + wide <= size[1])).all()
        if size == (256, 128):
            assert (top + tall).max() == 256  # the last place counts
            assert (left + wide).max() == 128


def test_an_image_too_flat_for_the_aspect_is_left_whole():
    """No box of this area is narrower than the image."""
    cfg = dataclasses.replace(PUBLISHED, size=(256, 2), erase=1.0, erase_area=(0.3, 1 / 3), erase_aspect=(0.9, 1.1))
    assert not draw_inputs(cfg, 100, seed=0).box.any()


def test_flips_and_crops_have_their_frequencies():
    drawn = draw_inputs(PUBLISHED, 40_000, seed=1)
    assert drawn.flip.mean() == pytest.approx(0.5, abs=0.0125)
    for corner in (drawn.top, drawn.left):
        counts = np.bincount(corner, minlength=21)
        assert len(counts) == 21  # 0 ... 2 * pad
        assert abs(counts / 40_000 - 1 / 21).max() < 0.006
    assert abs(np.corrcoef(drawn.top, drawn.left)[0, 1]) < 0.02
    assert not draw_inputs(dataclasses.replace(PUBLISHED, flip=0.0), 1000, seed=1).flip.any()
    assert draw_inputs(dataclasses.replace(PUBLISHED, flip=1.0), 1000, seed=1).flip.all()


def test_an_image_depends_on_its_number_alone():
    whole = draw_inputs(PUBLISHED, 64, seed=5)
    part = draw_inputs(PUBLISHED, 16, seed=5, first=24)
    other = draw_inputs(PUBLISHED, 64, seed=6)
    for entry in dataclasses.fields(whole):
        assert np.array_equal(getattr(whole.rows(slice(24, 40)), entry.name), getattr(part, entry.name))
        assert not np.array_equal(getattr(whole, entry.name), getattr(other, entry.name))
    images = [picture(number, (32, 64)) for number in range(6)]
    cfg = InputConfig(size=(64, 32), erase=1.0)
    assert torch.equal(ours(cfg, images)[0][4:], ours(cfg, images[4:], first=4)[0])
