"""The kernel tuner in Triton's interpreter: candidates compute what shipped configurations do; what it concludes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from personvit import ops
from personvit.kernels import adamw, attention
from personvit.ops import backend

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, benchmarks/tune.py itself checks them", allow_module_level=True)

FOLDER = Path(__file__).parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)
    import bench_attention
    import bench_tokens
    import harness
    import tune
    import tune_grids
    import tune_plan
    import tune_results

BY_NAME = {setting.name: setting for setting in tune.SETTINGS}
LAUNCH_ONLY = ("warps", "num_warps", "NUM_WARPS", "stages", "num_stages")
"""What the interpreter takes no notice of."""


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch):
    """One image, few tokens in ragged tiles, one head; float16: the interpreter's bfloat16 products are wrong."""
    before = backend.get_backend()
    ops.set_backend("triton")
    monkeypatch.setattr(bench_tokens, "LOW", torch.float16)
    for module in (bench_tokens, tune_grids):
        monkeypatch.setattr(module, "GLOBALS", (1, 40))
        monkeypatch.setattr(module, "LOCALS", (2, 12))
    monkeypatch.setattr(bench_tokens, "MODELS", {"ViT-S": 96})
    monkeypatch.setattr(bench_attention, "HEADS", {"ViT-S": 1})
    monkeypatch.setattr(bench_attention, "CROPS", dict.fromkeys(bench_attention.CROPS, 1))
    yield tune.Conditions("cpu", torch.float16, 1, bench_attention.Rates(1e9, 1e9))
    ops.set_backend(before)


def measurement(seconds: float) -> harness.Measurement:
    return harness.Measurement((seconds,) * 3, None)


def some_candidates(setting) -> list[dict]:
    """Two beside the shipped one that differ in more than warps and stages; one for logits, which take their time."""
    shipped, *others = setting.candidates()
    kinds = {}
    for values in others:
        kinds.setdefault(str({k: v for k, v in values.items() if k not in LAUNCH_ONLY}), values)
    kinds.pop(str({k: v for k, v in shipped.items() if k not in LAUNCH_ONLY}), None)
    found = list(kinds.values())
    middle = (len(found) - 1) // 2
    return found[middle : middle + 1] if setting.group == "distill" else found[:: max(1, len(found) - 1)]


@pytest.mark.parametrize("name", BY_NAME)
def test_grid_is_legal_and_begins_with_the_shipped_configuration(name: str) -> None:
    setting = BY_NAME[name]
    shipped, *others = candidates = setting.candidates()
    assert shipped == setting.place.shipped()
    assert 4 <= len(others) < 20
    assert all(values.keys() == shipped.keys() for values in others)
    assert len({tune_results.text(values) for values in candidates}) == len(candidates)
    for values in candidates:
        sizes = dict(values)
        assert sizes.pop("stages", 1) in range(1, 5)
        assert sizes.pop("num_stages", 1) in range(1, 5)
        assert sizes.pop("RESIDENT_WARPS", 132) % 132 == 0
        numbers = [n for value in sizes.values() for n in (value if isinstance(value, tuple) else (value,))]
        assert all(n > 0 and n & (n - 1) == 0 for n in numbers), values
        assert all(sizes.get(key, 1) <= 16 for key in ("WARPS", "NUM_WARPS", "num_warps", "warps"))
        assert sizes.get("queries", 16) >= 16  # tl.dot takes no less
        assert sizes.get("CHUNK", 0) % sizes.get("BLOCK", 1) == 0


@pytest.mark.parametrize("name", BY_NAME)
def test_swapping_reaches_the_launch_and_is_undone(name: str) -> None:
    setting = BY_NAME[name]
    shipped, *others = setting.candidates()

    def launches(values: dict) -> list:
        builds = [build for plan in setting.plans for build in setting.builds(values, plan)]
        assert builds, "no build is that of the call"
        return [(build.kernel, build.constexprs, build.num_warps, build.num_stages) for build in builds]

    if name != "add_layer_norm programs":  # a number of programs is no part of a kernel
        known = [launches(shipped)]
        for values in others:
            found = launches(values)
            assert found not in known, values
            known.append(found)

    def fail() -> None:
        with setting.place.swapped(others[0]):
            assert setting.place.shipped() == others[0]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert setting.place.shipped() == shipped


