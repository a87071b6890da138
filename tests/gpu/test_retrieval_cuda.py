"""Re-ranking and ranking on CUDA against the CPU, which runs the same functors: every bit must agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from personvit import ops
from personvit.ops import native


@pytest.fixture(autouse=True)
def _extension() -> None:
    if native.load_cuda() is not None:
        pytest.fail(f"{native.load_cuda()}: PERSONVIT_CUDA=ON {native.BUILD_COMMAND}")


def clusters(queries: int, gallery: int, features: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, max(1, gallery // 12), (queries + gallery,))
    centres = torch.randn(int(labels.max()) + 1, features)
    points = torch.nn.functional.normalize(centres[labels] + 0.7 * torch.randn(len(labels), features), dim=1)
    points[-1] = points[0]
    return points[:queries], points[queries:]


SHAPES = [(1, 1, 1), (3, 9, 5), (64, 64, 32), (65, 1000, 33), (500, 3000, 384), (1, 20011, 48)]


def assert_same(cuda: tuple[Tensor, ...], cpu: tuple[Tensor, ...]) -> None:
    for a, b in zip(cuda, cpu, strict=True):
        assert a.is_cuda
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize(("queries", "gallery", "features"), SHAPES)
def test_distances(queries: int, gallery: int, features: int) -> None:
    left, right = clusters(queries, gallery, features)
    expected = ops.pairwise_distance(left, right)
    assert_same((ops.pairwise_distance(left.cuda(), right.cuda()),), (expected,))
    k = min(30, gallery)
    assert_same(ops.nearest(left.cuda(), right.cuda(), k), ops.nearest(left, right, k))
    points = torch.cat([left, right])
    on_device = points.cuda()
    assert_same(ops.nearest(on_device, on_device, k), ops.nearest(points, points, k))


@pytest.mark.parametrize(("queries", "gallery", "features"), SHAPES)
@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (50, 15), (3, 1)])
def test_every_stage(queries: int, gallery: int, features: int, k1: int, k2: int) -> None:
    left, right = clusters(queries, gallery, features)
    points = torch.cat([left, right])
    _, neighbours, row_max = ops.nearest(points, points, min(max(k1 + 1, k2), len(points)))
    lists = neighbours[:, : k1 + 1].contiguous()
    sets = ops.k_reciprocal(lists, k1)
    assert_same(ops.k_reciprocal(lists.cuda(), k1), sets)
    values = ops.reciprocal_weights(points, row_max, *sets)
    on_device = tuple(tensor.cuda() for tensor in sets)
    assert_same((ops.reciprocal_weights(points.cuda(), row_max.cuda(), *on_device),), (values,))
    expanded = ops.query_expansion(*sets, values, neighbours, k2)
    assert_same(ops.query_expansion(*on_device, values.cuda(), neighbours.cuda(), k2), expanded)
    jaccard = ops.jaccard(*expanded, queries)
    assert_same((ops.jaccard(*(tensor.cuda() for tensor in expanded), queries),), (jaccard,))
    encoding = ops.encode(left, right, k1, k2)
    assert_same(ops.encode(left.cuda(), right.cuda(), k1, k2), encoding)


@pytest.mark.parametrize(("queries", "gallery", "features"), SHAPES)
@pytest.mark.parametrize("top", [None, 1, 100])
def test_rerank(queries: int, gallery: int, features: int, top: int | None) -> None:
    left, right = clusters(queries, gallery, features)
    expected = ops.rerank(left, right, top=top)
    result = ops.rerank(left.cuda(), right.cuda(), top=top)
    if isinstance(expected, Tensor):
        expected, result = (expected,), (result,)
    assert_same(result, expected)


@pytest.mark.parametrize(("queries", "gallery"), [(1, 1), (7, 300), (200, 20011)])
@pytest.mark.parametrize("levels", [5, 1 << 22])
def test_rank_counts(queries: int, gallery: int, levels: int) -> None:
    arguments = [torch.randint(0, levels, (queries, gallery)).float()]
    arguments += [torch.randint(0, 9, (size,)) for size in (queries, gallery)]
    arguments += [torch.randint(0, 4, (size,)) for size in (queries, gallery)]
    assert_same(ops.rank_counts(*(tensor.cuda() for tensor in arguments)), ops.rank_counts(*arguments))


def test_more_pairs_than_31_bits_count() -> None:
    points = torch.randn(47_000, 3)
    on_device = points.cuda()
    assert_same(ops.nearest(on_device, on_device, 3), ops.nearest(points, points, 3))
    distances = ops.pairwise_distance(on_device, on_device)  # 8.2 GiB
    assert torch.equal(distances[-1].cpu(), ops.pairwise_distance(points[-1:], points)[0])
    labels, cameras = torch.arange(47_000) // 4, torch.arange(47_000) % 4
    scores = ops.rank_counts(distances, labels.cuda(), labels.cuda(), cameras.cuda(), cameras.cuda())
    part = slice(46_900, 47_000)
    expected = ops.rank_counts(distances[part].cpu(), labels[part], labels, cameras[part], cameras)
    assert_same(tuple(score[part] for score in scores), expected)


def test_runs_on_the_current_stream() -> None:
    left, right = (points.cuda() for points in clusters(50, 700, 64))
    expected = ops.rerank(left * 2, right * 2)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the operators must wait for this, and for the line below
        left, right = left * 2, right * 2
        result = ops.rerank(left, right)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_opcheck() -> None:
    left, right = (points.cuda() for points in clusters(5, 30, 8))
    points = torch.cat([left, right])
    _, neighbours, row_max = ops.nearest(points, points, 6)
    indptr, indices = ops.k_reciprocal(neighbours, 5)
    operators = torch.ops.personvit
    torch.library.opcheck(operators.pairwise_distance.default, (left, right))
    torch.library.opcheck(operators.k_reciprocal.default, (neighbours, 5))
    torch.library.opcheck(operators.reciprocal_weights.default, (points, row_max, indptr, indices))
