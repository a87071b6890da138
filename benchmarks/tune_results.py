"""What tune.py found: trials of configurations, which is best, tables, rows, and the lines to freeze."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import harness
from bench_tokens import microseconds
from tune_plan import Configuration, Plan, Setting

SHARED_MEMORY = 227 << 10
"""Bytes that a program may have on sm_90."""
LEAST_NOISE = 0.01
"""Two measurements may agree by chance; a hundredth is not worth an edit."""

Usage = dict[tuple[str, int], list[dict[str, Any]]]
"""What the kernels of a candidate take when compiled, by name of the setting and number."""


class Trial(NamedTuple):
    """A configuration on a call: how long, or why not."""

    values: Configuration
    measured: harness.Measurement | None
    reason: str = ""


@dataclass
class Outcome:
    """Trials of a setting on one call."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Shape, type and floor, for the rows."""
    shipped: list[harness.Measurement] = field(default_factory=list)
    """Before the candidates, and after."""
    trials: list[Trial] = field(default_factory=list)
    """The shipped configuration first."""

    @property
    def noise(self) -> float:
        """Relative difference of the two measurements as shipped; inf if there are not two."""
        if len(self.shipped) < 2:
            return math.inf
        first, last = (measured.at(50) for measured in self.shipped)
        return abs(first - last) / min(first, last)

    def ratios(self) -> dict[str, float]:
        """How many times as fast as the shipped configuration, by text of the configuration."""
        shipped = sum(measured.at(50) for measured in self.shipped) / len(self.shipped)
        return {text(t.values): shipped / t.measured.at(50) for t in self.trials if t.measured is not None}


class Verdict(NamedTuple):
    """What the measurements of a setting say."""

    best: str
    """Text of a configuration."""
    gain: float
    """Geometric mean over the calls."""
    noise: float
    worth: bool
    """Faster beyond the noise."""


def text(values: Configuration) -> str:
    """`queries=32 num_warps=8`."""
    return " ".join(f"{name}={str(value).replace(' ', '')}" for name, value in values.items())


def verdict(outcomes: Sequence[Outcome]) -> Verdict | None:
    """The best configuration of those measured on every call and slow on none; None if there is none."""
    ratios = [outcome.ratios() for outcome in outcomes if outcome.shipped]
    known = [name for name in (ratios[0] if ratios else ()) if all(name in ratio for ratio in ratios)]
    noise = max(LEAST_NOISE, *(outcome.noise for outcome in outcomes))
    known = [name for name in known if all(ratio[name] >= 1 - noise for ratio in ratios)]
    if not known:
        return None
    best = max(known, key=lambda name: math.prod(ratio[name] for ratio in ratios))
    gain = math.prod(ratio[best] for ratio in ratios) ** (1 / len(ratios))
    return Verdict(best, gain, noise, gain > 1 + noise)


def taken(usage: Usage, setting: Setting, number: int, plan: Plan | None = None) -> dict[str, int]:
    """Most registers and shared memory, and all spills, of the kernels of a candidate; {} where that is not known."""
    found = [row for row in usage.get((setting.name, number), []) if "error" not in row]
    if plan is not None:
        names = {build.name for build in setting.builds(setting.candidates()[number], plan)}
        found = [row for row in found if row["name"] in names]
    if not found:
        return {}
    spills = sum(row["spills"] for row in found)
    return {key: max(row[key] for row in found) for key in ("registers", "shared")} | {"spills": spills}


def obstacle(found: Sequence[dict[str, Any]]) -> str:
    """Why a candidate does not belong in a grid; empty if it does."""
    for row in found:
        if "error" in row:
            return str(row["error"])
        if row["spills"]:
            return f"spills ({row['spills']} instructions of {row['name']})"
        if row["shared"] > SHARED_MEMORY:
            return f"{row['shared']} bytes of shared memory, {SHARED_MEMORY} is the most ({row['name']})"
    return ""


