"""What tune.py tries: launch parameters of the Triton kernels, other values for them, and the calls they are timed on.

A setting is what is frozen together: an entry of a table of a kernel module, or some of its constants. Its candidates
are a small grid around the shipped values. Left out of the grids is what spills registers on sm_90 or takes more shared
memory than a program may have there, as `python benchmarks/tune.py --compile` finds without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import bench_attention
import bench_losses
import bench_tokens
import torch
from bench_attention import Rates
from torch import Tensor

from personvit import ops
from personvit.config import PretrainConfig, load_config
from personvit.kernels import adamw, rows
from personvit.kernels.aot import Build
from personvit.models.ssl import StudentTeacher
from personvit.ops import reference
from personvit.ops.adamw import reference as plain_adamw
from personvit.optim import param_groups

IMAGES = 128
"""Of a step on the GPU."""
BUDGETS = ("registers", "shared")
"""Fields of a table's entry that no launch reads."""
TINY_PARAMETERS = ((5,), (1023,), (64, 96), (4097,))
"""In the interpreter, where a whole model would take minutes."""

Configuration = dict[str, Any]


class Conditions(NamedTuple):
    """Where and how large."""

    device: str
    dtype: torch.dtype
    """Of attention and logits; `bench_tokens.LOW` is that of patches and branches."""
    images: int
    rates: Rates


@dataclass(frozen=True)
class Work:
    """A call to time."""

    shape: list[int]
    dtype: str
    run: Callable[[], Any]
    results: Callable[[], Sequence[Tensor]]
    """Results that are made anew, to be compared."""
    exact: list[Tensor]
    """The same in float64."""
    allowed: list[Tensor]
    """Distance from `exact` that each result may have."""
    floor_s: float

    def fault(self, results: Sequence[Tensor]) -> str | None:
        """What is wrong with some results; None if they err at most twice as much as plain torch."""
        for number, (mine, truth, allowed) in enumerate(zip(results, self.exact, self.allowed, strict=True)):
            error = (mine.double() - truth).norm()
            if not error <= allowed:
                scale = truth.norm()
                return f"result {number} is {error / scale:.1e} off float64, allowed are {allowed / scale:.1e}"
        return None


class Plan(NamedTuple):
    """A work before its tensors are made."""

    title: str
    builds: Callable[[Build], bool]
    """Which builds of the module are the kernels of this work."""
    make: Callable[[Conditions], Work]


class Entry(NamedTuple):
    """An entry of a table of launches."""

    module: ModuleType
    table: str
    key: Any

    @property
    def text(self) -> str:
        return f"{self.table}[{self.key!r}]"

    def shipped(self) -> Configuration:
        """The values in force."""
        entry = getattr(self.module, self.table)[self.key]
        return {name: value for name, value in entry._asdict().items() if name not in BUDGETS}

    def swapped(self, values: Configuration) -> contextlib.AbstractContextManager[Any]:
        """Other values within a `with` block."""
        table = getattr(self.module, self.table)
        return patch.dict(table, {self.key: table[self.key]._replace(**values)})


class Constants(NamedTuple):
    """Constants of a module."""

    module: ModuleType
    names: tuple[str, ...]

    @property
    def text(self) -> str:
        return ", ".join(self.names)

    def shipped(self) -> Configuration:
        """The values in force."""
        return {name: getattr(self.module, name) for name in self.names}

    def swapped(self, values: Configuration) -> contextlib.AbstractContextManager[Any]:
        """Other values within a `with` block."""
        return patch.multiple(self.module, **values)


@dataclass(frozen=True)
class Setting:
    """Launch parameters that are frozen together."""

    name: str
    group: str
    """As --kernels calls it."""
    place: Entry | Constants
    grid: tuple[Configuration, ...]
    plans: tuple[Plan, ...]
    source: ModuleType | None = None
    """Module that lists the builds, if another than that of the place."""

    @property
    def file(self) -> str:
        return f"kernels/{self.place.module.__name__.rpartition('.')[2]}.py"

    def candidates(self) -> list[Configuration]:
        """Configurations, the shipped one first."""
        shipped = self.place.shipped()
        return [shipped, *(values for values in self.grid if values != shipped)]

    def builds(self, values: Configuration, plan: Plan) -> list[Build]:
        """What a configuration compiles for a plan."""
        with self.place.swapped(values):
            return [build for build in (self.source or self.place.module).builds() if plan.builds(build)]


