"""The batched colour path against Pillow, operation by operation, in 8-bit levels."""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from personvit.config import CropsConfig
from personvit.data.crops import MultiCrop
from personvit.data.photometry import Photometry, gaussian_kernels
from personvit.data.views import ViewParameters, draw_views
from personvit.ops import backend, colour, native

HEIGHT, WIDTH = 128, 64
CFG = CropsConfig(global_size=(HEIGHT, WIDTH), local_size=(HEIGHT, WIDTH), local_crops=0, mean=(0,) * 3, std=(1,) * 3)
CPU = torch.device("cpu")


def pictures(count: int) -> np.ndarray:
    """[N, H, W, 3] uint8: smooth blobs of moderate colours with edges and some noise, not many pixels near 0 or 255."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = rng.integers(40, 200, (9, 5, 3), dtype=np.uint8)
        image = np.array(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(int)
        image[20:60, 10:30] += rng.integers(-40, 40, 3)
        found.append((image + rng.integers(-8, 9, image.shape)).clip(0, 255).astype(np.uint8))
    return np.stack(found)


def parameters(count: int, **given) -> ViewParameters:
    """Whole image, nothing done, except what is given as [N] arrays."""
    ones, zeros = np.ones((count, 1)), np.zeros((count, 1))
    neutral = ViewParameters(
        top=zeros.astype(int),
        left=zeros.astype(int),
        height=np.full((count, 1), HEIGHT),
        width=np.full((count, 1), WIDTH),
        flip=zeros > 0,
        jitter=np.full((count, 1), bool({"brightness", "contrast", "saturation", "hue"} & given.keys())),
        brightness=ones,
        contrast=ones,
        saturation=ones,
        hue=zeros,
        order=np.tile(np.arange(4), (count, 1, 1)),
        grey=zeros > 0,
        sigma=zeros,
        solarize=zeros > 0,
    )
    return dataclasses.replace(neutral, **{name: np.asarray(value)[:, None] for name, value in given.items()})


def by_pillow(images: np.ndarray, drawn: ViewParameters) -> torch.Tensor:
    """[N, 3, H, W] float levels."""
    make = MultiCrop(CFG)
    views = [
        np.array(make.render(Image.fromarray(image), drawn.rows(slice(row, row + 1)), 0))
        for row, image in enumerate(images)
    ]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float()


def by_batch(images: np.ndarray, drawn: ViewParameters, cfg: CropsConfig = CFG) -> torch.Tensor:
    views = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    out = torch.full(views.shape, torch.nan)
    Photometry(cfg, CPU)(views, drawn, out)
    return out * 255


SPREAD = np.linspace(-1, 1, 12)
# Mean absolute difference that is tolerated, in levels. Pillow cuts off what brightness, contrast and saturation leave
# behind the point (half a level on average), and turns hue in HSV, which also moves luma; YIQ does not.
OPERATIONS = {
    "nothing": ({}, 1e-4),
    "brightness": ({"brightness": 1 + 0.4 * SPREAD}, 0.75),
    "contrast": ({"contrast": 1 + 0.4 * SPREAD}, 0.75),
    "saturation": ({"saturation": 1 + 0.2 * SPREAD}, 0.75),
    "grey": ({"grey": np.ones(12, dtype=bool)}, 0.5),
    "solarize": ({"solarize": np.ones(12, dtype=bool)}, 1e-4),
    "blur": ({"sigma": np.linspace(0.1, 2.0, 12)}, 1.0),
    "hue": ({"hue": 0.1 * SPREAD}, 10.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows_within_its_tolerance(name):
    given, tolerance = OPERATIONS[name]
    images = pictures(12)
    drawn = parameters(12, **given)
    ours, theirs = by_batch(images, drawn), by_pillow(images, drawn)
    assert (ours - theirs).abs().mean() <= tolerance
    if name not in ("nothing", "solarize", "hue"):  # the operation does more than the difference that is left
        untouched = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        assert (theirs - untouched).abs().mean() > 2.5 * (ours - theirs).abs().mean()


@pytest.mark.parametrize("turn", [0.1, 0.05, -0.1])
@pytest.mark.parametrize("colour", [(170, 110, 90), (90, 140, 120), (90, 100, 160)])
def test_a_hue_shift_turns_hue_as_far_as_pillows_and_keeps_luma(colour, turn):
    images = np.tile(np.array(colour, dtype=np.uint8), (1, HEIGHT, WIDTH, 1))
    drawn = parameters(1, hue=np.array([turn]))
    ours, theirs = (move(images, drawn)[0, :, 0, 0] for move in (by_batch, by_pillow))
    hue, other = (colorsys.rgb_to_hsv(*(rgb / 255).tolist())[0] for rgb in (ours, theirs))
    assert abs((hue - other + 0.5) % 1 - 0.5) < 0.06
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert luma @ ours == pytest.approx(float(luma @ torch.tensor(colour, dtype=torch.float32)), abs=1)


def test_the_four_colour_operations_commute_up_to_clipping_and_hue():
    """Pillow in every order stays near the one affine map, which has none."""
    images = pictures(24)
    rng = np.random.default_rng(1)
    drawn = parameters(
        24, brightness=rng.uniform(0.8, 1.15, 24), contrast=rng.uniform(0.8, 1.15, 24),
        saturation=rng.uniform(0.8, 1.1, 24),
    )  # fmt: skip
    orders = draw_views(CropsConfig(local_crops=0), np.full((24, 2), 50), 0).order[:, :1]
    shuffled = dataclasses.replace(drawn, order=orders)
    assert len(np.unique(orders.reshape(24, 4), axis=0)) > 10
    ours = by_batch(images, drawn)
    assert torch.equal(ours, by_batch(images, shuffled))
    assert (ours - by_pillow(images, shuffled)).abs().mean() < 2.0  # three times half a level, and some clipping


def test_the_whole_recipe_has_pillows_statistics():
    """The same draws through both: means and spreads of the views agree, over the recipe's own ranges."""
    count = 200
    images = pictures(count)
    drawn = draw_views(CropsConfig(local_crops=1), np.full((count, 2), 100), seed=0)
    for view in range(3):
        p = drawn.views(slice(view, view + 1))
        whole = parameters(count)
        p = dataclasses.replace(
            p, top=whole.top, left=whole.left, height=whole.height, width=whole.width, flip=whole.flip
        )
        ours, theirs = by_batch(images, p), by_pillow(images, p)
        assert (ours - theirs).abs().mean() < 8  # hue
        assert (ours.mean((0, 2, 3)) - theirs.mean((0, 2, 3))).abs().max() < 1.5
        assert (ours.std((2, 3)).mean() / theirs.std((2, 3)).mean() - 1).abs() < 0.02


