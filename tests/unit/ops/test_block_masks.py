from __future__ import annotations

import math
import timeit

import pytest
import torch

from personvit import ops
from personvit.ops import native


def targets(count: int) -> torch.Tensor:
    return torch.empty(count).uniform_(0.1, 0.5) * 128


def test_shape_type_and_limit() -> None:
    wanted = targets(300)
    masks = ops.block_masks(wanted, 16, 8, seed=1)
    assert masks.shape == (300, 16, 8)
    assert masks.dtype == torch.bool
    assert (masks.sum((1, 2)) <= wanted.floor()).all()


def test_any_split_draws_the_same_masks() -> None:
    wanted = targets(700)
    whole = ops.block_masks(wanted, 16, 8, seed=9, first=40)
    parts = [ops.block_masks(wanted[a:b], 16, 8, seed=9, first=40 + a) for a, b in ((0, 1), (1, 333), (333, 700))]
    assert torch.equal(torch.cat(parts), whole)


def test_number_of_threads_does_not_matter() -> None:
    wanted = targets(2000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.block_masks(wanted, 16, 8, seed=3)
        torch.set_num_threads(2)
        assert torch.equal(ops.block_masks(wanted, 16, 8, seed=3), one)
    finally:
        torch.set_num_threads(threads)


def test_fast_enough_for_the_data_path() -> None:
    """50,000 masks a second on one core; seen: ten times that."""
    wanted = targets(20000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        seconds = min(timeit.repeat(lambda: ops.block_masks(wanted, 16, 8, seed=3), number=1, repeat=5))
    finally:
        torch.set_num_threads(threads)
    assert len(wanted) / seconds > 50_000


def test_seed_and_number_matter_and_torch_generators_do_not() -> None:
    wanted = torch.full((50,), 40.0)
    masks = ops.block_masks(wanted, 16, 8, seed=3)
    state = torch.random.get_rng_state()
    assert torch.equal(ops.block_masks(wanted, 16, 8, seed=3), masks)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(ops.block_masks(wanted, 16, 8, seed=4), masks)
    assert len({mask.numpy().tobytes() for mask in masks}) == 50


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**64 - 1, 0])
def test_any_seed_of_64_bits(seed: int) -> None:
    masks = ops.block_masks(torch.full((4,), 40.0), 16, 8, seed=seed)
    assert masks.any()
    assert torch.equal(masks, ops.block_masks(torch.full((4,), 40.0), 16, 8, seed=seed % 2**64))


def test_targets_that_mask_nothing() -> None:
    wanted = torch.tensor([0.0, -3.0, math.nan, 0.99, -math.inf])
    assert not ops.block_masks(wanted, 16, 8, seed=0).any()
    assert ops.block_masks(torch.zeros(0), 16, 8, seed=0).shape == (0, 16, 8)


def test_targets_above_the_grid() -> None:
    masks = ops.block_masks(torch.tensor([1000.0, math.inf]), 16, 8, seed=0)
    assert (masks.sum((1, 2)) > 100).all()


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (2, 2), (64, 64), (64, 3), (14, 14)])
def test_grids(grid: tuple[int, int]) -> None:
    masks = ops.block_masks(torch.full((20,), 0.4 * grid[0] * grid[1]), *grid, seed=0)
    assert masks.shape == (20, *grid)
    assert bool(masks.any()) == (min(grid) > 1)  # a block never spans the grid


def test_non_contiguous_targets() -> None:
    wanted = targets(40)[::2]
    assert torch.equal(ops.block_masks(wanted, 16, 8, seed=2), ops.block_masks(wanted.contiguous(), 16, 8, seed=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 65}, "65x8 cells; 64x64 is the largest"),
        ({"width": 0}, "16x0 cells"),
        ({"targets": torch.ones(2, 2)}, r"targets \[M\] float32"),
        ({"targets": torch.ones(2, dtype=torch.float64)}, "float64"),
        ({"aspect": (0.0, 1.0)}, "aspect="),
        ({"aspect": (2.0, 1.0)}, "aspect="),
        ({"aspect": (math.nan, 1.0)}, "aspect="),
        ({"first": -1}, "first=-1"),
    ],
)
def test_arguments_are_checked(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"targets": torch.ones(2), "height": 16, "width": 8, "seed": 0}
    with pytest.raises(ValueError, match=message):
        ops.block_masks(**(arguments | change))  # type: ignore[arg-type]


def test_operator_checks_too() -> None:
    assert native.load_cpu() is None
    with pytest.raises(RuntimeError, match=r"from 1x1 to 64x64 cells, got 65x8"):
        torch.ops.personvit.block_masks(torch.ones(2), 65, 8, 0, 0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="aspect range must lie in"):
        torch.ops.personvit.block_masks(torch.ones(2), 16, 8, 0, 0, math.nan, 0.0)


def test_opcheck() -> None:
    assert native.load_cpu() is None
    torch.library.opcheck(torch.ops.personvit.block_masks.default, (targets(5), 16, 8, 1, 0, -1.2, 1.2))


def test_compiles_without_graph_breaks() -> None:
    compiled = torch.compile(lambda t: ops.block_masks(t, 16, 8, seed=3).sum(), fullgraph=True, backend="aot_eager")
    wanted = targets(10)
    assert compiled(wanted) == ops.block_masks(wanted, 16, 8, seed=3).sum()
