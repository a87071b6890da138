"""The comparison of starts (benchmarks/evidence.py): a quick run of all arms, an interrupted one, and the page."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import one_thread

from personvit.data.generated.dataset import ensure_generated
from personvit.data.loaders import build_pretrain_loader
from personvit.data.reid_sets import open_reid_set
from personvit.data.sources import open_source
from personvit.engine.finetune_step import FinetuneStep
from personvit.engine.pretrain_loop import PretrainRun
from personvit.engine.step import PretrainStep
from personvit.errors import EXIT_INTERRUPTED, ConfigError
from personvit.models.ssl import StudentTeacher
from personvit.runtime.distributed import init_distributed
from personvit.runtime.entry import run
from personvit.runtime.seed import seed_everything

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("evidence", "evidence_arms", "evidence_page", "tables", "harness")
FIGURES = ("mAP", "rank1", "mINP", "rr_mAP", "rr_rank1", "rr_mINP")


@pytest.fixture(scope="module")
def evidence():
    """The script as a module; on the CPU, where runs can be compared figure by figure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        import evidence

        yield evidence
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The drawn persons, once for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(evidence, cache, tmp_path_factory):
    """Folder of a quick run of all arms."""
    out = tmp_path_factory.mktemp("evidence")
    with one_thread():
        assert run(evidence.main, ["--quick", "--out", str(out)]) == 0
    return out


def facts_of(row: dict) -> dict:
    """What must be the same when a run is done again."""
    return {key: row[key] for key in row if not key.endswith(("seconds", "date", "commit"))}


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "evidence.jsonl").read_text().splitlines()]


def test_every_arm_has_a_whole_row(evidence, finished):
    rows = rows_of(finished)
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, 0) for arm in evidence.ARMS]
    figures = [*FIGURES, *(f"occluded_{key}" for key in FIGURES), "frozen_mAP", "frozen_rank1"]
    for row in rows:
        assert all(0 <= row[key] <= 1 for key in figures)
        assert row["generated"] is row["quick"] is True
        assert {"commit", "device", "date", "torch"} <= row.keys()
        assert (row["pool_images"], row["train_ids"], row["test_ids"]) == (24, 6, 4)
        trained = row["arm"] != "scratch"
        assert (row["pretrain_steps"], row["pretrain_images"]) == ((6, 48) if trained else (0, 0))
        assert (row["pretrain_seconds"] > 0) == trained
        assert row["finetune_images"] == 12 * row["finetune_steps"] > 0
        assert row["finetune_seconds"] > 0
        assert row["overrides"]["arm"] == list(evidence.ARMS[row["arm"]])
    assert len({row["settings"] for row in rows}) == 1
    assert len({row["frozen_mAP"] for row in rows}) == 4  # four different backbones


def test_fine_tunings_start_from_the_backbone_of_their_arm(evidence, finished):
    for arm in evidence.ARMS:
        folder = finished / f"{arm}-seed0"
        backbone = folder / "pretrain" / "exported" / "backbone.safetensors"
        assert backbone.is_file() == (arm != "scratch")
        resolved = (folder / "finetune" / "resolved.yaml").read_text()
        assert f"weights: {'null' if arm == 'scratch' else backbone}" in resolved


