from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_weights import tiny_reid

import personvit
from personvit.errors import DataError
from personvit.models.vit import vit_micro
from personvit.models.weights import save_backbone, save_reid

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(vit_micro(img_size=(32, 16), patch_size=8), path, {"mean": list(MEAN), "std": list(STD)})
    return path


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 20, 3), dtype=np.uint8)


def test_importing_the_package_stays_light():
    code = "import sys, personvit; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = personvit.no_such_name


def test_loaded_model_is_ready(weights):
    model = personvit.load(weights, device="cpu")
    assert not model.training
    assert (model.image_size, model.mean, model.std) == ((32, 16), MEAN, STD)
    features = model(torch.randn(2, 3, 32, 16))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_every_kind_of_image_gets_the_same_feature(weights, pixels, tmp_path):
    model = personvit.load(weights, device="cpu")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    expected = model.embed(paths)
    assert expected.features.shape == (3, 128)
    assert expected.paths == [str(path) for path in paths]
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    kinds = [
        [str(path) for path in paths],
        pixels,
        list(pixels),
        pixels.astype(np.float32) / 255,
        tensor,
        list(tensor),
        tensor.double() / 255,
        [Image.fromarray(image) for image in pixels],
        [paths[0], pixels[1], tensor[2]],
    ]
    for images in kinds:
        assert torch.equal(model.embed(images).features, expected.features)
    for single in (str(paths[0]), paths[0], pixels[0], tensor[0], Image.fromarray(pixels[0])):
        torch.testing.assert_close(model.embed(single).features, expected.features[:1])


def test_embed_equals_the_backbone_on_normalised_input(weights, pixels):
    model = personvit.load(weights, device="cpu")
    image = Image.fromarray(pixels[0]).resize((16, 32), Image.Resampling.BILINEAR)
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    batch = (batch - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.embed(pixels[0]).features, model(batch))


def test_labels_travel_along(weights, pixels):
    model = personvit.load(weights, device="cpu")
    result = model.embed(pixels, pids=[3, 1, 2], camids=[0, 1, 0], flip=True)
    assert result.pids.tolist() == [3, 1, 2]
    assert result.camids.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.randn(1, 3, 8, 4) - 3, "expected \\[0, 1\\].*model\\(batch\\)"),
        (torch.zeros(8, 4), "expected one image"),
        (np.zeros((3, 8, 4), np.uint8), "expected \\[H, W, 3\\]"),
        (torch.zeros(8, 4, 3, dtype=torch.uint8), "expected \\[3, H, W\\]"),
        (np.zeros((8, 4, 3), np.int64), "expected uint8"),
    ],
)
def test_what_is_no_image_is_refused(weights, images, message):
    with pytest.raises(ValueError, match=message):
        personvit.load(weights, device="cpu").embed(images)


def test_unreadable_file_is_named(weights, tmp_path):
    with pytest.raises(DataError, match="absent\\.jpg"):
        personvit.load(weights, device="cpu").embed([tmp_path / "absent.jpg"])


def test_other_image_size(weights, pixels):
    model = personvit.load(weights, image_size=(64, 32), device="cpu")
    assert model.image_size == (64, 32)
    assert model.embed(pixels).features.shape == (3, 128)


@pytest.mark.parametrize("neck_feat", ["before", "after"])
def test_fine_tuned_weights_give_the_feature_of_their_neck(tmp_path, pixels, neck_feat):
    trained = tiny_reid(neck_feat=neck_feat)
    save_reid(trained, tmp_path / "best.safetensors")
    model = personvit.load(tmp_path / "best.safetensors", device="cpu")
    assert (model.mean, model.image_size) == ((0.5, 0.5, 0.5), (64, 32))
    assert model.backbone is model.network.base
    batch = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        before = trained.base.embed(batch)
        expected = before if neck_feat == "before" else trained.bottleneck(before)
        torch.testing.assert_close(model(batch), F.normalize(expected, dim=1))
    assert model.embed(pixels).features.shape == (3, 64)


def test_camera_vectors_need_cameras(tmp_path, pixels):
    save_reid(tiny_reid(num_cameras=3), tmp_path / "best.safetensors")
    model = personvit.load(tmp_path / "best.safetensors", device="cpu")
    with pytest.raises(DataError, match="camera"):
        model.embed(pixels)
    first, second = (model.embed(pixels, camids=camids).features for camids in ([0, 0, 0], [0, 1, 2]))
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1:], second[1:], atol=1e-3)
