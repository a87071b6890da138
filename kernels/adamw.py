"""AdamW, clipping and the teacher's moving average in one pass over memory, one launch for all tensors.

Bytes per parameter, float32: clipping reads and writes the gradient (8), AdamW reads parameter, gradient and two
moments and writes all but the gradient (28), the average reads itself and the parameter and writes itself (12): 48 in
three passes. Here everything is read once (20) and written once (16): 36. The norms that clipping needs cost 4 more
either way.

Addresses and numbers of the tensors travel as one table, written anew at each call (gradients may lie elsewhere each
time) and copied in one transfer; which chunk of which tensor a program works on is kept on the device by the sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from personvit.kernels.aot import Build
from personvit.kernels.inputs import ALIGNMENT, Obstacle, layout, require

CHUNK = 4096
"""Elements of a program: enough to hide the two dependent reads that find the tensor, and small for many programs."""
BLOCK = 1024
"""Elements at a time: two reads of 16 bytes a thread from each of five arrays, about 60 registers."""
NUM_WARPS = 4

_COLUMNS = 8  # of the table, int64: five addresses, elements, and four float32 in two
_ELEMENTS = 5
_NUMBERS = 2 * 6  # first float32 column
_DECAY, _STEP_SIZE, _DENOMINATOR = range(3)


@triton.jit
def _lerp(a, b, weight):
    """As torch.lerp: the form that is exact at the end that `weight` is nearer to."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1.0 - weight))


@triton.jit
def _update(
    parameters,
    gradients,
    means,
    squares,
    averages,
    offsets,
    elements,
    coefficient,
    decay,
    step_size,
    denominator,
    mean_weight,
    beta2,
    square_weight,
    eps,
    average_weight,
    MASKED: tl.constexpr,
):
    """One block of one tensor. Without a mask the accesses are 16 bytes wide, which a mask would prevent."""
    mask = offsets < elements if MASKED else None
    gradient = coefficient * tl.load(gradients + offsets, mask=mask)
    mean = _lerp(tl.load(means + offsets, mask=mask), gradient, mean_weight)
    square = beta2 * tl.load(squares + offsets, mask=mask) + square_weight * gradient * gradient
    root = tl.div_rn(tl.sqrt_rn(square), tl.zeros_like(square) + denominator) + eps
    parameter = decay * tl.load(parameters + offsets, mask=mask) - step_size * tl.div_rn(mean, root)
    tl.store(means + offsets, mean, mask=mask)
    tl.store(squares + offsets, square, mask=mask)
    tl.store(parameters + offsets, parameter, mask=mask)
    if averages.to(tl.int64) != 0:
        average = tl.load(averages + offsets, mask=mask)
        tl.store(averages + offsets, _lerp(average, parameter, average_weight), mask=mask)