def test_number_of_programs_is_read_at_the_call() -> None:
    setting = BY_NAME["add_layer_norm programs"]
    tile = tune_plan.rows.tile_of(384)
    with setting.place.swapped({"RESIDENT_WARPS": 132}):
        assert tune_plan.rows.programs_of(66816, tile)[0] == 33


@pytest.mark.parametrize("name", BY_NAME)
def test_candidates_agree_with_float64_and_with_the_shipped_configuration(name: str, at) -> None:
    setting = BY_NAME[name]
    # Every second is that of ViT-B; those of one kernel on longer rows show nothing new.
    for plan in (plan for plan in setting.plans[::2] if "128 patches" not in plan.title):
        work = plan.make(at)
        shipped = work.results()
        assert work.fault(shipped) is None
        for values in some_candidates(setting):
            with setting.place.swapped(values), tune.poisoned():
                found = work.results()
            assert work.fault(found) is None, values
            for mine, theirs in zip(found, shipped, strict=True):
                assert mine.dtype == theirs.dtype
                torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)


def test_what_is_wrong_or_does_not_run_is_left_out_with_its_reason(at, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = BY_NAME["adamw_ema"]
    work = setting.plans[0].make(at)
    chunk = adamw.CHUNK
    # A block beyond its chunk: elements are updated twice.
    assert "off float64" in tune.attempt(setting, {"CHUNK": 512, "BLOCK": 1024}, work, "cpu").reason
    assert "power of 2" in tune.attempt(setting, {"CHUNK": 3000, "BLOCK": 1000}, work, "cpu").reason
    # No program: what is written nowhere is NaN.
    monkeypatch.setattr(attention, "resident_forward", {(1,): lambda *args, **options: None})
    setting = BY_NAME["attention forward 128+1"]
    trial = tune.attempt(setting, setting.place.shipped(), setting.plans[0].make(at), "cpu")
    assert "nan off float64" in trial.reason
    assert trial.measured is None
    assert chunk == adamw.CHUNK


def test_shipped_is_measured_before_and_after_even_if_time_is_up(at, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = BY_NAME["adamw_ema"]
    order = []

    def measure(work, device, **_) -> harness.Measurement:
        order.append((adamw.CHUNK, adamw.BLOCK, adamw.NUM_WARPS))
        work()  # moves the weights, which must not be those that the next candidate is checked with
        return measurement(1e-3)

    monkeypatch.setattr(harness, "measure_device", measure)
    outcome = tune.explore(setting, setting.plans[0], at, deadline=math.inf)
    expected = [tuple(values.values()) for values in setting.candidates()]
    assert not [trial for trial in outcome.trials if trial.reason]
    assert order == [*expected, expected[0]]
    assert len(outcome.shipped) == 2
    assert outcome.noise == 0
    rows = tune_results.result_rows(setting, setting.plans[0], outcome, {}, 1e9)
    assert [row["shipped"] for row in rows] == [True, *[False] * (len(expected) - 1), True]
    assert rows[1]["configuration"] == setting.candidates()[1]
    assert {"p20", "p50", "p80", "floor_s", "dtype", "shape", "backend"} <= json.loads(json.dumps(rows[1])).keys()
    late = tune.explore(setting, setting.plans[0], at, deadline=0)
    assert (len(late.trials), len(late.shipped)) == (1, 2)
    (line,) = tune_results.left_out([(setting, [outcome, late])])
    assert f"{len(expected) - 1} configurations of adamw_ema, all tensors of vit_base" in line


def outcome(shipped: tuple[float, ...], **candidates: float) -> tune_results.Outcome:
    """Seconds as shipped, and of candidates named by their queries."""
    trials = [tune.Trial({"queries": 0}, measurement(shipped[0]))]
    trials += [tune.Trial({"queries": int(name[1:])}, measurement(s)) for name, s in candidates.items()]
    return tune_results.Outcome("call", {}, [measurement(seconds) for seconds in shipped], trials)


def test_only_a_gain_above_the_noise_is_worth_an_edit() -> None:
    found = tune_results.verdict([outcome((1.00, 1.04), q16=0.99, q32=1.5)])
    assert (found.best, found.worth) == ("queries=16", False)
    assert found.noise == pytest.approx(0.04)
    assert found.gain == pytest.approx(1.02 / 0.99)
    found = tune_results.verdict([outcome((1.00, 1.04), q16=0.9)])
    assert found.worth
    # Two measurements that agree by chance are no proof of a gain of half a percent.
    assert not tune_results.verdict([outcome((1.0, 1.0), q16=0.995)]).worth
    # Without the second one there is no noise to compare with.
    assert not tune_results.verdict([outcome((1.0,), q16=0.5)]).worth


def test_best_is_that_over_all_calls_and_slower_on_none() -> None:
    both = [outcome((1.0, 1.0), q16=0.5, q32=0.8), outcome((2.0, 2.0), q16=2.6, q32=1.8)]
    found = tune_results.verdict(both)
    assert (found.best, found.worth) == ("queries=32", True)  # 16: 2x and 0.77x
    assert found.gain == pytest.approx((1.25 / 0.9) ** 0.5)
    both[1].trials = [trial for trial in both[1].trials if trial.values["queries"] != 32]
    found = tune_results.verdict(both)
    assert (found.best, found.worth) == ("queries=0", False)  # 32 was not measured on every call
    both = [outcome((1.0, 1.0), q16=0.5)] * 2
    assert tune_results.verdict(both).worth
    # A call that nobody measured leaves the question open.
    assert not tune_results.verdict([*both, tune_results.Outcome("late")]).worth
    assert tune_results.verdict([tune_results.Outcome("late")]) is None


def test_summary_names_the_line_to_freeze_only_where_it_pays() -> None:
    setting = BY_NAME["attention forward 32+1"]
    good = "\n".join(tune_results.summary([(setting, [outcome((1.0, 1.0), q16=0.5)] * 2)]))
    assert "freeze FORWARD[(32, True, 64)] = queries=16 in kernels/attention.py" in good
    poor = "\n".join(tune_results.summary([(setting, [outcome((1.0, 1.1), q16=0.99)] * 2)]))
    assert "freeze" not in poor
    assert "noise 10.0%" in poor


def test_without_a_gpu_it_says_so_and_lists(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "torch.cuda.is_available() is False" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["tune.py", "--dry-run", "--kernels", "adamw", "gather"])
    assert tune.main() == 0
    printed = capsys.readouterr().out
    assert "CHUNK=4096 BLOCK=1024 NUM_WARPS=4  shipped" in printed
    assert "attention" not in printed


def test_compiling_ahead_shows_what_a_candidate_takes() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = "import json, tune; print(json.dumps(tune.compiled('adamw_ema', 0, 90)))"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert row["name"] == "adamw fp32 clipped"
    assert 16 <= row["registers"] <= 64
    assert tune_results.obstacle([row]) == ""
    usage = {("adamw_ema", 0): [row]}
    setting = BY_NAME["adamw_ema"]
    assert tune_results.taken(usage, setting, 0, setting.plans[0])["registers"] == row["registers"]


def test_candidates_that_spill_or_do_not_compile_are_unfit() -> None:
    good = {"name": "kernel", "registers": 64, "spills": 0, "shared": 1024}
    assert tune_results.obstacle([good]) == ""
    assert "spills (3" in tune_results.obstacle([good, {**good, "spills": 3}])
    assert "shared memory" in tune_results.obstacle([{**good, "shared": 232_449}])
    assert tune_results.obstacle([{"name": "kernel", "error": "bad"}]) == "bad"
