"""What is told apart inside a file: networks, LayerScale, camera vectors, the neck, and what is refused."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import timm
import torch
from tiny_weights import SIZE, WIDTH, dinov2, ibot_checkpoint, plain, shaken, tiny_reid, tiny_vit, transformer_120

from personvit.errors import CheckpointError
from personvit.models import (
    ReIDModel,
    load_backbone,
    load_into,
    load_model,
    load_network,
    load_reid,
    save_backbone,
    save_reid,
)
from personvit.models.weight_files import read_weight_file


@pytest.fixture
def saved(tmp_path):
    """Content -> path of a torch file of it."""

    def save(content, name="w.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def test_student_or_teacher_is_a_choice(saved):
    content = ibot_checkpoint()
    path = saved(content)
    for network, wanted in ((None, "teacher"), ("teacher", "teacher"), ("student", "student")):
        state, info = load_backbone(path, network=network)
        prefix = "module.backbone." if wanted == "student" else "backbone."
        assert torch.equal(state["norm.weight"], content[wanted][prefix + "norm.weight"])
        assert info.layout.endswith(wanted)
        assert info.missing == (() if wanted == "student" else ("masked_embed",))
    assert info.training["epoch"] == 221
    assert info.training["args"]["arch"] == "vit_small"


@pytest.mark.parametrize(("keep", "asked"), [("teacher", "student"), ("student", "teacher")])
def test_absent_network_is_named(saved, keep, asked):
    path = saved({keep: ibot_checkpoint()[keep]})
    with pytest.raises(CheckpointError, match=f"no {asked}; it holds: {keep}"):
        load_backbone(path, network=asked)
    with pytest.raises(CheckpointError, match="a single network, no student"):
        load_backbone(saved(plain(), "plain.pth"), network="student")


@torch.no_grad()
def test_layer_scale_is_multiplied_in(saved):
    reference = timm.models.VisionTransformer(
        img_size=56, patch_size=14, embed_dim=WIDTH, depth=2, num_heads=1, num_classes=0, init_values=0.1
    )
    shaken(reference, by=0.3)
    path = saved({**reference.state_dict(), "mask_token": torch.zeros(1, WIDTH)})
    model, info = load_model(path), load_backbone(path)[1]
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(model(images), reference.forward_features(images), atol=1e-5, rtol=0)
    assert info.layout.startswith("DINOv2")
    assert info.folded == tuple(f"blocks.{i}.ls{j}.gamma" for i in range(2) for j in (1, 2))
    assert info.dropped == ("mask_token",)
    assert (info.patch_size, info.image_size) == (14, (56, 56))
    assert "folded        4  blocks.0.ls1.gamma" in info.table()


def test_incomplete_layer_scale_is_an_error(saved):
    content = dinov2()
    del content["blocks.1.ls2.gamma"]
    with pytest.raises(CheckpointError, match=r"1 of 34 .*blocks\.1\.ls2\.gamma"):
        load_backbone(saved(content))


def test_patches_must_divide_the_image(saved):
    with pytest.raises(CheckpointError, match=r"patches of 14.*nearest is 252x126"):
        load_backbone(saved(dinov2()), (256, 128))
    assert load_backbone(saved(dinov2()), (252, 126))[1].grid == (18, 9)


def test_fine_tuned_file_with_neck_and_classifier(saved):
    content = transformer_120()
    model, info = load_reid(saved(content))
    assert info.dropped == ("base.fc.weight", "base.fc.bias")
    assert (info.num_ids, info.neck_feat, info.mean) == (7, "before", (0.5, 0.5, 0.5))
    assert not model.training
    state = model.state_dict()
    assert set(info.loaded) == state.keys() == {name for name in content if not name.startswith("base.fc.")}
    assert all(torch.equal(value, content[name]) for name, value in state.items())
    assert "7 identities, feature before the batch norm" in info.table()
    backbone = load_backbone(saved(content))[0]
    assert all(torch.equal(value, content[f"base.{name}"]) for name, value in backbone.items())


@torch.no_grad()
def test_fine_tuned_file_at_another_size(saved):
    content = transformer_120(img_size=(128, 64))
    model, info = load_reid(saved(content), SIZE)
    assert info.resized == ("base.pos_embed",)
    assert model.embed(torch.randn(2, 3, *SIZE)).shape == (2, WIDTH)


@pytest.mark.parametrize("neck_feat", ["before", "after"])
@torch.no_grad()
def test_export_describes_itself(tmp_path, neck_feat):
    model = tiny_reid(neck_feat=neck_feat, num_cameras=3, sie_coefficient=1.5)
    about = {"recipe": "finetune_demo", "protocol": "market", "licence": "research only", "num_ids": 99, "depth": 99}
    save_reid(model, tmp_path / "best.safetensors", {**about, "mean": [0.4, 0.4, 0.4]})
    again, info = load_reid(tmp_path / "best.safetensors")
    for name in ("recipe", "protocol", "licence"):
        assert info.metadata[name] == about[name]
    assert (info.num_ids, info.depth, info.num_cameras, info.neck_feat) == (7, 2, 3, neck_feat)
    assert (info.mean, info.std) == ((0.4, 0.4, 0.4), (0.5, 0.5, 0.5))
    images, camids = torch.randn(3, 3, *SIZE), torch.tensor([0, 2, 1])
    assert torch.equal(again.embed(images, camids), model.embed(images, camids))
    network = load_network(tmp_path / "best.safetensors")[0]
    assert torch.equal(network.embed(images, camids), model.embed(images, camids))


def test_checkpoint_of_a_fine_tuning_run(saved):
    args = {"input": {"size": [80, 16], "mean": [0.1] * 3, "std": [0.2] * 3}, "model": {"neck_feat": "after"}}
    model = tiny_reid(img_size=(80, 16))
    again, info = load_reid(saved({"model": model.state_dict(), "epoch": 4, "args": args, "optimizer": {}}))
    assert (info.image_size, info.mean, info.std, info.neck_feat) == ((80, 16), (0.1,) * 3, (0.2,) * 3, "after")
    assert again.neck_feat == "after"
    assert info.training["epoch"] == 4


def test_backbone_alone_is_no_fine_tuned_model(saved):
    with pytest.raises(CheckpointError, match=r"no complete fine-tuned model.*bottleneck\.weight.*personvit finetune"):
        load_reid(saved(plain()))
    assert not isinstance(load_network(saved(plain()))[0], ReIDModel)


def test_classifier_of_another_size(saved):
    path = saved(transformer_120(num_ids=7))
    assert load_reid(path, num_ids=7)[0].num_ids == 7
    with pytest.raises(CheckpointError, match=r"classifier of 7 identities, 751 were asked for.*model\.weights="):
        load_reid(path, num_ids=751)
    content = transformer_120()
    content["classifier.weight"] = torch.zeros(7, 2 * WIDTH)
    with pytest.raises(CheckpointError, match=r"classifier\.weight has shape \[7, 128\].*two models"):
        load_reid(saved(content))


def test_camera_vectors_into_a_model(saved):
    path = saved(transformer_120(num_cameras=3))
    vectors = torch.load(path, weights_only=True)["base.sie_embed"]
    same, other, none = tiny_vit(num_cameras=3), tiny_vit(num_cameras=6), tiny_vit()
    scaled = tiny_vit(num_cameras=3, sie_coefficient=1.0)
    own = {model: model.sie_embed.detach().clone() for model in (other, scaled)}
    assert "sie_embed" in load_into(same, path).loaded
    assert torch.equal(same.sie_embed, vectors)
    for model in (other, none, scaled):
        info = load_into(model, path)
        assert info.dropped[0] == "sie_embed"
        assert "sie_embed" not in info.loaded
        assert ("sie_embed" in info.missing) == (model is not none)
    for model, value in own.items():
        assert torch.equal(model.sie_embed, value)  # those of other cameras, or on another scale: of no use


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 128}, "width 128"),
        ({"depth": 3}, "3 blocks"),
        ({"depth": 1}, "1 blocks"),
        ({"patch_size": 8}, "patches of 8"),
    ],
)
def test_into_another_architecture(saved, change, message):
    path, model = saved(plain(**change)), tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"does not fit the model.*{message}.*Set model\.arch"):
        load_into(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.1.attn.qkv.weight", (64, 64), r"expected|should be \[192, 64\]"),
        ("pos_embed", (9, 64), "should be"),
        ("patch_embed.proj.weight", (64, 1, 16, 16), "RGB"),
        ("patch_embed.proj.weight", (64, 3, 16, 8), "square"),
        ("cls_token", (), r"should be \[1, 1, 64\]"),
    ],
)
def test_tensors_that_do_not_belong_together(saved, name, shape, message):
    with pytest.raises(CheckpointError, match=message):
        load_backbone(saved({**plain(), name: torch.zeros(shape)}))


def test_local_branches_are_refused(saved):
    with pytest.raises(CheckpointError, match=r"b1\.0\.norm1\.weight.*local branches"):
        load_reid(saved({**transformer_120(), "b1.0.norm1.weight": torch.zeros(WIDTH)}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_size", "big"), ("mean", [0.5]), ("std", [0, 0, 0]), ("num_heads", "x"), ("neck_feat", "beside")],
)
def test_header_with_wrong_values(tmp_path, key, value):
    header = {"personvit": json.dumps({key: value})}
    safetensors.torch.save_file(plain(), tmp_path / "w.safetensors", header)
    with pytest.raises(CheckpointError, match=f"header says {key}=.*Export it again"):
        load_backbone(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b'{"norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]',
        b'{"norm.weight": {"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}}',
        b'{"norm.weight": {"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}',
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_damaged_safetensors_header(tmp_path, header, ending):
    path = tmp_path / f"w.{ending}"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match=f"{path.name}.*cannot be read"):
        load_backbone(path)


def test_header_longer_than_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 10**12) + b"{" + bytes(64))
    with pytest.raises(CheckpointError, match="not a safetensors file, or is cut off"):
        load_backbone(path)


def test_export_of_a_backbone_says_nothing_of_a_neck(tmp_path):
    save_backbone(tiny_vit(), tmp_path / "b.safetensors")
    assert "neck_feat" not in read_weight_file(tmp_path / "b.safetensors")[1]
