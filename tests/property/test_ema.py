"""The teacher's moving average."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personvit.optim import ema_update

momenta = st.floats(0, 1)


def _pair(seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (3,), (2, 5), (1, 4, 2)][:count]
    draw = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    return draw[0], draw[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), momenta)
def test_result_is_the_convex_combination(seed, momentum):
    averages, values = _pair(seed)
    before = [average.double() for average in averages]
    ema_update(averages, values, momentum)
    for new, old, value in zip(averages, before, values, strict=True):
        torch.testing.assert_close(new.double(), momentum * old + (1 - momentum) * value.double(), rtol=1e-5, atol=1e-6)
        low, high = torch.minimum(old, value.double()), torch.maximum(old, value.double())
        assert (new.double() >= low - 1e-6).all()
        assert (new.double() <= high + 1e-6).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), momenta)
def test_equal_networks_stay_equal_to_the_bit(seed, momentum):
    averages, _ = _pair(seed)
    values = [average.clone() for average in averages]
    ema_update(averages, values, momentum)
    assert all(torch.equal(new, value) for new, value in zip(averages, values, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_ends_of_the_range(seed):
    averages, values = _pair(seed)
    before = [average.clone() for average in averages]
    ema_update(averages, values, 1.0)
    assert all(torch.equal(new, old) for new, old in zip(averages, before, strict=True))
    ema_update(averages, values, 0.0)
    assert all(torch.equal(new, value) for new, value in zip(averages, values, strict=True))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_repeated_updates_approach_a_student_at_rest(seed, momentum):
    averages, values = _pair(seed)
    start = [(average - value).abs() for average, value in zip(averages, values, strict=True)]
    for _ in range(20):
        ema_update(averages, values, momentum)
    for new, value, gap in zip(averages, values, start, strict=True):
        torch.testing.assert_close((new - value).abs(), gap * momentum**20, rtol=1e-3, atol=1e-5)
