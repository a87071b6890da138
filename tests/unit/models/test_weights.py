from __future__ import annotations

import argparse
import compileall
import json
import os

import pytest
import safetensors.torch
import torch

from personvit.errors import CheckpointError
from personvit.models import VisionTransformer, load_backbone, load_into, load_model, save_backbone, vit_micro
from personvit.models.weight_info import FINE_TUNED_MEAN
from personvit.models.weight_layouts import resize_positions

SIZE = (64, 32)


def _vit(**overrides) -> VisionTransformer:
    settings = {"img_size": SIZE, "embed_dim": 64, "depth": 2, "num_heads": 1, **overrides}
    model = VisionTransformer(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _prefixed(model, prefix):
    return {prefix + name: value for name, value in model.state_dict().items()}


def _training_checkpoint(model):
    """As iBOT writes it: student with DDP prefix and mask token, teacher without, arguments as a Namespace."""
    student = _vit(masked_embed=True)
    return {
        "student": _prefixed(student, "module.backbone.") | {"module.head.mlp.0.weight": torch.zeros(2, 2)},
        "teacher": _prefixed(model, "backbone.") | {"head.mlp.0.weight": torch.zeros(2, 2)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, lr=5e-4, crops=[1, 2]),
        "ibot_loss": {"center": torch.zeros(1, 4), "center2": torch.zeros(1, 1, 4)},
    }


LAYOUTS = {
    "training": _training_checkpoint,
    "plain": lambda model: model.state_dict(),
    "data_parallel": lambda model: _prefixed(model, "module."),
    "compiled": lambda model: _prefixed(model, "_orig_mod."),
    "state_dict": lambda model: {"state_dict": _prefixed(model, "module.backbone.")},
    "model": lambda model: {"model": {**model.state_dict(), "head.weight": torch.zeros(3, 64)}},
    "fine_tuned": lambda model: {
        **_prefixed(model, "base."),
        "bottleneck.weight": torch.zeros(64),
        "classifier.weight": torch.zeros(751, 64),
    },
    "only_student": lambda model: {"student": _prefixed(model, "module.backbone.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_backbone(tmp_path, layout):
    model, path = _vit(), tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](model), path)
    state, info = load_backbone(path)
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert (info.embed_dim, info.depth, info.patch_size, info.image_size) == (64, 2, 16, SIZE)
    assert set(info.loaded) == set(state)
    assert info.resized == ()
    assert info.missing == ("masked_embed",)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(load_model(path)(images), model(images))


def test_report_names_layout_and_dropped_keys(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS["fine_tuned"](_vit()), path)
    info = load_backbone(path)[1]
    assert info.layout.startswith("fine-tuned")
    assert info.dropped == ("bottleneck.weight", "classifier.weight")
    assert info.mean == FINE_TUNED_MEAN
    for word in ("fine-tuned", "classifier.weight", "64x32", "(4, 2)"):
        assert word in info.table()


def test_half_precision_weights_become_float32(tmp_path):
    model = _vit().half()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert all(value.dtype == torch.float32 for value in load_backbone(tmp_path / "w.pth")[0].values())


def test_file_without_zip_container(tmp_path):
    model = _vit()
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_backbone(tmp_path / "old.pth")[0]["norm.weight"], model.norm.weight)


def test_safetensors_round_trip_keeps_description(tmp_path):
    model = vit_micro(img_size=SIZE, patch_size=8, masked_embed=True).eval()
    path = tmp_path / "folder" / "backbone.safetensors"
    save_backbone(model, path, {"mean": [0.1, 0.2, 0.3], "recipe": "demo", "num_heads": 99})
    again, info = load_model(path), load_backbone(path)[1]
    assert again.num_heads == info.num_heads == 4  # 128 / 64 would be 2
    assert (info.arch, info.image_size, info.patch_size, info.grid) == ("vit_micro", SIZE, 8, (8, 4))
    assert info.mean == (0.1, 0.2, 0.3)
    assert info.metadata["recipe"] == "demo"
    assert not again.training
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_safetensors_of_others_need_no_metadata(tmp_path):
    model = _vit()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(load_backbone(tmp_path / "w.safetensors")[0]["pos_embed"], model.pos_embed)


def test_failed_export_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.safetensors"
    save_backbone(_vit(), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_backbone(_vit(), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("case", range(6))
def test_position_resize_equals_published_reader(golden, case):
    values = golden("pos_embed_resize")
    cells, ratio, rows, columns = (int(value) for value in values[f"meta_{case}"])
    old_rows = int((cells * ratio) ** 0.5)
    ours = resize_positions(torch.from_numpy(values[f"in_{case}"]), (old_rows, old_rows // ratio), (rows, columns))
    torch.testing.assert_close(ours, torch.from_numpy(values[f"out_{case}"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("old", "grid"), [((224, 224), (14, 14)), ((256, 128), (16, 8)), ((384, 128), (24, 8))])
def test_grid_is_recognised_and_resized(tmp_path, old, grid):
    model = _vit(img_size=old)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert load_backbone(tmp_path / "w.pth")[1].grid == grid
    state, info = load_backbone(tmp_path / "w.pth", (64, 32))
    assert state["pos_embed"].shape == (1, 9, 64)
    assert info.resized == ("pos_embed",)
    assert "pos_embed" not in info.loaded
    assert torch.equal(state["pos_embed"], resize_positions(model.pos_embed, grid, (4, 2)))


def test_unknown_grid_is_refused(tmp_path):
    torch.save(_vit(img_size=(80, 16)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="5 positions"):
        load_backbone(tmp_path / "w.pth")


def test_image_size_in_own_checkpoint_decides_the_grid(tmp_path):
    crops = {"global_size": [80, 16], "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
    content = {"teacher": _prefixed(_vit(img_size=(80, 16)), "backbone."), "args": {"crops": crops}}
    torch.save(content, tmp_path / "w.pth")
    info = load_backbone(tmp_path / "w.pth")[1]
    assert (info.image_size, info.mean, info.std) == ((80, 16), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


def test_load_into_keeps_the_mask_token_and_resizes(tmp_path):
    torch.save({"teacher": _prefixed(_vit(img_size=(128, 64)), "backbone.")}, tmp_path / "w.pth")
    student = _vit(masked_embed=True)
    token = student.masked_embed.detach().clone()
    info = load_into(student, tmp_path / "w.pth")
    assert torch.equal(student.masked_embed, token)
    assert info.resized == ("pos_embed",)


def test_load_into_another_width_changes_nothing(tmp_path):
    torch.save(_vit(embed_dim=128).state_dict(), tmp_path / "w.pth")
    model = _vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"width 128.*model\.arch"):
        load_into(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _Payload:
    """Would create a folder if its pickle were executed."""

    def __init__(self, function, marker) -> None:
        self.function, self.marker = function, str(marker)

    def __reduce__(self):
        return self.function, (self.marker,)


# torch refuses everything in the module `os` by name; compileall is on no such list.
@pytest.mark.parametrize("function", [os.mkdir, compileall.compile_dir])
def test_file_that_would_run_code_is_refused(tmp_path, function):
    marker = tmp_path / "executed"
    content = {"teacher": _prefixed(_vit(), "backbone."), "args": _Payload(function, marker)}
    torch.save(content, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=rf"refused.*{function.__name__}.*state_dict"):
        load_backbone(tmp_path / "evil.pth")
    assert not marker.exists()


def test_namespace_cannot_smuggle_code(tmp_path):
    marker = tmp_path / "executed"
    content = {"teacher": _prefixed(_vit(), "backbone."), "args": argparse.Namespace(inner=_Payload(os.mkdir, marker))}
    torch.save(content, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load_backbone(tmp_path / "evil.pth")
    assert not marker.exists()


def test_namespace_is_allowed_during_reading_only(tmp_path):
    torch.save(_training_checkpoint(_vit()), tmp_path / "w.pth")
    load_backbone(tmp_path / "w.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"conv1.weight": torch.zeros(3)}}, "no complete ViT backbone"),
        ({"epoch": 3}, "holds no tensors"),
        ([torch.zeros(3)], "not a dict"),
    ],
)
def test_files_without_a_backbone(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path / "w.pth")


def test_incomplete_backbone_names_what_is_missing(tmp_path):
    state = _vit().state_dict()
    del state["blocks.1.attn.qkv.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"1 of 30 .*blocks\.1\.attn\.qkv\.bias"):
        load_backbone(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "extra",
    ["reg_token", "register_tokens", "dist_token", "norm_pre.weight", "part_token1", "blocks.0.mlp.w12.weight"],
)
def test_other_architectures_are_refused(tmp_path, extra):
    torch.save({**_vit().state_dict(), extra: torch.zeros(64)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=extra):
        load_backbone(tmp_path / "w.pth")


def test_damaged_and_absent_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_backbone(tmp_path / "absent.pth")
    torch.save(_vit().state_dict(), tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    save_backbone(_vit(), tmp_path / "w.safetensors")
    whole_safe = (tmp_path / "w.safetensors").read_bytes()
    for name, content in {
        "half.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"<html>404 Not Found</html>",
        "half.safetensors": whole_safe[: len(whole_safe) // 2],
        "empty.safetensors": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_backbone(tmp_path / name)


def test_header_that_is_no_json_object(tmp_path):
    header = {"personvit": json.dumps([1])}
    safetensors.torch.save_file(_vit().state_dict(), tmp_path / "w.safetensors", header)
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load_backbone(tmp_path / "w.safetensors")