def test_results_do_not_depend_on_threads_chunks_or_the_rest_of_the_batch(monkeypatch):
    images = pictures(40)
    drawn = draw_views(CropsConfig(local_crops=1), np.full((40, 2), 100), seed=3).views(slice(2, 3))
    whole = by_batch(images, drawn)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(by_batch(images, drawn), whole)
    finally:
        torch.set_num_threads(threads)
    for start, stop in ((0, 1), (1, 6), (6, 40)):
        assert torch.equal(by_batch(images[start:stop], drawn.rows(slice(start, stop))), whole[start:stop])
    for chunk in (1 << 18, 1):
        monkeypatch.setattr(colour, "_CHUNK", chunk)
        backend.set_backend("reference")
        try:
            assert torch.equal(by_batch(images, drawn), whole)
        finally:
            backend.set_backend("auto")


def test_a_convolution_and_shifted_sums_are_the_same_bit_for_bit():
    images = torch.from_numpy(pictures(6)).permute(0, 3, 1, 2).float().contiguous()
    kernels = torch.from_numpy(gaussian_kernels(np.linspace(0.3, 2, 6), np.full(6, 6)))
    for dim in (2, 3):
        one, other = (f(images, kernels, dim) for f in (colour._convolve, colour._add_shifted))
        assert torch.equal(one, other)


def test_kernels_sum_to_one_and_end_at_three_sigma():
    kernels = gaussian_kernels(np.array([0.1, 0.5, 2.0]), np.array([1, 2, 6]))
    assert kernels.shape == (3, 13)
    assert (kernels.sum(1, dtype=np.float64) == 1).all()
    assert (kernels >= 0).all()
    np.testing.assert_array_equal((kernels > 0).sum(1), [1, 5, 13])
    np.testing.assert_allclose(kernels[2] @ np.arange(-6, 7) ** 2, 2.0**2, rtol=0.05)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3)])
def test_views_smaller_than_the_blur(size):
    images = np.full((2, *size, 3), 90, dtype=np.uint8)
    out = by_batch(images, parameters(2, sigma=np.array([2.0, 0.0])))
    torch.testing.assert_close(out, torch.full(out.shape, 90.0))


