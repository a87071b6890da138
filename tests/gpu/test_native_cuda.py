"""CUDA operators against the CPU ones, which run the same functors: every bit must agree."""

from __future__ import annotations

import math

import pytest
import torch

from personvit import ops
from personvit.ops import native


@pytest.fixture(autouse=True)
def _extension() -> None:
    if native.load_cuda() is not None:
        pytest.fail(f"{native.load_cuda()}: PERSONVIT_CUDA=ON {native.BUILD_COMMAND}")


@pytest.mark.parametrize("grid", [(16, 8), (14, 14), (64, 64), (1, 7), (3, 64)])
@pytest.mark.parametrize("aspect", [(0.3, 1 / 0.3), (1.0, 1.0), (0.001, 1000.0)])
def test_block_masks(grid: tuple[int, int], aspect: tuple[float, float]) -> None:
    cells = grid[0] * grid[1]
    special = torch.tensor([0.0, -1.0, math.nan, math.inf, float(cells)])
    targets = torch.cat([torch.rand(20000) * cells * 0.7, special])
    for seed in (0, -1, 2**63):
        expected = ops.block_masks(targets, *grid, seed=seed, first=5, aspect=aspect)
        assert torch.equal(ops.block_masks(targets.cuda(), *grid, seed=seed, first=5, aspect=aspect).cpu(), expected)


@pytest.mark.parametrize(
    ("queries", "rows", "features", "k"),
    [(1, 1, 1, 1), (19, 33, 63, 33), (129, 1023, 127, 20), (3, 20011, 384, 100), (2000, 3000, 384, 50),
     (0, 4, 5, 2), (5, 4, 0, 4)],
)  # fmt: skip
def test_knn(queries: int, rows: int, features: int, k: int) -> None:
    query, gallery = torch.randn(queries, features), torch.randn(rows, features)
    gallery[rows // 2] = gallery[0]
    distances, indices = ops.knn(query.cuda(), gallery.cuda(), k)
    expected_distances, expected_indices = ops.knn(query, gallery, k)
    assert torch.equal(indices.cpu(), expected_indices)
    assert torch.equal(distances.cpu(), expected_distances)


def test_knn_special_values_and_ties() -> None:
    query = torch.randint(0, 2, (64, 5)).float()
    gallery = torch.randint(0, 2, (4000, 5)).float()
    gallery[7, 0], gallery[9, 1], gallery[3000, 4] = torch.nan, torch.inf, -torch.inf
    distances, indices = ops.knn(query.cuda(), gallery.cuda(), 4000)
    expected_distances, expected_indices = ops.knn(query, gallery, 4000)
    assert torch.equal(indices.cpu(), expected_indices)
    torch.testing.assert_close(distances.cpu(), expected_distances, rtol=0, atol=0, equal_nan=True)


def test_runs_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    query = torch.randn(300, 64, device="cuda")
    gallery = torch.randn(2000, 64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the operator must wait for this, and for the line below
        gallery = gallery * 2
        distances, indices = ops.knn(query, gallery, 5)
    stream.synchronize()
    expected = ops.knn(query.cpu(), gallery.cpu(), 5)
    assert torch.equal(indices.cpu(), expected[1])
    assert torch.equal(distances.cpu(), expected[0])


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.personvit.block_masks.default, (torch.rand(9, device="cuda") * 60, 16, 8, 1, 0, -1.2, 1.2)
    )
    torch.library.opcheck(
        torch.ops.personvit.knn.default, (torch.randn(3, 4, device="cuda"), torch.randn(6, 4, device="cuda"), 2)
    )


def test_report_and_fused() -> None:
    try:
        ops.set_backend("fused")
        assert {row.op: row.backend for row in ops.report("cuda")}["knn"] == "native"
    finally:
        ops.set_backend("auto")


def test_telemetry() -> None:
    from personvit.runtime.telemetry import GpuTelemetry

    telemetry = GpuTelemetry()
    sample = telemetry.sample()
    assert sample is not None, telemetry.reason
    assert sample.memory_total_mib is not None
    assert sample.memory_total_mib > 1000
