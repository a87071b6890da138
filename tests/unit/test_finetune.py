"""`personvit finetune`: recipes, flags, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_finetune import TINY, arguments, write_persons
from tiny_runs import assert_same, one_thread

from personvit.config import FinetuneConfig, load_config, recipes
from personvit.errors import CheckpointError, ConfigError, DataError, RunFolderError
from personvit.finetune import main
from personvit.models.vit import vit_micro, vit_tiny
from personvit.models.weights import load_reid, save_backbone
from personvit.runtime.entry import run

SETS = ("market1501", "msmt17", "dukemtmcreid", "occluded_duke")


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def persons(tmp_path_factory):
    return write_persons(tmp_path_factory.mktemp("data") / "persons")


def test_recipes_are_there_and_those_of_pretraining_are_not():
    published = {f"finetune_{name}_vit_{size}" for name in SETS for size in ("small", "base")}
    assert set(recipes(FinetuneConfig)) == published | {"finetune_demo"}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("size", ["small", "base"])
def test_published_recipe(name, size):
    cfg = load_config(FinetuneConfig, f"finetune_{name}_vit_{size}")
    assert (cfg.data.name, cfg.model.arch) == (name, f"vit_{size}")
    assert cfg.optim.warmup_epochs == (5 if (name, size) == ("market1501", "base") else 20)
    published = {
        "optim": {"name": "sgd", "lr": 4e-4, "momentum": 0.9, "weight_decay": 1e-4, "weight_decay_bias": 1e-4}
        | {"bias_lr_factor": 2.0, "warmup_factor": 0.01, "min_factor": 0.002, "clip_grad": 0.0},
        "train": {"epochs": 120, "batch_size": 64, "instances": 4, "seed": 1234},
        "loss": {"identity": 1.0, "triplet": 1.0, "label_smoothing": 0.0, "margin": None},
        "model": {"patch_size": 16, "drop_path": 0.1, "neck_feat": "before", "dropout": 0.0, "camera_embed": False},
        "input": {"size": (256, 128), "mean": (0.5,) * 3, "std": (0.5,) * 3, "flip": 0.5, "pad": 10, "erase": 0.5},
    }
    for section, values in published.items():
        found = getattr(cfg, section)
        assert {key: getattr(found, key) for key in values} == values
    assert cfg.data.merge_val


def test_print_config_is_complete(capsys, tmp_path):
    assert main(["--config", "finetune_market1501_vit_small", "--fused", "optim.lr=0.1", "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    cfg = load_config(FinetuneConfig, str(tmp_path / "printed.yaml"))
    expected = load_config(FinetuneConfig, "finetune_market1501_vit_small", ["optim.lr=0.1"])
    assert cfg == dataclasses.replace(expected, kernels=dataclasses.replace(expected.kernels, backend="fused"))


def test_help_names_recipes_and_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for words in ("finetune_occluded_duke_vit_base", "evaluation.json", "75 stopped", "runs/finetune-RECIPE"):
        assert words in text
    assert "vit_small_luperson," not in text


@pytest.mark.parametrize(
    ("extra", "error", "words"),
    [
        (["--config", "demo"], ConfigError, "a recipe of personvit pretrain"),
        (["--config", "finetune_market_vit_small"], ConfigError, "Did you mean finetune_market1501_vit_small"),
        (["optim.lrr=1"], ConfigError, "Did you mean optim.lr? All keys: personvit finetune --print-config"),
        (["train.batch_size=10", "train.instances=4"], ConfigError, "train.batch_size=8"),
        (["train.batch_size=32", "train.instances=2"], DataError, "train.batch_size=16"),
        (["data.root=/nowhere"], DataError, "/nowhere"),
        (["data.test_name=market1502"], ConfigError, "market1502"),
        (["model.weights=/nowhere.pth"], CheckpointError, "/nowhere.pth"),
        (["input.size=[30,16]"], ConfigError, "input.size=[32,16]"),
        (["--resume", "/nowhere.pth"], CheckpointError, "no such file"),
    ],
)
def test_bad_input_names_value_and_remedy(persons, tmp_path, capsys, extra, error, words):
    code = run(main, arguments(persons, tmp_path / "run", *extra))
    message = capsys.readouterr().err
    assert code == error.exit_code, message
    assert words in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("network", "words"),
    [(vit_tiny(img_size=(32, 16), patch_size=8), "width 192"), (vit_micro(img_size=(32, 16)), "patches of 16")],
)
def test_weights_of_another_architecture(persons, tmp_path, capsys, network, words):
    save_backbone(network, tmp_path / "other.safetensors")
    code = run(main, arguments(persons, tmp_path / "run", f"model.weights={tmp_path / 'other.safetensors'}"))
    message = capsys.readouterr().err
    assert code == CheckpointError.exit_code
    assert words in message
    assert "Set model.arch and model.patch_size" in message


def test_run_folder_in_use(persons, tmp_path, capsys):
    out = tmp_path / "run"
    once = arguments(persons, out, "train.max_steps=1")
    assert run(main, once) == 0
    (out / "notes.txt").write_text("mine")
    assert run(main, once) == RunFolderError.exit_code
    assert "--overwrite" in capsys.readouterr().err
    weights = out / "exported/model.safetensors"
    before = weights.read_bytes()
    assert run(main, [*once, "--overwrite", f"model.weights={weights}"]) == RunFolderError.exit_code
    assert "would delete model.weights" in capsys.readouterr().err
    assert weights.read_bytes() == before
    assert run(main, [*once, "--overwrite", "optim.lr=0.02"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    # resuming without --config takes the run's own configuration
    assert run(main, ["--out", str(out), "--resume", "auto", "train.max_steps=2"]) == 0
    assert load_config(FinetuneConfig, str(out / "config.yaml")).optim.lr == 0.02


def test_runs_of_the_two_commands_leave_each_other_alone(persons, tmp_path, capsys):
    from personvit.pretrain import main as pretrain_main

    crops = [f"data.root={persons / 'bounding_box_train'}", "model.patch_size=8", "crops.global_size=[32,16]"]
    crops += ["crops.local_crops=0", "train.batch_size=4", "train.max_steps=1", "data.num_workers=0"]
    assert run(pretrain_main, [*crops, "--out", str(tmp_path / "ssl")]) == 0
    assert run(main, arguments(persons, tmp_path / "reid", "train.max_steps=1")) == 0
    capsys.readouterr()
    for flag in (["--overwrite"], ["--resume", "auto"]):
        assert run(main, arguments(persons, tmp_path / "ssl", *flag)) == RunFolderError.exit_code
        assert run(pretrain_main, [*crops, "--out", str(tmp_path / "reid"), *flag]) == RunFolderError.exit_code
    assert "holds a run of personvit finetune" in capsys.readouterr().err
    resumed = ["--resume", str(tmp_path / "ssl/checkpoints/last.pth")]
    assert run(main, arguments(persons, tmp_path / "new", *resumed)) == CheckpointError.exit_code
    assert "Start a new run from its weights: --out DIR model.weights=" in capsys.readouterr().err
    resumed = ["--resume", str(tmp_path / "reid/checkpoints/last.pth")]
    assert run(pretrain_main, [*crops, "--out", str(tmp_path / "newer"), *resumed]) == CheckpointError.exit_code
    assert "a checkpoint of personvit finetune" in capsys.readouterr().err


def test_default_run_folder(monkeypatch, tmp_path, persons):
    monkeypatch.chdir(tmp_path)
    assert run(main, [f"data.root={persons}", *TINY, "train.max_steps=1"]) == 0
    assert (tmp_path / "runs/finetune_demo/exported/model.safetensors").is_file()


def test_deterministic_switch_is_set_and_a_run_repeats(persons, tmp_path):
    for name in ("first", "second"):
        extra = ["train.deterministic=true", "train.max_steps=2"]
        assert run(main, arguments(persons, tmp_path / name, *extra)) == 0
        assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    first, second = (tmp_path / name / "exported/model.safetensors" for name in ("first", "second"))
    assert_same(*(dict(load_reid(path)[0].state_dict()) for path in (first, second)))