def test_a_second_call_repeats_nothing(evidence, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert run(evidence.main, ["--quick", "--out", str(finished)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before
    shown = capsys.readouterr().out
    assert "All 4 runs are done" in shown
    assert "No figure above speaks for anything" in shown


def test_a_row_that_was_lost_is_made_again_from_what_is_finished(evidence, finished, tmp_path, monkeypatch):
    import evidence_arms

    for name in ("pretrain", "finetune", "evaluate_set"):
        monkeypatch.setattr(evidence_arms, name, None)  # nothing is trained or evaluated
    settings = evidence.Settings(quick=True)
    rows_file = tmp_path / "rows.jsonl"
    evidence.run_all(settings, ["mim"], [0], finished, rows_file)
    assert facts_of(json.loads(rows_file.read_text())) == facts_of(rows_of(finished)[2])


def test_runs_of_other_settings_are_not_mixed(evidence, finished, capsys):
    assert run(evidence.main, ["--quick", "--out", str(finished), "--finetune", "optim.lr=1e-3"]) == 5
    shown = capsys.readouterr()
    assert "scratch-seed0 holds a run of other settings" in shown.err
    assert "Incomplete; without a row: from scratch seed 0, DINO only seed 0" in shown.out
    assert len(rows_of(finished)) == 4


def test_settings_are_told_apart_by_what_matters(evidence):
    digest = evidence.Settings(quick=True).digest
    assert evidence.Settings(("kernels.backend=reference", "data.num_workers=3"), quick=True).digest == digest
    assert evidence.Settings(finetune=("optim.lr=0.0003",), quick=True).digest == digest  # the value that it has
    others = [("data.generated_train=25",), ("loss.lambda_cls=0.5",), ("train.epochs=3",)]
    assert len({digest, *(evidence.Settings(other, quick=True).digest for other in others)}) == 4
    with pytest.raises(ConfigError, match=r"data\.root=/x: every run sets"):
        evidence.Settings(("data.root=/x",))


def test_defaults_are_large_enough(evidence):
    settings = evidence.Settings()
    cfg, tuning = settings.pretraining("dino+mim", 7), settings.finetuning(7)
    assert cfg.data.generated_train >= 20_000
    assert cfg.data.generated_train_ids >= 500
    assert (cfg.model.arch, cfg.crops.global_size, cfg.train.precision) == ("vit_small", (256, 128), "bf16")
    assert (tuning.model.arch, tuning.input.size) == ("vit_small", (256, 128))
    assert cfg.train.seed == tuning.train.seed == 7


def test_an_interrupted_run_goes_on_and_ends_as_the_uninterrupted_one(evidence, finished, tmp_path, monkeypatch):
    out = ["--quick", "--out", str(tmp_path), "--arms", "dino+mim"]
    taken = PretrainRun._run_step

    def interrupted(self, batches):
        taken(self, batches)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainRun, "_run_step", interrupted)
        with pytest.raises(SystemExit) as left:
            run(evidence.main, out)
    assert left.value.code == EXIT_INTERRUPTED
    assert not (tmp_path / "evidence.jsonl").exists()
    assert run(evidence.main, out) == 0
    log = (tmp_path / "dino+mim-seed0" / "pretrain" / "train.log").read_text()
    assert "stopped at step 4" in log
    assert "at step 4 of 6" in log
    assert [facts_of(row) for row in rows_of(tmp_path)] == [facts_of(rows_of(finished)[3])]


def test_sigterm_outside_of_a_training_leaves_the_same_way(evidence):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, evidence.leaving_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_occluded_split_has_the_occluded_queries_and_the_whole_gallery(evidence, cache, finished):
    import evidence_arms

    root = ensure_generated(evidence.Settings(quick=True).pretraining("mim", 0).data)
    whole = open_reid_set("generated", root)
    part = evidence_arms.occluded_queries(whole)
    card = json.loads((root / "card.json").read_text())
    wanted = [name for name in card["occluded"] if name.startswith("query/")]
    assert sorted(path.removeprefix(f"{root}/") for path in part.query.paths) == sorted(wanted)
    assert 0 < len(part.query) == next(split["occluded"] for split in card["splits"] if split["split"] == "query")
    assert len(part.query) < len(whole.query)
    for path, pid, camid in zip(part.query.paths, part.query.pids, part.query.camids, strict=True):
        assert Path(path).name.startswith(f"{pid:04}_c{camid + 1}s")
    assert part.gallery == whole.gallery
    assert {row["occluded_queries"] for row in rows_of(finished)} == {len(wanted)}


def one_step(evidence, arm, *, without=None):
    """Batch, gradients by name and numbers of one step of an arm; `without` a loss, that one is a constant."""
    cfg = evidence.Settings(quick=True).pretraining(arm, 0)
    batch = next(iter(build_pretrain_loader(cfg, open_source(cfg.data), 0, 1, 0)))
    trainer = PretrainStep(cfg, init_distributed(), 3)
    if without is not None:
        getattr(trainer, without).forward = lambda *_: torch.zeros(())
    trainer.forward_backward(batch, 0, 0)
    parameters = trainer.model.student.named_parameters()
    gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None and p.grad.any()}
    return batch, gradients, trainer.finish(step=3)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_dino_alone_masks_nothing_and_learns_from_the_cls_token_only(evidence, cache):
    batch, gradients, numbers = one_step(evidence, "dino")
    assert not batch.masks.any()
    assert len(batch.mask_indices) == batch.masked == 0
    assert batch.local_crops is not None
    assert numbers.finite
    assert numbers.loss == numbers.loss_cls > numbers.loss_patch == 0
    assert same(gradients, one_step(evidence, "dino", without="patch_loss")[1])
    assert not one_step(evidence, "dino", without="dino_loss")[1]
    assert "backbone.masked_embed" not in gradients


def test_mim_alone_learns_from_masked_patches_only(evidence, cache):
    batch, gradients, numbers = one_step(evidence, "mim")
    assert batch.masked > 0
    assert batch.local_crops is None
    assert numbers.finite
    assert numbers.loss == numbers.loss_patch > 0
    assert same(gradients, one_step(evidence, "mim", without="dino_loss")[1])
    assert not one_step(evidence, "mim", without="patch_loss")[1]
    assert "backbone.masked_embed" in gradients


def test_dino_and_mim_learns_from_both(evidence, cache):
    batch, gradients, numbers = one_step(evidence, "dino+mim")
    assert batch.masked > 0
    assert batch.local_crops is not None
    assert numbers.loss == pytest.approx(numbers.loss_cls + numbers.loss_patch)
    for loss in ("dino_loss", "patch_loss"):
        rest = one_step(evidence, "dino+mim", without=loss)[1]
        assert rest
        assert not same(gradients, rest)


def test_all_arms_start_from_the_same_weights(evidence, cache, finished):
    import evidence_arms

    settings = evidence.Settings(quick=True)
    root = ensure_generated(settings.pretraining("scratch", 5).data)
    arm = evidence_arms.ArmRun(settings, "scratch", 5, root, finished / "unused")
    untrained = arm._start().model.state_dict()
    tuned = FinetuneStep(arm.finetuning, init_distributed(), 6, 0).model.base.state_dict()
    seed_everything(5)
    pretrained = StudentTeacher(arm.cfg).teacher.backbone.state_dict()
    assert same(untrained, tuned)
    assert same(untrained, pretrained)
    assert not same(
        untrained, evidence_arms.ArmRun(settings, "scratch", 6, root, finished / "x")._start().model.state_dict()
    )


def test_without_a_gpu_it_says_what_to_do(evidence, capsys):
    assert run(evidence.main, []) == 1
    assert "python benchmarks/evidence.py --quick" in capsys.readouterr().err


def made_up(finished: Path, arm: str, seed: int, mean: float, **more) -> dict:
    row = next(row for row in rows_of(finished) if row["arm"] == arm)
    return {**row, "seed": seed, "mAP": mean, "occluded_rr_mAP": mean / 2, "settings": "one", "device": "GPU", **more}


def lines_of(page: str, start: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if f"| {start} |" in line
    ]


def test_page_has_means_spreads_and_paired_differences(evidence, finished):
    means = {"scratch": (0.5, 0.52, 0.57), "dino": (0.6, 0.55, 0.59)}
    rows = [made_up(finished, arm, seed, mean) for arm, own in means.items() for seed, mean in enumerate(own)]
    rows.append(made_up(finished, "mim", 1, 0.5196))  # a single seed
    page = evidence.page([made_up(finished, "dino", 2, 0.9), *rows])  # the later row of a run counts
    scratch, dino, mim = (
        lines_of(page, evidence_title) for evidence_title in ("from scratch", "DINO only", "MIM only")
    )
    spread = statistics.stdev([50, 52, 57])
    assert scratch[0][:3] == ["from scratch", "3", f"53.0 ± {spread:.1f}"]
    assert scratch[1][4] == f"26.5 ± {spread / 2:.1f}"  # occluded, re-ranked
    assert dino[0][:3] == ["DINO only", "3", f"58.0 ± {statistics.stdev([60, 55, 59]):.1f}"]
    assert dino[1][:3] == ["DINO only", "3", f"+5.0 ± {statistics.stdev([10, 3, 2]):.1f}"]
    assert mim[0][:3] == ["MIM only", "1", "52.0"]
    assert mim[1][:3] == ["MIM only", "1", "+0.0"]  # -0.04
    assert "without a row: MIM only seed 0, DINO + MIM seed 0, DINO + MIM seed 1, MIM only seed 2" in page
    assert page.count("## Settings") == 1
    assert "Not measured" not in page


def test_rows_of_other_settings_are_not_averaged(evidence, finished):
    old = made_up(finished, "dino", 0, 0.9, settings="old", date="2020-01-01T00:00:00+00:00")
    page = evidence.page([made_up(finished, "dino", 0, 0.5), made_up(finished, "dino", 1, 0.6), old])
    assert page.index("## Settings one") < page.index("## Settings old")
    first, second = (lines_of(part, "DINO only")[0] for part in page.split("## Settings old"))
    assert first[1:3] == ["2", "55.0 ± 7.1"]
    assert second[1:3] == ["1", "90.0"]


def test_page_is_written_and_checked(evidence, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(evidence.harness, "RESULTS", tmp_path)
    assert run(evidence.main, ["--check"]) == 1
    assert "run python benchmarks/evidence.py --page" in capsys.readouterr().out
    assert run(evidence.main, ["--page"]) == run(evidence.main, ["--check"]) == 0
    assert "**Not measured: no GPU was at hand.**" in evidence.PAGE.read_text()
    (tmp_path / "evidence.jsonl").write_text(json.dumps(made_up(finished, "mim", 0, 0.4)) + "\n")
    assert run(evidence.main, ["--check"]) == 1


def test_page_in_docs_is_what_the_rows_say(evidence):
    assert evidence.update_page(check=True) == 0, "run python benchmarks/evidence.py --page"
