from __future__ import annotations

import pytest
import torch

from personvit.ops import backend
from personvit.ops.adamw import adamw_ema


def arguments(count: int = 2) -> dict:
    def tensors():
        return [torch.randn(3 + index) for index in range(count)]

    return {
        "parameters": tensors(),
        "gradients": tensors(),
        "exp_avgs": [torch.zeros(3 + index) for index in range(count)],
        "exp_avg_sqs": [torch.zeros(3 + index) for index in range(count)],
        "averages": tensors(),
        "coefficients": torch.full((count,), 0.5),
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decays": [0.1, 0.0][:count],
        "steps": [1.0] * count,
        "momentum": 0.9,
    }


def test_the_formula_by_hand():
    start = arguments()
    before = [p.double() for p in start["parameters"]], [a.double() for a in start["averages"]]
    adamw_ema(*start.values())
    for index, (parameter, average) in enumerate(zip(*before, strict=True)):
        g = 0.5 * start["gradients"][index].double()
        # At the first step m / (1 - beta1) is g, and v / (1 - beta2) is g^2.
        moved = parameter * (1 - 1e-2 * start["weight_decays"][index]) - 1e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(start["parameters"][index].double(), moved, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(start["exp_avgs"][index].double(), 0.1 * g, rtol=1e-6, atol=0)
        torch.testing.assert_close(start["exp_avg_sqs"][index].double(), 1e-3 * g * g, rtol=1e-6, atol=0)
        expected = 0.9 * average + 0.1 * moved
        torch.testing.assert_close(start["averages"][index].double(), expected, rtol=1e-6, atol=1e-7)


def test_parameters_that_require_gradients_are_moved():
    start = arguments()
    start["parameters"] = [torch.nn.Parameter(p) for p in start["parameters"]]
    before = start["parameters"][0].detach().clone()
    adamw_ema(*start.values())
    assert not torch.equal(start["parameters"][0], before)
    assert start["averages"][0].grad_fn is None


def test_a_cpu_takes_the_reference():
    (row,) = [row for row in backend.report("cpu") if row.op == "adamw_ema"]
    assert row.backend == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": []}, "2 parameters, but 0 gradients"),
        ({"steps": [1.0]}, "2 parameters, but 1 steps"),
        ({"averages": [None, torch.ones(9)]}, r"averages\[1\] has shape \[9\], the parameter \[4\]"),
        ({"coefficients": torch.ones(3)}, r"coefficients have shape \[3\], expected \[2\]"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        adamw_ema(*{**arguments(), **change}.values())


def test_no_parameters():
    adamw_ema(*{**arguments(0), "coefficients": None}.values())
