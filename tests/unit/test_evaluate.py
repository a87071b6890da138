from __future__ import annotations

import csv
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from personvit import evaluate as entry
from personvit.config import EvaluateConfig, load_config
from personvit.engine import evaluation as engine
from personvit.errors import CheckpointError, ConfigError, DataError
from personvit.models.vit import vit_micro
from personvit.models.weights import save_backbone
from personvit.ops import ReportRow
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


def test_a_failed_evaluation_keeps_the_figures_of_the_one_before(tmp_path):
    (tmp_path / "figures.json").write_text("before")
    with pytest.raises(DataError):
        entry.main(["data.name=market1501", "raw_pixels=true", f"--out={tmp_path / 'figures.json'}"])
    assert (tmp_path / "figures.json").read_text() == "before"


def test_unwritable_out(market, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["data.name=market1501", f"data.root={market}", "raw_pixels=true", "data.num_workers=0"]
    with pytest.raises(DataError, match="cannot be written"):
        entry.main([*arguments, "--out", str(tmp_path / "file" / "x.json")])


@pytest.fixture
def run_evaluate(market, tmp_path, capsys):
    """Evaluate raw pixels on the colours with more arguments -> (printed lines, figures)."""

    def run_it(*arguments, data=None):
        out = tmp_path / "figures.json"
        where = data or ["data.name=market1501", f"data.root={market}"]
        entry.main([*where, "raw_pixels=true", "data.num_workers=0", f"--out={out}", *arguments])
        return capsys.readouterr().out.splitlines(), json.loads(out.read_text())

    return run_it


def test_rerank_adds_columns_and_records_its_parameters(run_evaluate):
    plain, figures = run_evaluate()
    assert figures["rerank"] is None
    lines, figures = run_evaluate("--rerank", "rerank.preset=personvit", "rerank.k2=3")
    header, values = lines[0].split(), lines[1].split()
    assert header == ["mAP", "R1", "R5", "R10", "mINP", "rr-mAP", "rr-R1", "rr-R5", "rr-R10", "rr-mINP"]
    assert values[:5] == plain[1].split()
    recorded = figures["rerank"]
    assert (recorded["k1"], recorded["k2"], recorded["lambda_value"], recorded["preset"]) == (50, 3, 0.3, None)
    assert values[5:] == [f"{100 * recorded[key]:.2f}" for key in ("mAP", "rank1", "rank5", "rank10", "mINP")]
    assert any("k1=50 k2=3 lambda=0.3" in line for line in lines)


def test_rerank_default_is_the_published_one(run_evaluate):
    lines, figures = run_evaluate("--rerank")
    assert figures["rerank"]["preset"] == "zhong2017"
    assert any("k1=20 k2=6 lambda=0.3 (zhong2017)" in line for line in lines)


def test_protocol_keep_counts_more_and_says_so(run_evaluate):
    lines, figures = run_evaluate("--protocol", "keep")
    assert figures["protocol"] == "keep"
    assert any("own camera count" in line for line in lines)
    assert not any("in another camera" in line for line in lines)
    assert run_evaluate()[1]["protocol"] == "market"


def test_a_set_of_one_camera_is_told_of_protocol_keep(tmp_path, run_evaluate):
    for folder, frame in (("query", 1), ("bounding_box_test", 2)):
        (tmp_path / "one" / folder).mkdir(parents=True)
        for pid in (1, 2):
            Image.new("RGB", (8, 16), (90 * pid, 10, 10)).save(
                tmp_path / "one" / folder / f"{pid:04}_c1s1_00000{frame}_00.png"
            )
    data = ["data.name=market1501", f"data.root={tmp_path / 'one'}"]
    with pytest.raises(DataError, match="--protocol keep"):
        run_evaluate(data=data)
    assert run_evaluate("--protocol=keep", data=data)[1]["valid_queries"] == 2


def test_several_sets_one_line_each(market, tmp_path, run_evaluate):
    above = tmp_path / "sets"
    above.mkdir()
    for name in ("Market-1501", "DukeMTMC-reID"):
        (above / name).symlink_to(market)
    for root in (above, f"{above}/Market-1501,{above}/DukeMTMC-reID"):
        data = ["data.name=market1501,dukemtmcreid", f"data.root={root}"]
        lines, figures = run_evaluate("--rerank", data=data)
        assert [line.split()[0] for line in lines[:3]] == ["data", "market1501", "dukemtmcreid"]
        assert [one["data"] for one in figures] == ["market1501", "dukemtmcreid"]
        assert lines[1].split()[1:] == lines[2].split()[1:]
        assert figures[0]["mAP"] == run_evaluate()[1]["mAP"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["data.name=market1501,market1501", "data.root=/data"], "expected different names"),
        (["data.name=market1501,", "data.root=/data"], "expected different names"),
        (["data.name=market1501,msmt17"], "needs data.root: the folder above all sets"),
        (["data.name=market1501,msmt17", "data.root=MARKET"], "is the folder of one set"),
    ],
)
def test_lists_of_sets_that_make_no_sense(data, message, market, run_evaluate):
    with pytest.raises(ConfigError, match=message):
        run_evaluate(data=[item.replace("MARKET", str(market)) for item in data])


