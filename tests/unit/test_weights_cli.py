from __future__ import annotations

import json

import pytest
import torch
from tiny_weights import SIZE, dinov2, ibot_checkpoint, plain, tiny_reid, transformer_120

from personvit import __main__ as command
from personvit.models import load_backbone, save_reid


@pytest.fixture
def saved(tmp_path):
    def save(content, name="w.pth"):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


def weights(*arguments) -> int:
    return command.main(["weights", *map(str, arguments)])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (plain, ["plain ViT (timm / TransReID-SSL)", "30  cls_token", "64x32"]),
        (ibot_checkpoint, ["training checkpoint", "teacher", "epoch 221, 4 arguments", "head.mlp.0.weight"]),
        (transformer_120, ["fine-tuned model", "7 identities", "base.fc.weight", "mean (0.5, 0.5, 0.5)"]),
        (dinov2, ["DINOv2", "patches of 14", "ls1.gamma"]),
    ],
)
def test_inspect_every_layout(saved, capsys, make, words):
    assert weights("inspect", saved(make())) == 0
    text = capsys.readouterr().out
    for word in [*words, "stored as float32", "custom: width 64, 2 blocks, 1 heads"]:
        assert word in text


def test_inspect_shows_what_an_export_says(tmp_path, capsys):
    save_reid(
        tiny_reid(), tmp_path / "best.safetensors", {"recipe": "demo", "licence": "research only", "x": "y" * 999}
    )
    assert weights("inspect", tmp_path / "best.safetensors") == 0
    text = capsys.readouterr().out
    for line in ("recipe        demo", "licence       research only", "(--json shows all)"):
        assert line in text
    assert max(map(len, text.splitlines())) < 200


def test_inspect_as_json(saved, capsys):
    content = ibot_checkpoint()
    content["teacher"]["backbone.norm.bias"][0] = float("nan")
    path = saved(content)
    assert weights("inspect", path, "--json", "--image-size", 128, 64) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["image_size"] == [128, 64]
    assert known["resized"] == ["pos_embed"]
    assert known["training"]["args"]["lr"] == 5e-4
    assert known["non_finite"] == ["norm.bias"]
    assert known["parameters"] == sum(v.numel() for n, v in content["teacher"].items() if n.startswith("backbone."))
    assert weights("inspect", path) == 0
    assert "NOT FINITE    norm.bias" in capsys.readouterr().out
    assert weights("inspect", path, "--student") == 0
    text = capsys.readouterr().out
    assert "student" in text
    assert "NOT FINITE" not in text


def test_convert_says_what_it_wrote(saved, tmp_path, capsys):
    assert weights("convert", saved(ibot_checkpoint()), "--to", "timm", "--out", tmp_path / "t.safetensors") == 0
    text = capsys.readouterr().out
    assert "t.safetensors (timm): 30 tensors" in text
    assert "left out      8  head.mlp.0.weight" in text
    assert weights("convert", saved(dinov2()), "--to", "transreid", "--out", tmp_path / "t.pth") == 0
    assert "multiplied in 4  blocks.0.ls1.gamma" in capsys.readouterr().out


def test_convert_never_overwrites(saved, tmp_path, capsys):
    source = saved(plain())
    before = (tmp_path / "w.pth").read_bytes()
    assert weights("convert", source, "--to", "transreid", "--out", source) == 4
    assert "exists and is left as it is" in capsys.readouterr().err
    assert (tmp_path / "w.pth").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_convert_does_not_replace_what_appears_meanwhile(saved, tmp_path, monkeypatch, capsys):
    """A file that another program writes between the first look and the end."""
    out = tmp_path / "t.safetensors"
    monkeypatch.setattr("os.fsync", lambda _: out.write_text("theirs"))
    assert weights("convert", saved(plain()), "--to", "timm", "--out", out) == 4
    assert "exists and is left as it is" in capsys.readouterr().err
    assert out.read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.safetensors", "w.pth"]


@pytest.mark.parametrize("target", ["transreid", "timm", "safetensors"])
def test_convert_at_another_size(saved, tmp_path, target):
    source = saved(transformer_120(img_size=(128, 64)))
    out = tmp_path / ("t.safetensors" if target == "safetensors" else "t.pth")
    assert weights("convert", source, "--to", target, "--out", out, "--image-size", *SIZE) == 0
    (state, info), expected = load_backbone(out), load_backbone(source, SIZE)[0]
    assert info.image_size == SIZE
    assert torch.equal(state["pos_embed"], expected["pos_embed"])


def test_convert_the_backbone_alone(saved, tmp_path):
    source = saved(transformer_120(num_cameras=3))
    out = tmp_path / "b.safetensors"
    assert weights("convert", source, "--to", "safetensors", "--out", out, "--backbone-only") == 0
    state, info = load_backbone(out)
    assert state.keys() == plain().keys()
    assert info.dropped == ()
    assert info.num_cameras == 0
    assert info.mean == (0.5, 0.5, 0.5)  # pixels are still those of the fine-tuning
    assert "num_ids" not in info.metadata


@pytest.mark.parametrize(
    ("target", "name", "message"),
    [
        ("safetensors", "x.pth", "name it x.safetensors"),
        ("ibot", "x.safetensors", "Name it x.pth"),
        ("transreid", "x.safetensors", "Name it x.pth"),
        ("timm", "x.pth", "camera vectors.*--backbone-only"),
    ],
)
def test_convert_refuses_what_nobody_could_read(saved, tmp_path, capsys, target, name, message):
    source = saved(transformer_120(num_cameras=3))
    assert weights("convert", source, "--to", target, "--out", tmp_path / name) == 4
    error = capsys.readouterr().err
    assert all(word in error for word in message.split(".*"))
    assert not (tmp_path / name).exists()


def test_unreadable_file_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "w.pth").write_bytes(b"<html>404</html>")
    assert weights("inspect", tmp_path / "w.pth") == 4
    assert capsys.readouterr().err.count("\n") == 1