def grid(names: str, *values: tuple[Any, ...]) -> tuple[Configuration, ...]:
    """Configurations from the names and rows of a table."""
    return tuple(dict(zip(names.split(), row, strict=True)) for row in values)


def named(*names: str) -> Callable[[Build], bool]:
    """Builds of these names."""
    return lambda build: build.name in names


def work(
    shape: Sequence[int],
    results: Callable[[], Sequence[Tensor]],
    exact: Sequence[Tensor],
    plain: Sequence[Tensor],
    floor_s: float,
    run: Callable[[], Any] | None = None,
) -> Work:
    """A work whose results may err twice as much as `plain` does, plus a rounding.

    Where plain torch happens to be exact, a rounding of the result is still allowed, and some where it is one number,
    which is the sum of thousands.
    """
    allowed = []
    for truth, other in zip(exact, plain, strict=True):
        rounding = torch.finfo(other.dtype).eps * (4 if truth.numel() == 1 else 0.25)
        allowed.append(2 * (other.double() - truth).norm() + rounding * truth.norm())
    kind = str(plain[-1].dtype).removeprefix("torch.")
    return Work(list(shape), kind, run or results, results, list(exact), allowed, floor_s)


def attention_plan(direction: str, model: str, length: int, *builds: str) -> Plan:
    """One layer's attention; the kernel alone, without autograd."""

    def make(at: Conditions) -> Work:
        case = bench_attention.Case(model, at.images, length)
        qkv, above = case.stream(at.dtype, at.device)
        counts, lengths = (list(numbers) for numbers in zip(*case.groups, strict=True))
        both = bench_attention.floor(case, "forward+backward", qkv.element_size(), at.rates)
        forward = bench_attention.floor(case, "forward", qkv.element_size(), at.rates)
        number = ("forward", "backward").index(direction)
        plain, exact = (
            bench_attention.gradients(reference.packed_attention, tensor, case.groups, above)[number]
            for tensor in (qkv, qkv.double())
        )

        def results() -> list[Tensor]:
            if direction == "forward":
                return [torch.ops.personvit.packed_attention(qkv, counts, lengths)]
            return [torch.ops.personvit.packed_attention_backward(above, qkv, counts, lengths)]

        return work(qkv.shape, results, [exact], [plain], forward if direction == "forward" else both - forward)

    return Plan(f"{model}, {length} tokens, {direction}", named(*builds), make)


def tokens_plan(op: str, direction: str, model: str, *builds: str) -> Plan:
    """An operator of bench_tokens: forward, or the backward of a graph that is kept."""

    def make(at: Conditions) -> Work:
        case = next(case for case in bench_tokens.cases(model, at.images, at.device) if case.op == op)
        wide = [
            t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in case.inputs
        ]
        exact: Sequence[Tensor]
        plain: Sequence[Tensor]
        if direction == "forward":
            with torch.no_grad():
                exact, plain = (bench_tokens.outputs(case.plain(*given)) for given in (wide, case.inputs))

            @torch.no_grad()
            def results() -> list[Tensor]:
                return bench_tokens.outputs(case.ours(*case.inputs))

            return work(case.shape, results, exact, plain, case.forward_bytes / at.rates.bytes)
        made = bench_tokens.outputs(case.ours(*case.inputs))
        grads = [torch.randn_like(result) for result in made]
        leaves = [tensor for tensor in case.inputs if tensor.requires_grad]
        plain = bench_tokens.both_ways(case.plain, case.inputs, grads)
        exact = bench_tokens.both_ways(case.plain, wide, [grad.double() for grad in grads])

        def backward() -> Sequence[Tensor]:
            return torch.autograd.grad(made, leaves, grads, retain_graph=True)

        return work(case.shape, backward, exact, plain, case.backward_bytes / at.rates.bytes)

    return Plan(f"{model}, {direction}", named(*builds), make)


