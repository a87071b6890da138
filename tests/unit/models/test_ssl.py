from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from personvit.config import CropsConfig, HeadConfig, ModelConfig, PretrainConfig
from personvit.models import StudentTeacher, save_backbone

IMAGES, LOCALS = 3, 2


@dataclass(frozen=True)
class Batch:
    global_crops: Tensor
    local_crops: Tensor | None
    masks: Tensor
    mask_indices: Tensor


def _config(shared=True, drop_path=0.0, weights=None, norm_last_layer=False) -> PretrainConfig:
    return PretrainConfig(
        crops=CropsConfig(global_size=(64, 32), local_size=(32, 16), local_crops=LOCALS),
        model=ModelConfig(arch="vit_micro", patch_size=8, drop_path=drop_path, weights=weights),
        head=HeadConfig(
            prototypes=24,
            patch_prototypes=24 if shared else 40,
            shared=shared,
            hidden_dim=32,
            bottleneck_dim=16,
            norm_last_layer=norm_last_layer,
        ),
    )


def _batch(ratio=0.3, local=True) -> Batch:
    masks = torch.rand(2 * IMAGES, 32) < ratio
    masks[1] = False
    return Batch(
        global_crops=torch.randn(2 * IMAGES, 3, 64, 32),
        local_crops=torch.randn(LOCALS * IMAGES, 3, 32, 16) if local else None,
        masks=masks,
        mask_indices=masks.flatten().nonzero().squeeze(1),
    )


def _shaken(model: StudentTeacher) -> StudentTeacher:
    """Student and teacher apart from each other and from their initial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("shared", [True, False])
def test_outputs_equal_the_dense_published_order(shared):
    """Everything through everything, then the masked patches picked: what iBOT does."""
    model, batch = _shaken(StudentTeacher(_config(shared))).double(), _batch()
    batch = Batch(batch.global_crops.double(), batch.local_crops.double(), batch.masks, batch.mask_indices)
    outputs = model(batch)

    student, teacher = model.student, model.teacher
    tokens_global = student.backbone(batch.global_crops, batch.masks)
    tokens_local = student.backbone(batch.local_crops)
    cls_global, patch = student.head(tokens_global[:, 0], tokens_global[:, 1:].flatten(0, 1))
    cls_local, _ = student.head(tokens_local[:, 0], tokens_local[:, 1:].flatten(0, 1))
    tokens_teacher = teacher.backbone(batch.global_crops)
    teacher_cls, teacher_patch = teacher.head(tokens_teacher[:, 0], tokens_teacher[:, 1:].flatten(0, 1))
    expected = {
        "student_cls": torch.cat([cls_global, cls_local]),
        "student_patch": patch[batch.masks.flatten()],
        "teacher_cls": teacher_cls,
        "teacher_patch": teacher_patch[batch.masks.flatten()],
        "teacher_patch_mean": teacher_patch.mean(dim=0),
        "teacher_features": tokens_teacher[:, 0],
        "student_features": tokens_global[:, 0],
    }
    assert {field.name for field in fields(outputs)} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(getattr(outputs, name), value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_every_student_parameter_gets_a_gradient(local, ratio):
    model = StudentTeacher(_config(shared=False))
    outputs = model(_batch(ratio, local))
    assert outputs.student_patch.shape == outputs.teacher_patch.shape
    assert len(outputs.student_cls) == (2 + LOCALS * local) * IMAGES
    (outputs.student_cls.sum() + outputs.student_patch.sum()).backward()
    assert [name for name, parameter in model.student.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_teacher_starts_equal_and_stays_in_evaluation_mode():
    model = StudentTeacher(_config(drop_path=0.9))
    teacher, student = model.teacher.state_dict(), model.student.state_dict()
    assert student.keys() - teacher.keys() == {"backbone.masked_embed"}
    assert all(torch.equal(value, student[name]) for name, value in teacher.items())
    model.train()
    assert model.student.training
    assert not model.teacher.training
    batch = _batch()
    assert torch.equal(model(batch).teacher_cls, model(batch).teacher_cls)
    assert not torch.equal(model(batch).student_cls, model(batch).student_cls)
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_head_keys_are_the_published_ones():
    names = {name for name in StudentTeacher(_config()).teacher.state_dict() if name.startswith("head.")}
    trunk = {f"head.mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    assert names == trunk | {f"head.{layer}.weight_{kind}" for layer in ("last_layer", "last_layer2") for kind in "gv"}


class _Wrapper(torch.nn.Module):
    """Stands for DistributedDataParallel: the network under `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrapped", [False, True])
def test_every_teacher_tensor_has_its_student(wrapped):
    model = _shaken(StudentTeacher(_config(shared=False)))
    students = dict(model.student.named_parameters())
    if wrapped:
        model.student = _Wrapper(model.student)
    pairs = model.teacher_of()
    averages = dict(model.teacher.named_parameters())
    assert {id(average) for average in pairs.values()} == {id(average) for average in averages.values()}
    assert all(pairs[students[name]] is average for name, average in averages.items())
    assert students["backbone.masked_embed"] not in pairs


def test_initial_weights_reach_student_and_teacher(tmp_path):
    source = _shaken(StudentTeacher(_config())).teacher.backbone
    save_backbone(source, tmp_path / "b.safetensors")
    model = StudentTeacher(_config(weights=str(tmp_path / "b.safetensors")))
    for backbone in (model.student.backbone, model.teacher.backbone):
        assert torch.equal(backbone.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_mean_patch_logit_stays_float32_under_autocast():
    model, batch = _shaken(StudentTeacher(_config())), _batch()
    exact = model(batch).teacher_patch_mean
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
    assert outputs.student_cls.dtype == outputs.teacher_patch.dtype == torch.bfloat16
    assert outputs.teacher_patch_mean.dtype == torch.float32
    torch.testing.assert_close(outputs.teacher_patch_mean, exact, atol=0.02, rtol=0)