def test_query_expansion_is_recorded(run_evaluate):
    lines, figures = run_evaluate("expansion.top=2", "expansion.alpha=3")
    assert figures["expansion"] == {"top": 2, "alpha": 3.0}
    assert any("2 nearest gallery images (weights cosine^3)" in line for line in lines)
    assert run_evaluate()[1]["expansion"] is None


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_per_query_results(tmp_path, run_evaluate, suffix):
    file = tmp_path / f"queries.{suffix}"
    _, figures = run_evaluate("--rerank", "--per-query", str(file))
    if suffix == "json":
        rows = json.loads(file.read_text())
        precisions = [row["AP"] for row in rows if row["valid"]]
        assert len(rows[1]["rerank_top"]) == 10
    else:
        rows = list(csv.DictReader(file.open()))
        precisions = [float(row["AP"]) for row in rows if row["valid"] == "1"]
        assert rows[1]["rerank_top10"]
    assert len(rows) == 7
    assert np.mean(precisions) == pytest.approx(figures["mAP"], abs=1e-12)
    assert not rows[-1]["valid"] or rows[-1]["query"].endswith(".jpg")


def test_per_query_needs_a_known_ending(run_evaluate):
    with pytest.raises(ConfigError, match=r"\.json or \.csv"):
        run_evaluate("--per-query", "queries.txt")


def test_cached_features_spare_the_model(market, weights, tmp_path, capsys, monkeypatch):
    arguments = ["data.name=market1501", f"data.root={market}", f"model.weights={weights}", "data.num_workers=0"]
    arguments.append(f"cache={tmp_path / 'cache'}")
    entry.main(arguments)
    first = capsys.readouterr().out

    def refuse(*args, **kwargs):
        raise AssertionError("extracted again")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "extract_features", refuse)
        entry.main(arguments)
        assert capsys.readouterr().out == first
        with pytest.raises(AssertionError, match="extracted again"):
            entry.main([*arguments, "flip=true"])
    weights_of_another_training = tmp_path / "other.safetensors"
    torch.manual_seed(2)
    save_backbone(vit_micro(img_size=(32, 16), patch_size=8), weights_of_another_training)
    os.replace(weights_of_another_training, weights)  # same path, other content
    monkeypatch.setattr(engine, "extract_features", refuse)
    with pytest.raises(AssertionError, match="extracted again"):
        entry.main(arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rerank.k1=0", "rerank.k1=0"),
        ("rerank.k2=0", "rerank.k2=0"),
        ("rerank.lambda_value=1.5", "rerank.lambda_value=1.5"),
        ("rerank.preset=zong2017", "Did you mean rerank.preset=zhong2017"),
        ("expansion.top=-1", "expansion.top=-1"),
        ("protocol=maket", "Did you mean protocol=market"),
        ("rerank.k3=1", "Did you mean rerank.k"),
    ],
)
def test_bad_values_are_named(argument, message):
    with pytest.raises(ConfigError, match=message):
        entry.main(["--rerank", argument])


@pytest.mark.parametrize(("backend", "expected"), [("native", "cuda:1"), ("reference", "cpu"), ("unavailable", "cpu")])
def test_ranking_stays_on_the_gpu_only_with_its_compiled_operators(monkeypatch, backend, expected):
    def report(device):
        return [ReportRow("attention", "reference", ""), ReportRow("rank_counts", backend, "no compiler")]

    monkeypatch.setattr(engine.ops, "report", report)
    assert engine.ranking_device(torch.device("cuda:1")) == torch.device(expected)
    assert engine.ranking_device(torch.device("cpu")) == torch.device("cpu")
