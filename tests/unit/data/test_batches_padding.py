"""Masked patches padded to a fixed number: the same steps, in shapes that do not change."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from personvit.config import CropsConfig, DataConfig, HeadConfig, MasksConfig, ModelConfig, PretrainConfig, TrainConfig
from personvit.data import batches
from personvit.data.batches import CropBatch
from personvit.data.loaders import build_pretrain_loader
from personvit.data.masks import BlockMaskGenerator, mask_bound, masked_patches
from personvit.data.sources import FolderSource
from personvit.engine.health import HealthMonitor
from personvit.losses import IBOTPatchLoss
from personvit.models.ssl import SSLOutputs, StudentTeacher

K = 24


def config(**sections) -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(loader="torchvision", num_workers=0),
        model=ModelConfig(arch="vit_micro", patch_size=8, drop_path=0.0),
        crops=CropsConfig(global_size=(64, 32), local_size=(32, 16), local_crops=1),
        head=HeadConfig(prototypes=K, patch_prototypes=K, hidden_dim=32, bottleneck_dim=16),
        train=TrainConfig(batch_size=6),
        **sections,
    )


def crop_batch(bound: int | None, count: int = 6) -> CropBatch:
    cfg = config()
    generator = torch.Generator().manual_seed(1)
    masks = BlockMaskGenerator(cfg.masks, (8, 4))(2 * count, seed=3).flatten(1)
    indices, weights = masked_patches(masks, bound)
    return CropBatch(
        global_crops=torch.randn(2 * count, 3, 64, 32, generator=generator, dtype=torch.float64),
        local_crops=torch.randn(count, 3, 32, 16, generator=generator, dtype=torch.float64),
        masks=masks,
        mask_indices=indices,
        mask_weights=weights,
        positions=torch.arange(count),
        bad=[],
    )


def test_the_bound_is_mean_plus_six_sigma_of_what_is_drawn():
    """64 images of 128 patches: 2433 +- 245 masked were counted with the published code."""
    cfg = MasksConfig()
    bound = mask_bound(cfg, 128, 128)
    assert 2433 + 6 * 245 <= bound <= 2433 + 6.5 * 245
    masks = BlockMaskGenerator(cfg, (16, 8))(128 * 200, seed=0)
    counts = masks.view(200, -1).sum(1).double()
    assert counts.max() < bound
    assert counts.mean() + 4 * counts.std() < bound < counts.mean() + 8 * counts.std()


def test_the_bound_knows_its_limits():
    assert mask_bound(MasksConfig(), 128, 1) == 128  # all patches
    assert mask_bound(MasksConfig(ratio=(0.0,), ratio_var=(0.0,)), 128, 128) == 0
    assert mask_bound(MasksConfig(ratio=(0.5,), ratio_var=(0.0,)), 128, 10) == 640  # no spread, no reserve
    assert mask_bound(MasksConfig(ratio=(0.3,), ratio_var=(0.0,)), 10, 9) == 32  # 27, in rows that kernels like


def test_padding_is_of_other_patches_without_weight_behind_the_masked_ones():
    masks = BlockMaskGenerator(MasksConfig(), (8, 4))(12, seed=3).flatten(1)
    plain, plain_weights = masked_patches(masks)
    count = len(plain)
    assert 0 < count < 100
    for bound, length in ((120, 120), (count, count), (count - 1, 2 * (count - 1)), (200, 200), (1000, 384)):
        indices, weights = masked_patches(masks, bound)
        assert len(indices) == len(weights) == length
        assert torch.equal(indices[:count], plain)
        assert torch.equal(weights[:count], plain_weights)
        assert not weights[count:].any()
        assert len(indices.unique()) == length
        assert not masks.flatten()[indices[count:]].any()
        assert (indices.dtype, weights.dtype) == (torch.int64, torch.float32)
    for bound in (None, 0):
        assert torch.equal(masked_patches(masks, bound)[0], plain)
    nothing = torch.zeros(4, 32, dtype=torch.bool)
    assert [len(part) for part in masked_patches(nothing, 16)] == [16, 16]


def test_every_batch_of_an_epoch_has_the_same_shapes_where_shapes_matter(make_images, monkeypatch):
    source = FolderSource(make_images(40))
    cfg = dataclasses.replace(config(), train=TrainConfig(batch_size=20, accumulate=2))
    plain = list(build_pretrain_loader(cfg, source, 0, 1, 0))
    assert len({len(batch.mask_indices) for batch in plain}) > 1
    monkeypatch.setattr(batches, "pads_masks", lambda: True)
    padded = list(build_pretrain_loader(cfg, source, 0, 1, 0))
    assert {len(batch.mask_indices) for batch in padded} == {mask_bound(cfg.masks, 32, 20)}
    for one, other in zip(plain, padded, strict=True):
        assert one.masked == other.masked == len(one.mask_indices) == int(one.masks.sum())
        assert torch.equal(one.mask_indices, other.mask_indices[: one.masked])
        assert torch.equal(one.global_crops, other.global_crops)
    late = dataclasses.replace(cfg, masks=MasksConfig(start_epoch=1))
    for batch in build_pretrain_loader(late, source, 0, 1, 0):
        assert batch.mask_indices.shape == batch.mask_weights.shape == (0,)


def test_without_a_cuda_device_nothing_is_padded():
    assert batches.pads_masks() == torch.cuda.is_available()


def loss_and_gradients(batch: CropBatch, centering: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = StudentTeacher(config()).double()
    outputs = model(batch)
    loss = IBOTPatchLoss(K, centering=centering)(
        outputs.student_patch, outputs.teacher_patch, batch.mask_weights, len(batch.global_crops), 0.05
    )
    (loss + outputs.student_cls.square().mean()).backward()
    return loss.detach(), {n: p.grad for n, p in model.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
def test_loss_and_every_gradient_stay_what_they_were(centering):
    expected, gradients = loss_and_gradients(crop_batch(None), centering)
    found, others = loss_and_gradients(crop_batch(200), centering)
    assert expected > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
def test_padding_alone_is_a_loss_of_nothing(centering):
    student = torch.randn(16, K, requires_grad=True)
    loss = IBOTPatchLoss(K, centering=centering)(student, torch.randn(16, K), torch.zeros(16), 4, 0.05)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_health_looks_at_masked_patches_only():
    def patch_row(patches: torch.Tensor, masked: int | None) -> dict[str, float]:
        cls, features = torch.randn(8, K), torch.randn(8, 16)
        outputs = SSLOutputs(cls, patches, cls, patches, torch.zeros(K), features, features)
        monitor = HealthMonitor(K, 16)
        monitor.update(outputs, None, 0.1, 0.1, patch_centre=torch.zeros(1, 1, K), masked=masked)
        return {name: value for name, value in monitor.row().items() if name.startswith("patch")}

    sharp, flat = torch.zeros(10, K), torch.zeros(30, K)
    sharp[:, 5] = 100.0
    padded = torch.cat([sharp, flat])
    assert patch_row(padded, 10) == patch_row(sharp, None)
    assert patch_row(padded, 10)["patch_entropy"] == pytest.approx(0, abs=1e-6)
    assert patch_row(padded, None)["patch_entropy"] == pytest.approx(0.75 * math.log(K), rel=1e-4)
    assert patch_row(padded, 0) == {}
