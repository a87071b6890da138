"""Distillation cross entropy as operators of torch: launches, fake kernels and the gradient. See `distill_kernels`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from personvit.kernels import distill_kernels as device
from personvit.kernels import inputs
from personvit.kernels.aot import Build

_NAME = "distill_cross_entropy"


class _Launch(NamedTuple):
    """How one width of logits is launched."""

    block: int
    """Columns of a program."""
    warps: int
    stages: int
    """Tiles in flight or at work: rows of a loop are prefetched to shared memory."""
    teacher_rows: int
    """Rows that one program of the teacher kernel sums up; partial column sums cost 4 / (rows * bytes) of the read."""


_WIDE, _MEDIUM, _NARROW = 16384, 4096, 128
LAUNCHES = {"wide": _Launch(4096, 8, 3, 16), "medium": _Launch(4096, 8, 3, 32)}
"""At the widths of the recipes, above _WIDE and from _MEDIUM on: 16 columns per thread."""
_LOOP_STAGES = 3
"""Triton's default, which the launches leave: loops over rows say themselves how many are on the way."""


def _launch(width: int) -> _Launch:
    """Configuration for a number of prototypes."""
    if width > _WIDE:
        return LAUNCHES["wide"]
    if width >= _MEDIUM:
        return LAUNCHES["medium"]
    return _Launch(max(_NARROW, triton.next_power_of_2(width)), 4, 3, 32)


def _scale(temperature: float) -> float:
    """Factor from a logit to the exponent of 2."""
    return math.log2(math.e) / temperature


def _pieces(width: int, config: _Launch) -> dict[str, Any]:
    """Constants of the kernels that combine the pieces of a row."""
    blocks = triton.cdiv(width, config.block)
    return {"BLOCKS": blocks, "PADDED": triton.next_power_of_2(blocks), "num_warps": 1}


def _read(width: int, config: _Launch) -> dict[str, Any]:
    """Constants of the kernel that reads the teacher."""
    blocks = triton.cdiv(width, config.block)
    sizes = {"K": width, "BLOCK": config.block, "BLOCKS": blocks, "ROWS": config.teacher_rows}
    return sizes | {"STAGES": config.stages, "num_warps": config.warps}


def _walk(width: int, config: _Launch, crops: int, exclude_own: bool) -> dict[str, Any]:
    """Constants of the kernels that walk through the views."""
    sizes = {"K": width, "BLOCK": config.block, "BLOCKS": triton.cdiv(width, config.block), "Q": crops}
    return sizes | {"EXCLUDE_OWN": exclude_own, "STAGES": config.stages, "num_warps": config.warps}


