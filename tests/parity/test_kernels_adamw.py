"""The AdamW + EMA kernel in Triton's interpreter: against a float64 oracle at most twice as far off as torch."""

from __future__ import annotations

import pytest
import torch

from personvit.errors import UnsupportedInputError
from personvit.kernels import adamw
from personvit.ops.adamw import reference

SIZES = [(1,), (19,), (33, 31), (0,), (1023,), (4097,), (3, 4096), (2048,)]
NAMES = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "averages")


def problem(sizes=SIZES, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    lists = {name: [torch.randn(size, generator=generator) for size in sizes] for name in NAMES}
    lists["exp_avg_sqs"] = [square.abs() for square in lists["exp_avg_sqs"]]
    count = len(sizes)
    return {
        **lists,
        "averages": [None if index % 3 == 1 else average for index, average in enumerate(lists["averages"])],
        "coefficients": torch.rand(count, generator=generator),
        "lr": 2e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decays": [0.04 if index % 2 else 0.0 for index in range(count)],
        "steps": [1.0 + 7 * (index % 2) for index in range(count)],
        "momentum": 0.996,
    }


def copied(arguments: dict, dtype: torch.dtype = torch.float32) -> dict:
    def copy(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype, copy=True)
        return [copy(entry) for entry in value] if isinstance(value, list) else value

    return {name: copy(value) for name, value in arguments.items()}


def advance(function, arguments: dict, steps: int = 3) -> dict:
    """Some steps with a new gradient each."""
    for step in range(steps):
        function(*arguments.values())
        arguments["steps"] = [count + 1 for count in arguments["steps"]]
        generator = torch.Generator().manual_seed(step)
        for gradient in arguments["gradients"]:
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
    return arguments


def assert_close_to_the_oracle(start: dict) -> None:
    exact = advance(reference, copied(start, torch.float64))
    plain = advance(reference, copied(start))
    ours = advance(adamw.adamw_ema, copied(start))
    rounding = torch.finfo(torch.float32).eps
    for name in ("parameters", "exp_avgs", "exp_avg_sqs", "averages"):
        assert [value is None for value in ours[name]] == [value is None for value in exact[name]]
        truth, theirs, mine = (flat(result[name]) for result in (exact, plain, ours))
        error = (mine - truth).abs()
        # Where torch happens to be exact, one rounding of the result is still allowed.
        assert error.norm() <= 2 * (theirs - truth).norm() + rounding * truth.norm() / 4, name
        # No element is alone off, as one past the edge of a block would be. Terms of size 1 may cancel.
        assert (error <= 8 * rounding * truth.abs().clamp(min=0.25)).all(), name


def flat(tensors: list) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *(tensor.flatten() for tensor in tensors if tensor is not None)]).double()


def test_three_steps() -> None:
    assert_close_to_the_oracle(problem())


@pytest.mark.parametrize(
    "change",
    [
        {"coefficients": None},
        {"momentum": 0.2},
        {"momentum": 1.0},
        {"averages": [None] * len(SIZES)},
        {"beta1": 0.0, "lr": 0.0},
    ],
    ids=lambda change: ",".join(change),
)
def test_other_settings(change: dict) -> None:
    assert_close_to_the_oracle({**problem(), **change})


def test_a_state_of_zeros_and_a_gradient_of_zeros() -> None:
    start = problem([(5,), (4096,)])
    for name in ("gradients", "exp_avgs", "exp_avg_sqs"):
        start[name] = [torch.zeros_like(tensor) for tensor in start[name]]
    assert_close_to_the_oracle(start)


def test_gradients_stay_and_nothing_beside_a_tensor_is_touched() -> None:
    start = problem()
    # Every tensor lies inside a longer one: what is beside it belongs to others.
    guards = {}
    for name in NAMES:
        for index, tensor in enumerate(start[name]):
            if tensor is not None:
                whole = torch.full((tensor.numel() + 2048,), 7.0)
                inner = whole[1024 : 1024 + tensor.numel()].view(tensor.shape)
                start[name][index] = inner.copy_(tensor)
                guards[name, index] = whole
    gradients = [gradient.clone() for gradient in start["gradients"]]
    adamw.adamw_ema(*start.values())
    assert all(torch.equal(a, b) for a, b in zip(start["gradients"], gradients, strict=True))
    for whole in guards.values():
        assert (whole[:1024] == 7).all()
        assert (whole[-1024:] == 7).all()


def test_the_order_of_the_tensors_and_other_tensors_do_not_matter() -> None:
    start = problem()
    whole, reverse = copied(start), copied(start)
    for name, value in reverse.items():
        if isinstance(value, list):
            reverse[name] = value[::-1]
    reverse["coefficients"] = reverse["coefficients"].flip(0)
    adamw.adamw_ema(*whole.values())
    adamw.adamw_ema(*reverse.values())
    for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
        assert all(torch.equal(a, b) for a, b in zip(whole[name], reverse[name][::-1], strict=True))


@pytest.mark.parametrize("sizes", [[], [(0,), (0, 3)]], ids=str)
def test_nothing_to_do(sizes: list) -> None:
    start = problem(sizes)
    adamw.adamw_ema(*start.values())
    assert [parameter.shape for parameter in start["parameters"]] == [torch.Size(size) for size in sizes]


@pytest.mark.parametrize("clipped", [True, False])
def test_opcheck(clipped: bool) -> None:
    start = problem([(3,), (0,), (5, 2)])
    averages, coefficients = [start["averages"][0], start["averages"][2]], start["coefficients"]
    lists = [start[name] for name in NAMES[:4]]
    numbers = list(start.values())[6:]
    arguments = (*lists, averages, [0, 2], coefficients if clipped else None, *numbers)
    torch.library.opcheck(torch.ops.personvit.adamw_ema.default, arguments)


def _bad(name: str, index: int, tensor: torch.Tensor) -> dict:
    start = problem([(4,), (8, 2)])
    start[name][index] = tensor
    return start


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (_bad("parameters", 0, torch.ones(4, dtype=torch.float16)), "parameters.0. is torch.float16"),
        (_bad("gradients", 1, torch.ones(2, 8).t()), "gradients.1. of shape .* has strides"),
        (_bad("averages", 0, torch.ones(5)[1:]), "averages.0. does not start at a multiple of 16 bytes"),
        (_bad("exp_avgs", 1, torch.ones(8)), "shapes of exp_avgs differ"),
        (_bad("exp_avg_sqs", 1, torch.ones(8, 2, device="meta")), "exp_avg_sqs.1. is on meta, parameters.0. on cpu"),
        ({**problem([(4,)]), "steps": []}, "1 parameters, but 0 steps"),
        ({**problem([(4,)]), "gradients": []}, "1 parameters, but 0 gradients"),
        ({**problem([(4,)]), "coefficients": torch.ones(2)}, "coefficients have shape .2."),
        ({**problem([(4,)]), "coefficients": torch.ones(1, dtype=torch.float64)}, "coefficients is torch.float64"),
        ({**problem([(4,)]), "coefficients": torch.ones(1, device="meta")}, "coefficients are on meta"),
    ],
)
def test_bad_input_is_refused(start: dict, message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        adamw.adamw_ema(*start.values())
