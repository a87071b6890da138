"""What a Hopper GPU (H100, H200) is expected to reach, beside what the rows of results say it did.

`tables.py` puts the table into docs/benchmarks.md. The goals were set before anything had run on a GPU, from bytes and
products that cannot be avoided; what falls short of them is shown like what does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Results = dict[str, list[Row]]
"""Rows of one device by file of results."""

ATTENTION, TOKENS, LOSSES, STEP = "attention.jsonl", "tokens.jsonl", "losses.jsonl", "pretrain.jsonl"
DATA, RETRIEVAL = "data.jsonl", "retrieval.jsonl"
FILES = (ATTENTION, TOKENS, LOSSES, STEP, DATA, RETRIEVAL)
OURS = "triton"
STOCK = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "xformers")


@dataclass(frozen=True)
class Goal:
    """One line of the table."""

    what: str
    must: float
    reach: float | None
    """Beyond that; None: nothing was set."""
    unit: str
    value: Callable[[Results], float | None]
    """None: not measured."""
    higher: bool = True
    """Whether more is better."""

    def verdict(self, value: float | None) -> str:
        """In a word."""
        if value is None:
            return "not measured"
        sign = 1 if self.higher else -1
        if self.reach is not None and sign * value >= sign * self.reach:
            return "reached"
        return "met" if sign * value >= sign * self.must else "**missed**"


def median(rows: Iterable[Row], backend: str, **wanted: Any) -> float | None:
    """Seconds of a backend in the newest row that has these values."""
    found = [row for row in rows if row["backend"] == backend and all(row.get(k) == v for k, v in wanted.items())]
    return found[-1]["p50"] if found else None


def quotient(one: float | None, other: float | None) -> float | None:
    """one / other, where both are known."""
    return None if one is None or other is None else one / other


def attention(results: Results, backend: str, work: str, tokens: int) -> float | None:
    """Seconds of one layer of ViT-S with 128 images from a cold cache; backward: what it adds to the forward."""
    wanted = {"model": "ViT-S", "images": 128, "tokens": tokens, "cold": True}
    rows = results.get(ATTENTION, [])
    forward = median(rows, backend, op="attention forward", **wanted)
    if work == "forward":
        return forward
    both = median(rows, backend, op="attention forward+backward", **wanted)
    if work == "both":
        return both
    return None if forward is None or both is None else both - forward


def attention_over(results: Results, *, work: str, tokens: int, stock: tuple[str, ...]) -> float | None:
    """The fastest of some backends over ours."""
    times = [attention(results, name, work, tokens) for name in stock]
    return quotient(min((t for t in times if t is not None), default=None), attention(results, OURS, work, tokens))


def attention_floor(results: Results, *, tokens: int) -> float | None:
    """Share of the floor, forward, in percent."""
    wanted = {"model": "ViT-S", "images": 128, "tokens": tokens, "cold": True, "op": "attention forward"}
    rows = [row for row in results.get(ATTENTION, []) if row["backend"] == OURS]
    found = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    return 100 * found[-1]["floor_s"] / found[-1]["p50"] if found else None


def over_eager(results: Results, *, file: str, op: str, **wanted: Any) -> float | None:
    """Eager PyTorch over ours."""
    rows = results.get(file, [])
    return quotient(median(rows, "eager", op=op, **wanted), median(rows, OURS, op=op, **wanted))


def step(results: Results, recipe: str, *variants: str) -> Row | None:
    """The fastest of some variants of the whole step, at any number of images."""
    rows = [r for r in results.get(STEP, []) if r["recipe"] == recipe and r["backend"] in variants]
    return max(rows, key=lambda row: row["images_per_s"], default=None)


def step_value(results: Results, *, recipe: str, key: str, factor: float = 1.0) -> float | None:
    """A value of the fastest fused step."""
    best = step(results, recipe, "fused", "fused+compiled")
    return None if best is None or best.get(key) is None else factor * best[key]


def step_over(results: Results, *, recipe: str, variant: str, key: str = "images_per_s") -> float | None:
    """The fastest fused step over another variant with as many images; of bytes likewise."""
    best = step(results, recipe, "fused", "fused+compiled")
    rows = results.get(STEP, [])
    other = [r for r in rows if r["backend"] == variant and best is not None and r["shape"] == best["shape"]]
    same = [r for r in other if r["recipe"] == recipe]
    return quotient(best[key], same[-1][key]) if best is not None and same else None


def loader(results: Results, *, backend: str, per_core: bool = False) -> float | None:
    """Images of a second, ten crops of each, by the best setting of a loader."""
    rows = [r for r in results.get(DATA, []) if r["backend"] == backend and r["recipe"] == "vit_small_luperson"]
    rates = [r["images_per_s"] / (max(1, r["workers"]) if per_core else 1) for r in rows]
    return max(rates, default=None)


def retrieval(results: Results, *, op: str, scale: str, key: str = "p50", factor: float = 1e3) -> float | None:
    """Milliseconds of ours, or another value."""
    rows = [r for r in results.get(RETRIEVAL, []) if r["op"] == op and r.get("scale") == scale]
    rows = [r for r in rows if r["backend"] != "numpy" and r.get(key) is not None]
    return factor * rows[-1][key] if rows else None


def _attention(title: str, must: float, reach: float | None, **wanted: Any) -> Goal:
    return Goal(f"attention {title}", must, reach, "x", functools.partial(attention_over, **wanted))


def _step(
    title: str,
    must: float,
    reach: float | None,
    unit: str,
    value: Callable[..., float | None],
    *,
    higher: bool = True,
    **wanted: Any,
) -> Goal:
    return Goal(f"pre-training step, {title}", must, reach, unit, functools.partial(value, **wanted), higher)


def _retrieval(title: str, must: float, reach: float | None, unit: str, **wanted: Any) -> Goal:
    return Goal(title, must, reach, unit, functools.partial(retrieval, **wanted), higher=False)


_SMALL, _BASE = "vit_small_luperson", "vit_base_luperson"
_MSMT17 = "rerank 20/6/0.3 top 100"
GOALS = (
    _attention("129 tokens, forward, over eager", 4, 6, work="forward", tokens=129, stock=("eager",)),
    _attention("129 tokens, backward, over eager", 3, 4, work="backward", tokens=129, stock=("eager",)),
    _attention("33 tokens, forward, over eager", 3, 5, work="forward", tokens=33, stock=("eager",)),
    _attention("33 tokens, backward, over eager", 3, 4, work="backward", tokens=33, stock=("eager",)),
    _attention("129 tokens, forward, over SDPA flash", 1.7, 2.5, work="forward", tokens=129, stock=("sdpa-flash",)),
    _attention("129 tokens, backward, over SDPA flash", 2, 2.5, work="backward", tokens=129, stock=("sdpa-flash",)),
    _attention("129 tokens, both, over xformers", 1.7, 2.5, work="both", tokens=129, stock=("xformers",)),
    _attention("129 tokens, both, over the best stock kernel", 1.2, 1.5, work="both", tokens=129, stock=STOCK),
    _attention("33 tokens, both, over the best stock kernel", 1.2, 1.5, work="both", tokens=33, stock=STOCK),
    Goal("attention 129 tokens, forward, of floor", 65, None, "%", functools.partial(attention_floor, tokens=129)),
    Goal("attention 33 tokens, forward, of floor", 60, None, "%", functools.partial(attention_floor, tokens=33)),
    Goal(
        "CLS loss over eager, both ways", 10, 15, "x",
        functools.partial(over_eager, file=LOSSES, op="distill_cross_entropy CLS", cold=True),
    ),
    Goal(
        "token assembly over eager, both ways", 2.5, 3.5, "x",
        functools.partial(over_eager, file=TOKENS, op="assemble_tokens both", model="ViT-S", cold=True),
    ),
    Goal(
        "sum and norm over eager, both ways", 2.5, 3.5, "x",
        functools.partial(over_eager, file=TOKENS, op="add_layer_norm both", model="ViT-S", cold=True),
    ),
    _step("ViT-S", 4000, 4600, "images/s", step_value, recipe=_SMALL, key="images_per_s"),
    _step("ViT-S, MFU", 34, 39.5, "%", step_value, recipe=_SMALL, key="mfu", factor=100.0),
    _step("ViT-S, over eager iBOT", 3.5, None, "x", step_over, recipe=_SMALL, variant="eager-ibot"),
    _step("ViT-S, over compiled with SDPA", 1.35, None, "x", step_over, recipe=_SMALL, variant="compiled"),
    _step("ViT-B", 1250, 1400, "images/s", step_value, recipe=_BASE, key="images_per_s"),
    _step("ViT-B, MFU", 41, 45, "%", step_value, recipe=_BASE, key="mfu", factor=100.0),
    _step("ViT-B, over eager iBOT", 2, None, "x", step_over, recipe=_BASE, variant="eager-ibot"),
    _step("ViT-B, over compiled with SDPA", 1.15, None, "x", step_over, recipe=_BASE, variant="compiled"),
    _step(
        "ViT-S, peak memory of eager iBOT", 0.55, 0.4, "x", step_over,
        recipe=_SMALL, variant="eager-ibot", key="peak_bytes", higher=False,
    ),
    Goal("loader with GPU and all cores", 5200, 7000, "images/s", functools.partial(loader, backend="dali-gpu")),
    Goal(
        "loader without GPU, a core", 150, 300, "images/s",
        functools.partial(loader, backend="dali-cpu", per_core=True),
    ),
    _retrieval("re-ranking, Market-1501 scale", 6, 4, "ms", op="rerank 20/6/0.3", scale="market"),
    _retrieval("re-ranking, MSMT17 scale", 110, 40, "ms", op=_MSMT17, scale="msmt17"),
    _retrieval(
        "re-ranking, MSMT17 scale, memory", 6, None, "GB", op=_MSMT17, scale="msmt17", key="peak_bytes", factor=1e-9
    ),
    _retrieval("metrics, Market-1501 scale", 0.3, None, "ms", op="rank_metrics", scale="market"),
    _retrieval("metrics, MSMT17 scale", 3, None, "ms", op="rank_metrics", scale="msmt17"),
)  # fmt: skip


def lines(results: Results) -> Iterable[list[str]]:
    """Goal, must, reach, measured, verdict: as texts."""
    for goal in GOALS:
        value = goal.value(results)
        unit = goal.unit if goal.unit == "x" else f" {goal.unit}"
        reach = "" if goal.reach is None else f"{goal.reach:,g}{unit}"
        shown = "" if value is None else f"{value:,.0f}{unit}" if value >= 1000 else f"{value:.3g}{unit}"
        yield [goal.what, f"{goal.must:,g}{unit}", reach, shown, goal.verdict(value)]