def loss_plan(name: str) -> Plan:
    """A loss of bench_losses, forward and backward."""
    scale = bench_losses.SCALES["cuda"][name]

    def make(at: Conditions) -> Work:
        part = scale._replace(images=max(1, scale.images * at.images // IMAGES))
        given = bench_losses.arguments(part, at.device, at.dtype)
        wide = [value.detach().double() if isinstance(value, Tensor) else value for value in given]
        wide[0].requires_grad_()
        exact = bench_losses.both_ways(bench_losses.reference(), wide)
        plain = bench_losses.both_ways(bench_losses.pair_loop, given)

        def both() -> Sequence[Tensor]:
            return bench_losses.both_ways(ops.distill_cross_entropy, given)

        return work(part, both, exact, plain, part.moved / at.rates.bytes)

    kernels = ("teacher_pieces", "teacher_rows", "student_pieces", "student_rows", "student_gradient")
    builds = tuple(f"distill {kernel} bf16 K={scale.width} Q={scale.crops}" for kernel in kernels)
    return Plan(f"{name}, forward and backward", named(*builds), make)


def sum_plan(title: str, shape: Callable[[int], tuple[int, int, int]], width: int) -> Plan:
    """Sums of partial sums [K, P, M]; `shape` takes the images of a step."""

    def make(at: Conditions) -> Work:
        partials = torch.randn(shape(at.images), device=at.device)
        floor = 4 * (partials.numel() + partials[:, 0].numel()) / at.rates.bytes

        def results() -> list[Tensor]:
            return [rows.sum_partials(partials)]

        return work(partials.shape, results, [partials.double().sum(1)], [partials.sum(1)], floor)

    return Plan(title, lambda build: " sum " in build.name and build.constexprs["WIDTH"] == width, make)


def update_plan(recipe: str) -> Plan:
    """AdamW, clipping and moving average of all that a recipe trains."""

    def make(at: Conditions) -> Work:
        sizes = TINY_PARAMETERS if at.device == "cpu" else parameter_sizes(recipe)
        count, elements = len(sizes), sum(torch.Size(size).numel() for size in sizes)

        def tensors() -> list[Tensor]:
            return [torch.randn(size, device=at.device) for size in sizes]

        lists = [tensors(), tensors(), tensors(), [tensor.abs() for tensor in tensors()], tensors()]
        coefficients = torch.rand(count, device=at.device)
        numbers = (1e-3, 0.9, 0.999, 1e-8, [0.04] * count, [8.0] * count, 0.996)

        def step(function: Callable[..., None], dtype: torch.dtype) -> list[Tensor]:
            mine = [[tensor.to(dtype, copy=True) for tensor in tensors] for tensors in lists]
            function(*mine, coefficients.to(dtype), *numbers)
            return [torch.cat([tensor.flatten() for tensor in mine[number]]) for number in (0, 2, 3, 4)]

        exact, plain = step(plain_adamw, torch.float64), step(plain_adamw, torch.float32)
        floor = 36 * elements / at.rates.bytes

        moved = [[tensor.clone() for tensor in tensors] for tensors in lists]  # `lists` stay for the comparisons

        def run() -> None:
            adamw.adamw_ema(*moved, coefficients, *numbers)

        return work([count, elements], lambda: step(adamw.adamw_ema, torch.float32), exact, plain, floor, run)

    return Plan(f"all tensors of {recipe}", named("adamw fp32 clipped"), make)


def parameter_sizes(recipe: str) -> tuple[tuple[int, ...], ...]:
    """Shapes of the trained tensors of a recipe, in the order of its optimiser."""
    with torch.device("meta"):
        student = StudentTeacher(load_config(PretrainConfig, recipe, [])).student
    return tuple(tuple(p.shape) for group in param_groups(student) for p in group["params"])