def _teacher_statistics(teacher: Tensor, offset: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
    """Column sums [K] of the raw logits, and softmax statistics [rows, 2] of (teacher - offset) / temperature."""
    rows, width = teacher.shape
    config = _launch(width)
    read = _read(width, config)
    blocks, groups = read["BLOCKS"], triton.cdiv(rows, config.teacher_rows)
    peaks, sums, stats = offset.new_empty(rows, blocks), offset.new_empty(rows, blocks), offset.new_empty(rows, 2)
    column_sums = offset.new_empty(groups, width)
    device.teacher_pieces[(groups * blocks,)](
        teacher, offset, peaks, sums, column_sums, rows, _scale(teacher_temp), **read
    )
    device.teacher_rows[(rows,)](peaks, sums, stats, **_pieces(width, config))
    return column_sums.sum(dim=0), stats


@torch.library.custom_op("personvit::distill_cross_entropy", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor,
    offset: Tensor,
    student_temp: float,
    teacher_temp: float,
    images: int,
    exclude_own: bool,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, column_sum [K], softmax statistics [Q * B, 2] of the teacher, [V * B, 2] of the student), all float32."""
    arguments = (student, teacher, offset, student_temp, teacher_temp, images, exclude_own, weights)
    inputs.require(_NAME, refuses(*arguments), student=student, teacher=teacher, offset=offset)
    rows, width = student.shape
    if images == 0:
        nothing = offset.new_empty(0, 2)
        return offset.new_zeros(()), torch.zeros_like(offset), nothing, nothing.clone()
    config = _launch(width)
    with torch.cuda.device_of(student):
        column_sum, teacher_stats = _teacher_statistics(teacher, offset, teacher_temp)
        walk = _walk(width, config, len(teacher) // images, exclude_own)
        pieces = offset.new_empty(4, rows, walk["BLOCKS"])
        losses, student_stats = offset.new_empty(rows), offset.new_empty(rows, 2)
        numbers = (images, rows // images, _scale(student_temp), _scale(teacher_temp))
        device.student_pieces[(images * walk["BLOCKS"],)](
            student, teacher, offset, teacher_stats, pieces, *numbers, **walk
        )
        device.student_rows[(rows,)](pieces, weights, student_stats, losses, rows, **_pieces(width, config))
    return losses.sum(), column_sum, teacher_stats, student_stats


@_forward.register_fake
def _(student, teacher, offset, student_temp, teacher_temp, images, exclude_own, weights):  # type: ignore[no-untyped-def]
    return (
        offset.new_empty(()),
        torch.empty_like(offset),
        offset.new_empty(teacher.shape[0], 2),
        offset.new_empty(student.shape[0], 2),
    )


@torch.library.custom_op("personvit::distill_cross_entropy_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    offset: Tensor,
    teacher_stats: Tensor,
    student_stats: Tensor,
    student_temp: float,
    teacher_temp: float,
    images: int,
    exclude_own: bool,
    weights: Tensor | None,
) -> Tensor:
    """Gradient of the student, [V * B, K] in its dtype; the statistics are those of the forward pass."""
    rows, width = student.shape
    gradient = torch.empty_like(student)
    if rows == 0:
        return gradient
    config = _launch(width)
    with torch.cuda.device_of(student):
        walk = _walk(width, config, len(teacher) // images, exclude_own)
        numbers = (images, rows // images, _scale(student_temp), _scale(teacher_temp))
        tensors = (grad_loss, student, teacher, offset, weights, teacher_stats, student_stats, gradient)
        device.student_gradient[(images * walk["BLOCKS"],)](*tensors, *numbers, **walk)
    return gradient


@_backward.register_fake
def _(grad_loss, student, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(student)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, offset, *ctx.settings, weights = inputs
    _, column_sum, teacher_stats, student_stats = output
    ctx.mark_non_differentiable(column_sum, teacher_stats, student_stats)
    ctx.save_for_backward(student, teacher, offset, teacher_stats, student_stats, weights)


def _gradients(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *saved, weights = ctx.saved_tensors
    gradient = _backward(grad_loss, *saved, *ctx.settings, weights)
    return gradient, None, None, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def distill_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    offset: Tensor,
    student_temp: float,
    teacher_temp: float,
    images: int,
    exclude_own: bool,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `personvit.ops.distill_cross_entropy` describes, computed by the kernels of this module.

    Raises:
        UnsupportedInputError: what `refuses` found.
    """
    arguments = (student, teacher, offset, student_temp, teacher_temp, images, exclude_own, weights)
    loss, column_sum, _, _ = _forward(*arguments)
    return loss, column_sum


def refuses(
    student: Tensor,
    teacher: Tensor,
    offset: Tensor,
    student_temp: float,
    teacher_temp: float,
    images: int,
    exclude_own: bool,
    weights: Tensor | None,
) -> inputs.Obstacle | None:
    """Why the kernels cannot compute these arguments, with the remedy; None if they can."""
    single = {"offset": offset} if weights is None else {"offset": offset, "weights": weights}
    tensors = {"student": student, "teacher": teacher, **single}
    for name, tensor in tensors.items():
        obstacle = inputs.layout(name, tensor, (torch.float32,) if name in single else inputs.FLOATS)
        if obstacle is not None:
            return obstacle
    if len({tensor.device for tensor in tensors.values()}) > 1:
        seen = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        return f"tensors lie on different devices: {seen}", "move all to one with .to()"
    # The kernels trust the shapes: what does not fit would be read out of bounds.
    fits = student.dim() == teacher.dim() == 2 and student.shape[1:] == teacher.shape[1:] == offset.shape
    fits = fits and offset.numel() > 0 and (weights is None or weights.shape == student.shape[:1])
    if images == 0:
        fits = fits and len(student) == len(teacher) == 0
    else:
        fits = fits and images > 0 and all(len(t) > 0 and len(t) % images == 0 for t in (student, teacher))
        fits = fits and not (exclude_own and len(student) < len(teacher))
    if not fits:
        return f"the shapes do not fit each other and images={images}", "student [V*B, K], teacher [Q*B, K], offset [K]"
    return None


def builds() -> list[Build]:
    """Every shipped configuration: CLS and patch heads of the recipes, and widths whose last block is ragged.

    Registers, as measured for sm_80, sm_90 and sm_100: at the recipes' widths at most 80 in bfloat16 (three programs of
    256 threads on a multiprocessor) and 90 in float32; 113 where masks are needed; 21 in the kernels that combine
    pieces. Shared memory holds the tiles in flight, and 40 bytes of reductions.
    """
    found = []
    for width, crops, dtype in (
        (65536, 2, "bf16"),
        (65536, 2, "fp32"),
        (8192, 1, "bf16"),
        (8192, 1, "fp32"),
        (5000, 2, "fp32"),
        (1000, 2, "bf16"),
    ):
        found += _builds(width, crops, dtype)
    return found


def _builds(width: int, crops: int, dtype: str) -> list[Build]:
    """The kernels for a width: with two teacher crops as the CLS loss, with one and weights as the patch loss."""
    config = _launch(width)
    walk, rows = _walk(width, config, crops, crops > 1), _pieces(width, config)
    weights = {} if crops == 1 else {"weights": None}
    types = dict.fromkeys(("student", "teacher", "gradient"), f"*{dtype}")
    types |= dict.fromkeys(("scale", "student_scale", "teacher_scale"), "fp32")
    types |= dict.fromkeys(("rows", "images", "views"), "i32")
    registers = 120 if width % config.block else {"bf16": 80, "fp32": 96}[dtype]
    tiles = (config.stages - 1) * config.block * {"bf16": 2, "fp32": 4}[dtype] + 64
    found = []
    for name, constants in (
        ("teacher_pieces", _read(width, config)),
        ("teacher_rows", rows),
        ("student_pieces", walk),
        ("student_rows", rows | weights),
        ("student_gradient", walk | weights),
    ):
        kernel, warps = getattr(device, name), constants["num_warps"]
        constants = {key: value for key, value in constants.items() if key != "num_warps"}
        signature = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in constants}
        budget = (32, 0) if name.endswith("rows") else (registers, tiles)
        label = f"distill {name} {dtype} K={width} Q={crops}"
        found.append(Build(label, kernel, signature, constants, warps, _LOOP_STAGES, *budget))
    return found