@triton.jit
def _address(table, column: tl.constexpr):
    return tl.multiple_of(tl.load(table + column).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _adamw_ema_kernel(
    table,
    chunks,
    coefficients,
    mean_weight,
    beta2,
    square_weight,
    eps,
    average_weight,
    COLUMNS: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """table: [tensors, COLUMNS] int64; chunks: [programs, 2] int32 (tensor, chunk of it); coefficients: [tensors]."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    row = table + tensor * COLUMNS
    parameters, gradients = _address(row, 0), _address(row, 1)
    means, squares, averages = _address(row, 2), _address(row, 3), _address(row, 4)
    elements = tl.load(row + 5)
    numbers = row.to(tl.pointer_type(tl.float32)) + NUMBERS
    decay, step_size, denominator = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    coefficient = 1.0
    if coefficients is not None:
        coefficient = tl.load(coefficients + tensor)
    for inner in range(0, CHUNK, BLOCK):
        first = start + inner
        offsets = first + tl.arange(0, BLOCK)
        if first + BLOCK <= elements:
            _update(
                parameters, gradients, means, squares, averages, offsets, elements, coefficient, decay, step_size,
                denominator, mean_weight, beta2, square_weight, eps, average_weight, MASKED=False,
            )  # fmt: skip
        elif first < elements:
            _update(
                parameters, gradients, means, squares, averages, offsets, elements, coefficient, decay, step_size,
                denominator, mean_weight, beta2, square_weight, eps, average_weight, MASKED=True,
            )  # fmt: skip


def refuses(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor | None],
    coefficients: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: Sequence[float],
    steps: Sequence[float],
    momentum: float,
) -> Obstacle | None:
    """Why the kernel cannot compute this, with the remedy; None if it can. Arguments as of `adamw_ema`."""
    count = len(parameters)
    lists = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "averages": averages}
    for name, values in {**lists, "weight_decays": weight_decays, "steps": steps}.items():
        if len(values) != count:
            return f"{count} parameters, but {len(values)} {name}", "lists of the same length"
    if count == 0:
        return None
    # A few hundred tensors come at every step: what holds for all is asked of all at once.
    shapes = [parameter.shape for parameter in parameters]
    lists = {"parameters": parameters, **lists}
    device = parameters[0].device
    for name, values in lists.items():
        present = [value for value in values if value is not None]
        expected = [shape for shape, value in zip(shapes, values, strict=True) if value is not None]
        if [value.shape for value in present] != expected:
            return f"the shapes of {name} differ from those of the parameters", "tensors of the same shape"
        if not all(
            value.dtype is torch.float32
            and value.is_contiguous()
            and value.device == device
            and not value.storage_offset() * 4 % ALIGNMENT
            for value in present
        ):
            return _first_obstacle(name, present, device)
    if coefficients is not None:
        if coefficients.shape != (count,):
            return f"coefficients have shape {list(coefficients.shape)}", f"shape [{count}], one for each parameter"
        if coefficients.device != device:
            return f"coefficients are on {coefficients.device}, the parameters on {device}", "all on one device"
        if (obstacle := layout("coefficients", coefficients, (torch.float32,))) is not None:
            return obstacle
    return layout("parameters[0]", parameters[0], (torch.float32,))


def _first_obstacle(name: str, tensors: Sequence[Tensor], device: torch.device) -> Obstacle | None:
    for index, tensor in enumerate(tensors):
        if tensor.device != device:
            return f"{name}[{index}] is on {tensor.device}, parameters[0] on {device}", "all on one device"
        if (obstacle := layout(f"{name}[{index}]", tensor, (torch.float32,))) is not None:
            return obstacle
    return None


def adamw_ema(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor | None],
    coefficients: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: Sequence[float],
    steps: Sequence[float],
    momentum: float,
) -> None:
    """The kernel behind `personvit.ops.adamw.adamw_ema`, which says what the arguments are.

    Raises:
        UnsupportedInputError: what `refuses` says.
    """
    arguments = (lr, beta1, beta2, eps, weight_decays, steps, momentum)
    require(
        "adamw_ema",
        refuses(parameters, gradients, exp_avgs, exp_avg_sqs, averages, coefficients, *arguments),
        **{"parameters[0]": parameters[0]} if len(parameters) else {},
    )
    # A schema has no mutable list of optional tensors: those that are there, and the place of each.
    present = [average for average in averages if average is not None]
    places = [index for index, average in enumerate(averages) if average is not None]
    torch.ops.personvit.adamw_ema(
        parameters, gradients, exp_avgs, exp_avg_sqs, present, places, coefficients, *arguments
    )


@torch.library.custom_op("personvit::adamw_ema", mutates_args=("parameters", "exp_avgs", "exp_avg_sqs", "averages"))
def _adamw_ema(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    places: Sequence[int],
    coefficients: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: Sequence[float],
    steps: Sequence[float],
    momentum: float,
) -> None:
    if not len(parameters):
        return
    device = parameters[0].device
    chunks = _chunks(tuple(parameter.numel() for parameter in parameters), CHUNK, device)
    if not len(chunks):
        return
    table = np.zeros((len(parameters), _COLUMNS), dtype=np.int64)
    for column, tensors in enumerate((parameters, gradients, exp_avgs, exp_avg_sqs)):
        table[:, column] = [tensor.data_ptr() for tensor in tensors]
    table[places, 4] = [average.data_ptr() for average in averages]
    table[:, _ELEMENTS] = [parameter.numel() for parameter in parameters]
    numbers = table.view(np.float32)[:, _NUMBERS:]
    numbers[:, _DECAY] = 1.0 - lr * np.asarray(weight_decays, dtype=np.float64)
    numbers[:, _STEP_SIZE] = lr / (1.0 - beta1 ** np.asarray(steps, dtype=np.float64))
    numbers[:, _DENOMINATOR] = np.sqrt(1.0 - beta2 ** np.asarray(steps, dtype=np.float64))
    with torch.cuda.device_of(parameters[0]):
        _adamw_ema_kernel[(len(chunks),)](
            _send(table, device),
            chunks,
            coefficients,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            eps,
            1.0 - momentum,
            COLUMNS=_COLUMNS,
            NUMBERS=_NUMBERS,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


@_adamw_ema.register_fake
def _(*_: object) -> None:
    return None


@functools.lru_cache(maxsize=8)  # the prototypes join after the first epoch: two sets of sizes in a run
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """[programs, 2] int32: tensor, and which chunk of it."""
    counts = [math.ceil(size / chunk) for size in sizes]
    tensors = np.repeat(np.arange(len(sizes)), counts)
    numbers = np.concatenate([np.arange(count) for count in counts])
    return _send(np.stack([tensors, numbers], axis=1).astype(np.int32), device)


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device, without waiting: pinned memory is not reused before the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def builds() -> list[Build]:
    """Every shipped configuration."""
    numbers = ("mean_weight", "beta2", "square_weight", "eps", "average_weight")
    signature = {"table": "*i64", "chunks": "*i32", **dict.fromkeys(numbers, "fp32")}
    constants = {"COLUMNS": _COLUMNS, "NUMBERS": _NUMBERS, "CHUNK": CHUNK, "BLOCK": BLOCK}
    budget = {"num_warps": NUM_WARPS, "num_stages": 3, "registers": 64, "shared": 0}
    return [
        Build("adamw fp32 clipped", _adamw_ema_kernel, {**signature, "coefficients": "*fp32"}, constants, **budget),
        Build("adamw fp32", _adamw_ema_kernel, signature, {**constants, "coefficients": None}, **budget),
    ]
