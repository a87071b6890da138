from __future__ import annotations

import pytest
import torch

from personvit import ops
from personvit.errors import ConfigError, DataError
from personvit.losses import IdentityLoss, TripletLoss
from personvit.models import ReIDModel, VisionTransformer, vit_small
from personvit.models.vit import cls_rows


def _base(**overrides) -> VisionTransformer:
    return VisionTransformer(**{"img_size": (64, 32), "embed_dim": 32, "depth": 2, "num_heads": 2, **overrides})


def _images(count=6):
    return torch.randn(count, 3, 64, 32)


@pytest.fixture
def backend():
    yield ops.set_backend
    ops.set_backend("auto")


def test_names_and_sizes_are_those_of_the_published_files():
    with torch.device("meta"):
        model = ReIDModel(vit_small(), 1041)
        state = model.state_dict()
    heads = {name: tuple(value.shape) for name, value in state.items() if not name.startswith("base.")}
    assert heads == {
        "bottleneck.weight": (384,),
        "bottleneck.bias": (384,),
        "bottleneck.running_mean": (384,),
        "bottleneck.running_var": (384,),
        "bottleneck.num_batches_tracked": (),
        "classifier.weight": (1041, 384),
    }
    assert len(state) == 156  # the published 158, less the unused base.fc
    fc = 384 * 1000 + 1000
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_425_064 - fc


def test_camera_vectors_carry_the_published_name():
    state = ReIDModel(_base(num_cameras=6), 5).state_dict()
    assert state["base.sie_embed"].shape == (6, 1, 32)
    assert 0.01 < state["base.sie_embed"].std() < 0.03
    for cameras in (0, 1):
        assert "base.sie_embed" not in ReIDModel(_base(num_cameras=cameras), 5).state_dict()