def test_solarize_inverts_from_128_on_and_normalisation_is_the_recipes():
    cfg = CropsConfig(local_crops=0)
    images = np.array([0, 127, 128, 255], dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    out = by_batch(images, parameters(4, solarize=np.array([True] * 4)), cfg)
    levels = (out[:, :, 0, 0] / 255) * torch.tensor(cfg.std) + torch.tensor(cfg.mean)
    torch.testing.assert_close(levels * 255, torch.tensor([0.0, 127, 127, 0])[:, None].expand(4, 3), rtol=0, atol=1e-3)


def operands(count: int, size: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    """Everything at random, wider than any recipe: colours out of range, all reaches that the size allows."""
    generator = torch.Generator().manual_seed(seed)
    radius = torch.randint(0, 1 + min(4, size[0] - 1, size[1] - 1), (count,), generator=generator)
    sigma = torch.rand(count, generator=generator, dtype=torch.float64) + 0.2
    kernels = torch.zeros(count, 9)
    kernels[:, 4 - int(radius.max()) : 5 + int(radius.max())] = torch.from_numpy(
        gaussian_kernels(sigma.numpy(), radius.numpy())
    )
    maps = torch.round((4 * torch.rand(count, 3, 4, generator=generator) - 2) / colour.COLOUR_UNIT) * colour.COLOUR_UNIT
    return [
        torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator),
        maps,
        kernels,
        radius,
        torch.rand(count, generator=generator) < 0.5,
        torch.tensor([0.485, 0.456, 0.406]),
        torch.tensor([0.229, 0.224, 0.225]),
    ]


SIZES = [(1, 1), (1, 9), (2, 3), (7, 5), (19, 33), (64, 32), (31, 40), (48, 63), (16, 127), (5, 129)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 19])
def test_the_native_operator_is_the_reference_bit_for_bit(size, count):
    assert native.load_cpu() is None, native.BUILD_COMMAND
    given = operands(count, size)
    one, other = (torch.full(given[0].shape, torch.nan) for _ in range(2))
    native.photometry(*given, one)
    colour._reference(*given, other)
    assert torch.equal(one, other)  # NaN would not equal itself
    strided = [given[0].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), *given[1:]]
    again = torch.full(given[0].shape, torch.nan)
    native.photometry(*strided, again)
    assert torch.equal(again, one)


def test_the_mean_grey_is_rounded_as_by_pillow():
    """Also where it lies half way between two levels, and for more pixels than float32 can add up."""
    for levels, size in (((1, 0), (1, 1000)), ((127, 128), (300, 300)), ((255, 255), (300, 300))):
        views = torch.full((1, 3, *size), levels[0], dtype=torch.uint8)
        views[..., : size[1] // 2] = levels[1]
        expected = int((levels[0] + levels[1]) / 2 + 0.5)
        only_mean = torch.tensor([0.0, 0, 0, 1]).expand(1, 3, 4)
        still = (torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), torch.tensor([False]))
        for function in (native.photometry, colour._reference):
            out = torch.empty(views.shape)
            function(views, only_mean, *still, torch.zeros(3), torch.ones(3), out)
            torch.testing.assert_close(out * 255, torch.full(views.shape, float(expected)))


def test_the_operator_is_registered_as_torch_wants_it():
    assert native.load_cpu() is None
    given = operands(4, (9, 8))
    torch.library.opcheck(torch.ops.personvit.photometry, (*given, torch.empty(given[0].shape)))
    assert {("photometry", "native"), ("photometry", "reference")} <= set(backend._implementations)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, lambda x: x.float()),
        (0, lambda x: x[:, :2]),
        (1, lambda x: x[:, :, :3]),
        (2, lambda x: x[:, :8]),
        (3, lambda x: x[:2]),
        (3, lambda x: x - 1),
        (3, lambda x: x + 5),
        (4, lambda x: x[:2]),
        (7, lambda x: x.double()),
        (7, lambda x: x.transpose(2, 3)),
    ],
)
def test_operands_that_do_not_fit_are_refused(place, change):
    given = [*operands(4, (9, 9)), torch.zeros(4, 3, 9, 9)]
    given[place] = change(given[place])
    with pytest.raises((ValueError, RuntimeError), match="photometry"):
        colour.photometry(*given)
    with pytest.raises(RuntimeError, match="photometry"):
        native.photometry(*given)


def test_no_views_are_no_work():
    given = [*operands(4, (9, 9)), torch.zeros(4, 3, 9, 9)]
    colour.photometry(*(x[:0] if place not in (5, 6) else x for place, x in enumerate(given)))
