from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from personvit import evaluate as entry
from personvit.config import EvaluateConfig, load_config
from personvit.errors import CheckpointError, ConfigError, DataError
from personvit.models.vit import vit_micro
from personvit.models.weights import save_backbone
from personvit.retrieval import evaluate_backbone
from personvit.runtime.entry import run


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """6 identities of one colour each, seen by two cameras; junk (pid -1), a distractor, and a lone query."""
    root = tmp_path_factory.mktemp("market1501")
    rng = np.random.default_rng(0)
    names = {
        "query": ["0099_c1s1_000000_00.jpg"],
        "bounding_box_test": ["-1_c1s1_000000_00.jpg", "0000_c2s1_000000_00.jpg"],
    }
    for pid in range(1, 7):
        names["query"].append(f"{pid:04}_c1s1_000001_00.jpg")
        names["bounding_box_test"] += [f"{pid:04}_c{camera}s1_000002_00.jpg" for camera in (1, 2)]
    colours = rng.integers(0, 256, (100, 3))
    for folder, files in names.items():
        (root / folder).mkdir()
        for name in files:
            pixels = np.clip(colours[int(name.split("_")[0])] + rng.integers(-9, 9, (48, 24, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / folder / name)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(vit_micro(img_size=(32, 16), patch_size=8), path)
    return path


def test_command_prints_the_figures_and_writes_them(market, weights, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "personvit")
    out = tmp_path / "results" / "market.json"
    arguments = ["data.name=market1501", f"data.root={market}", f"model.weights={weights}", "data.num_workers=0"]
    assert entry.main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())
    header, values, *_ = printed.splitlines()
    assert header.split() == ["mAP", "R1", "R5", "R10", "mINP"]
    keys = ("mAP", "rank1", "rank5", "rank10", "mINP")
    assert values.split() == [f"{100 * figures[key]:.2f}" for key in keys]
    assert "over 6 of 7 queries" in printed
    assert (figures["queries"], figures["valid_queries"], figures["gallery"]) == (7, 6, 13)
    assert len(figures["cmc"]) == 13
    assert figures["image_size"] == [32, 16]
    assert not figures["generated"]
    assert "query" in caplog.text
    assert "gallery" in caplog.text


def test_raw_pixels_find_colours_and_say_what_they_are(market, capsys):
    assert entry.main(["data.name=market1501", f"data.root={market}", "raw_pixels=true", "data.num_workers=0"]) == 0
    printed = capsys.readouterr().out
    assert "baseline without a model: raw pixels at 64x32" in printed
    assert float(printed.splitlines()[1].split()[0]) > 90


def test_random_initialisation_is_a_named_and_repeatable_baseline(market, capsys):
    arguments = ["data.name=market1501", f"data.root={market}", "model.arch=vit_micro", "image_size=[32,16]"]
    printed = []
    for _ in range(2):
        entry.main([*arguments, "model.patch_size=8", "data.num_workers=0"])
        printed.append(capsys.readouterr().out)
        torch.randn(3)
    assert "baseline without training: vit_micro at 32x16, random initialisation" in printed[0]
    assert printed[0] == printed[1]


def test_equals_the_library_function(market, weights):
    cfg = load_config(EvaluateConfig, None, ["data.name=market1501", f"data.root={market}", f"model.weights={weights}"])
    evaluation = entry.evaluate(cfg)
    subject = evaluation.subject
    result = evaluate_backbone(subject.model, evaluation.reid_set, subject.image_size, subject.mean, subject.std)
    assert result.mAP == evaluation.result.mAP


def test_generated_persons_when_no_data_is_named(market, monkeypatch, capsys):
    monkeypatch.setattr("personvit.data.generated.dataset.ensure_generated", lambda cfg: market)
    entry.main(["raw_pixels=true", "data.num_workers=0"])
    assert "Generated persons" in capsys.readouterr().out


def test_print_config(capsys):
    assert entry.main(["--print-config", "max_rank=7"]) == 0
    assert "max_rank: 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["data.name=market1501"], DataError, "needs data.root=FOLDER"),
        (["data.name=market1501", "data.root=/nowhere", "raw_pixels=true"], DataError, "/nowhere"),
        (["model.weights=/nowhere.pth"], CheckpointError, "/nowhere.pth"),
        (["model.arch=vit_huge"], ConfigError, "vit_huge"),
        (["image_size=[30,16]", "model.arch=vit_micro"], ConfigError, "30x16"),
        (["max_rnk=5"], ConfigError, "max_rank"),
    ],
)
def test_bad_input_names_value_and_remedy(arguments, error, message, market):
    with pytest.raises(error, match=message):
        entry.main([*arguments, "model.patch_size=8"])


def test_errors_have_no_traceback_and_their_exit_code(capsys):
    assert run(entry.main, ["data.name=market1501", "raw_pixels=true"]) == DataError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


def test_unwritable_out(market, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["data.name=market1501", f"data.root={market}", "raw_pixels=true", "data.num_workers=0"]
    with pytest.raises(DataError, match="cannot be written"):
        entry.main([*arguments, "--out", str(tmp_path / "file" / "x.json")])