def test_published_initialisation_and_frozen_bias():
    model = ReIDModel(_base(), 500)
    assert 0.0009 < model.classifier.weight.std() < 0.0011
    assert model.classifier.bias is None
    assert not model.bottleneck.bias.any()
    assert (model.bottleneck.weight == 1).all()
    outputs = model(_images())
    (outputs.logits.square().sum() + outputs.features.sum()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["bottleneck.bias"]


def test_logits_come_after_the_norm_and_features_before():
    model, images = ReIDModel(_base(), 5), _images()
    logits, features = model(images)
    normed = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(features, model.base.embed(images))
    torch.testing.assert_close(logits, normed @ model.classifier.weight.T, rtol=1e-4, atol=1e-6)


def test_neck_feat_chooses_what_embed_gives():
    before, images = ReIDModel(_base(), 5), _images()
    after = ReIDModel(before.base, 5, neck_feat="after").eval()
    after.bottleneck.running_mean.normal_()
    after.bottleneck.running_var.uniform_(0.5, 2)
    before.eval()
    with torch.no_grad():
        plain = before.base.embed(images)
        assert torch.equal(before.embed(images), plain)
        expected = (plain - after.bottleneck.running_mean) / (after.bottleneck.running_var + 1e-5).sqrt()
        torch.testing.assert_close(after.embed(images), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_between_norm_and_classifier_and_in_training_only():
    model, images = ReIDModel(_base(), 5, dropout=0.5), _images()
    first = model(images)
    torch.testing.assert_close(model.bottleneck.running_mean, 0.1 * first.features.mean(0))  # the norm sees all of it
    second = model(images)
    assert torch.equal(first.features, second.features)
    assert not torch.equal(first.logits, second.logits)
    model.eval()
    assert torch.equal(model(images).logits, model(images).logits)


def test_bad_arguments_name_the_key():
    with pytest.raises(ConfigError, match=r"model\.neck_feat=middle is unknown. Choose before or after"):
        ReIDModel(_base(), 5, neck_feat="middle")
    with pytest.raises(ConfigError, match=r"num_ids=0.*data\.root"):
        ReIDModel(_base(), 0)


def test_outputs_are_float32_under_autocast():
    model, images = ReIDModel(_base(), 5), _images()
    exact = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, features = model(images)
        embedded = model.embed(images)
    assert logits.dtype == features.dtype == embedded.dtype == torch.float32
    assert not torch.equal(features, exact.features)  # the blocks did compute in bfloat16
    assert not torch.equal(features, features.bfloat16().float())  # and the last norm did not round to it
    normed = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(logits, normed @ model.classifier.weight.T, rtol=1e-4, atol=1e-6)


def test_camera_vector_is_added_to_every_token():
    base = _base(num_cameras=3, sie_coefficient=2.5).double().eval()
    plain = _base().double().eval()
    plain.load_state_dict({name: value for name, value in base.state_dict().items() if name != "sie_embed"})
    images, camids = _images(3).double(), torch.tensor([2, 0, 2])
    for number in range(3):
        shifted = _base().double().eval()
        shifted.load_state_dict(plain.state_dict())
        with torch.no_grad():
            shifted.pos_embed += 2.5 * base.sie_embed[camids[number]]  # positions reach every token, the CLS token too
        ours, expected = base.embed(images, camids)[number], shifted.embed(images)[number]
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert (ours - plain.embed(images)[number]).abs().max() > 1e-3
    torch.testing.assert_close(base.intermediate(images, 1, camids)[0][:, 0], base.embed(images, camids))


def test_camera_vectors_of_several_resolutions_meet_their_own_images():
    base = _base(num_cameras=4).double().eval()
    large, small, camids = _images(2).double(), torch.randn(3, 3, 32, 16).double(), torch.tensor([3, 1, 0, 2, 0])
    rows = cls_rows([(2, 9), (3, 3)], camids.device)
    together = base._run([large, small], [None, None], rows, camids)[0]
    apart = torch.cat([base.embed(large, camids[:2]), base.embed(small, camids[2:])])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


def test_camera_vectors_learn_from_their_own_images_only():
    base = _base(num_cameras=4).double()
    images, camids = _images(4).double(), torch.tensor([1, 3, 1, 3])
    weight = torch.randn(4, 32, dtype=torch.float64)
    (base.embed(images, camids) * weight).sum().backward()
    assert base.sie_embed.grad[[0, 2]].abs().max() == 0
    step, direction = 1e-6, torch.randn(32, dtype=torch.float64)

    def value(sign):
        moved = _base(num_cameras=4).double()
        moved.load_state_dict(base.state_dict())
        with torch.no_grad():
            moved.sie_embed[3, 0] += sign * step * direction
            return (moved.embed(images, camids) * weight).sum()

    slope = (value(1) - value(-1)) / (2 * step)
    torch.testing.assert_close((base.sie_embed.grad[3, 0] * direction).sum(), slope, rtol=1e-6, atol=1e-6)


def test_cameras_that_are_missing_or_unknown_are_named():
    model = ReIDModel(_base(num_cameras=3), 5)
    assert model.num_cameras == 3
    with pytest.raises(DataError, match=r"each of its 3 cameras.*give camids"):
        model(_images(2))
    with pytest.raises(DataError, match=r"each of its 3 cameras"):
        model.base(_images(2))
    with pytest.raises(DataError, match=r"Camera 3 \(counted from 0\).*cameras 0 to 2"):
        model.embed(_images(2), torch.tensor([0, 3]))
    with pytest.raises(DataError, match=r"Camera -1 "):
        model.embed(_images(2), torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match=r"expected \[2\]"):
        model.embed(_images(2), torch.tensor([0]))


def test_cameras_are_ignored_where_none_were_learned():
    model, images = ReIDModel(_base(), 5).eval(), _images(2)
    assert torch.equal(model.embed(images, torch.tensor([7, 99])), model.embed(images))


@pytest.mark.parametrize("cameras", [0, 3])
def test_fused_and_reference_backends_give_one_loss_and_one_gradient(backend, cameras):
    """Here --fused is the fastest CPU implementation of every operator; drop path is on, and drawn alike."""
    images, labels, camids = _images(8), torch.arange(4).repeat_interleave(2), torch.arange(8) % 3
    model = ReIDModel(_base(num_cameras=cameras, drop_path_rate=0.3), 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    losses, gradients = [], []
    for mode in ("reference", "fused"):
        backend(mode)
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(3)
        logits, features = model(images, camids)
        loss = IdentityLoss()(logits, labels) + TripletLoss()(features, labels)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