def resources_text(resources: dict[str, int]) -> str:
    """Columns of a table."""
    return "".join(f"{resources.get(key, '?'):>8}" for key in ("registers", "spills", "shared"))


def show(setting: Setting, plan: Plan, outcome: Outcome, usage: Usage) -> None:
    """The trials of a call, fastest first."""
    print(f"\n{setting.name}: {setting.place.text} in {setting.file}; {outcome.title} {outcome.facts.get('shape', '')}")
    numbers = {text(values): number for number, values in enumerate(setting.candidates())}
    found = [(trial, trial.measured) for trial in outcome.trials if trial.measured is not None]
    if found:
        floor, ratios = outcome.facts["floor_s"], outcome.ratios()
        print(f"floor {microseconds(floor)}, noise {outcome.noise:.1%}")
        print(
            f"{'configuration':<52}{'p20':>11}{'p50':>11}{'p80':>11}{'/shipped':>9}{'share':>7}    regs  spills  shared"
        )
        for trial, measured in sorted(found, key=lambda pair: pair[1].at(50)):
            name = text(trial.values)
            mark = "  shipped" if trial is outcome.trials[0] else ""
            times = "".join(f"{microseconds(measured.at(p)):>11}" for p in (20, 50, 80))
            resources = resources_text(taken(usage, setting, numbers[name], plan))
            print(f"{name:<52}{times}{ratios[name]:8.2f}x{floor / measured.at(50):7.0%}{resources}{mark}")
    for trial in outcome.trials:
        if trial.measured is None:
            print(f"{text(trial.values):<52} left out: {trial.reason}")
    sys.stdout.flush()


def result_rows(setting: Setting, plan: Plan, outcome: Outcome, usage: Usage, rate: float) -> list[dict[str, Any]]:
    """Rows of results; the shipped configuration has two."""
    if not outcome.shipped:
        return []
    last = [Trial(outcome.trials[0].values, measured) for measured in outcome.shipped[1:]]
    numbers = {text(values): number for number, values in enumerate(setting.candidates())}
    found = []
    for trial in (*outcome.trials, *last):
        if trial.measured is None:
            continue
        number = numbers[text(trial.values)]
        more: dict[str, Any] = {"call": plan.title, "file": setting.file, "place": setting.place.text}
        more |= {
            "configuration": trial.values,
            "shipped": number == 0,
            "cold": True,
            "floor_s": outcome.facts["floor_s"],
            "copy_rate": rate,
        }
        more |= taken(usage, setting, number, plan)
        shape, dtype = outcome.facts["shape"], outcome.facts["dtype"]
        found.append(harness.row(setting.name, "triton", shape, trial.measured, dtype=dtype, **more))
    return found


def summary(results: Sequence[tuple[Setting, Sequence[Outcome]]]) -> Iterator[str]:
    """Lines: of each setting the shipped and the best, and what to freeze."""
    yield "\nsummary; gain: mean over the calls, above the noise only where so marked"
    for setting, outcomes in results:
        shipped = text(setting.place.shipped())
        found = verdict(outcomes)
        if found is None:
            yield f"{setting.name}: shipped {shipped}; not measured"
            continue
        yield f"{setting.name}: shipped {shipped}; best {found.best}; {found.gain:.3f}x, noise {found.noise:.1%}"
        if found.worth:
            yield f"    above the noise: freeze {setting.place.text} = {found.best} in {setting.file}"
    yield "\nRegisters and shared memory of a new entry, for its budgets: python -m personvit.kernels.aot"


def left_out(results: Sequence[tuple[Setting, Sequence[Outcome]]]) -> Iterator[str]:
    """Lines: what there was no time for."""
    for setting, outcomes in results:
        for plan, outcome in zip(setting.plans, outcomes, strict=True):
            missing = len(setting.candidates()) - len(outcome.trials)
            if missing and (outcome.shipped or not outcome.trials):
                yield f"no time left for {missing} configurations of {setting.name}, {plan.title}"
