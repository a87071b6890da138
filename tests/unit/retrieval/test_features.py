from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from personvit.errors import DataError
from personvit.retrieval.features import UNKNOWN, RawPixels, extract_features, to_input

MEAN, STD, SIZE = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), (8, 4)


class Probe(nn.Module):
    """Linear map of the pixels; remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * SIZE[0] * SIZE[1], 5)
        self.dropout = nn.Dropout(0.5)
        self.dtypes = []

    def embed(self, images):
        out = self.dropout(self.linear(images.flatten(1)))
        self.dtypes.append(out.dtype)
        return out


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(7):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (20 + i, 11, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


def test_to_input_is_bilinear_resize_then_normalise():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image.resize((4, 8), Image.Resampling.BILINEAR)).astype(np.float32) / 255
    expected = (expected - np.array(MEAN)) / np.array(STD)
    tensor = to_input(image, SIZE, MEAN, STD)
    assert tensor.shape == (3, 8, 4)
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_length_and_labels(files, num_workers):
    model = Probe()
    result = extract_features(
        model, files, SIZE, MEAN, STD, batch_size=3, pids=range(7), camids=[0] * 7, num_workers=num_workers
    )
    inputs = torch.stack([to_input(Image.open(path), SIZE, MEAN, STD) for path in files])
    with torch.no_grad():
        expected = model.eval().embed(inputs)
    torch.testing.assert_close(result.features, nn.functional.normalize(expected, dim=1))
    np.testing.assert_array_equal(result.pids, np.arange(7))
    assert result.paths == files
    assert len(result) == 7


def test_labels_are_unknown_unless_told(files):
    result = extract_features(RawPixels(), files[:2], SIZE, MEAN, STD)
    assert (result.pids == UNKNOWN).all()
    assert (result.camids == UNKNOWN).all()
    with pytest.raises(ValueError, match="pids has shape"):
        extract_features(RawPixels(), files[:2], SIZE, MEAN, STD, pids=[1])


def test_model_mode_and_global_generators_are_left_alone(files):
    model = Probe().train()
    state = torch.get_rng_state()
    extract_features(model, files, SIZE, MEAN, STD, num_workers=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_inside_autocast(files):
    model = Probe()
    plain = extract_features(model, files, SIZE, MEAN, STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extract_features(model, files, SIZE, MEAN, STD)
    assert set(model.dtypes) == {torch.float32}
    assert torch.equal(plain.features, inside.features)


def test_flip_makes_an_image_and_its_mirror_alike(files):
    image = Image.open(files[0]).resize((4, 8))
    pair = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    different = extract_features(RawPixels(), pair, SIZE, MEAN, STD).features
    same = extract_features(RawPixels(), pair, SIZE, MEAN, STD, flip=True).features
    assert (different[0] - different[1]).abs().max() > 0.01
    torch.testing.assert_close(same[0], same[1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_stops_and_is_named(files, tmp_path, num_workers):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8\xff\xe0 not really")
    with pytest.raises(DataError, match=r"damaged\.jpg: .* repair or remove") as caught:
        extract_features(RawPixels(), [*files, str(damaged)], SIZE, MEAN, STD, num_workers=num_workers)
    assert "Traceback" not in str(caught.value)


def test_features_that_are_not_finite_are_refused(files):
    model = Probe()
    nn.init.constant_(model.linear.weight, float("nan"))
    with pytest.raises(DataError, match="diverged"):
        extract_features(model, files, SIZE, MEAN, STD)


def test_nothing_gives_an_empty_set():
    assert len(extract_features(RawPixels(), [], SIZE, MEAN, STD)) == 0
