"""A training checkpoint must load through the published fine-tuning reader and through the published resume code."""

from __future__ import annotations

import re

import torch
from tiny_runs import one_thread, tiny_config, write_crops

from personvit.pretrain import pretrain
from personvit.runtime.distributed import init_distributed


def published_reader(path):
    """The rules of hustvl/PersonViT, model/backbones/vit_pytorch.py, load_param: which entry becomes which name."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict", "module"):
        content = content.get(wrapper, content)
    assert "teacher" in content
    names = {name.removeprefix("module."): value for name, value in content["teacher"].items()}
    names = {name.removeprefix("backbone."): v for name, v in names.items() if name.startswith("backbone.")}
    return {name: v for name, v in names.items() if not any(word in name for word in ("head", "dist", "pre_logits"))}


def shape_of(name: str) -> str:
    return re.sub(r"blocks\.\d+\.", "blocks.N.", name)


def test_checkpoint_is_what_the_published_code_writes(tmp_path, golden):
    cfg = tiny_config(write_crops(tmp_path / "crops"), "train.epochs=1")
    with one_thread():
        result = pretrain(cfg, tmp_path / "run", ranks=init_distributed())

    read = published_reader(result.checkpoint)
    wanted = {shape_of(key.removeprefix("w.")) for key in golden("vit_small_forward") if key.startswith("w.")}
    assert {shape_of(name) for name in read} == wanted
    assert read["pos_embed"].shape == (1, 9, 128)  # 32x16 pixels in patches of 8, and CLS

    content = torch.load(result.checkpoint, map_location="cpu", weights_only=True)
    assert {"student", "teacher", "optimizer", "epoch", "args", "ibot_loss"} <= content.keys()
    assert not {"model", "state_dict", "module"} & content.keys()  # the reader would descend into these first
    assert content["epoch"] == 1
    assert content["ibot_loss"]["center"].shape == (1, 32)
    assert content["ibot_loss"]["center2"].shape == (1, 1, 32)
    assert all(name.startswith("module.") for name in content["student"])
    student = {name.removeprefix("module.") for name in content["student"]}
    assert student - content["teacher"].keys() == {"backbone.masked_embed"}
    for head in ("head.mlp.0.weight", "head.mlp.4.bias", "head.last_layer.weight_g", "head.last_layer2.weight_v"):
        assert head in content["teacher"]
