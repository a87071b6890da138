from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from personvit.config import CropsConfig
from personvit.data import MultiCrop
from personvit.data.views import crop_boxes

SIDES = st.integers(1, 400)
UNIT = st.floats(0.01, 1.0)
ASPECT = st.floats(0.1, 3.0)
COUNT = 20


def boxes(height, width, scale, ratio, seed):
    """[20, 4] boxes in an image."""
    u = np.random.default_rng(seed).random((COUNT, 1, 22))
    return crop_boxes(np.tile([[height, width]], (COUNT, 1)), np.array([scale]), ratio, u)[:, 0]


@given(SIDES, SIDES, st.tuples(UNIT, UNIT), st.tuples(ASPECT, ASPECT), st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_a_box_lies_in_the_image(height, width, scale, ratio, seed):
    for top, left, box_height, box_width in boxes(height, width, sorted(scale), tuple(sorted(ratio)), seed):
        assert box_height >= 1
        assert box_width >= 1
        assert 0 <= top <= height - box_height
        assert 0 <= left <= width - box_width


@given(st.integers(50, 400), st.integers(50, 400), st.integers(0, 2**63 - 1))
@settings(max_examples=100, deadline=None)
def test_area_and_aspect_of_a_box_are_as_asked_or_the_fall_back(height, width, seed):
    scale, ratio = (0.3, 0.6), (0.4, 0.6)
    for _, _, box_height, box_width in boxes(height, width, scale, ratio, seed):
        # Each side is rounded to a pixel, which moves aspect and area by less than this much.
        slack = 1 + 0.5 / box_width + 0.5 / box_height + 0.25 / (box_width * box_height)
        assert ratio[0] / slack <= box_width / box_height <= ratio[1] * slack
        share = box_height * box_width / (height * width)
        fills_a_side = box_height == height or box_width == width
        assert fills_a_side or scale[0] / slack**2 <= share <= scale[1] * slack**2


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**63 - 1), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_any_image_gives_finite_repeatable_views_in_range(height, width, seed, local_crops):
    cfg = CropsConfig(global_size=(16, 8), local_size=(8, 4), local_crops=local_crops)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    make = MultiCrop(cfg)
    global_crops, local_views = make(image, seed)
    assert (len(global_crops), len(local_views)) == (2, local_crops)
    low = (0 - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    high = (1 - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    again_global, again_local = make(image, seed)
    for view, again in zip(global_crops + local_views, again_global + again_local, strict=True):
        assert torch.equal(view, again)
        assert (view.amin((1, 2)) >= low - 1e-5).all()
        assert (view.amax((1, 2)) <= high + 1e-5).all()
