"""Self-distillation: cross entropy between the distributions of a teacher and a student over prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from personvit.ops import backend, triton_kernels


def distill_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    offset: Tensor,
    student_temp: float,
    teacher_temp: float,
    images: int,
    exclude_own: bool,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of student views with the teacher crops of their image, and the teacher's column sums.

    DINO (arXiv 2104.14294, eq. 1 to 3) and iBOT (arXiv 2111.07832, eq. 2), without their means. For the rows of one
    image, with P_q = softmax((teacher_q - offset) / teacher_temp) and log p_v = log softmax(student_v / student_temp):

        loss = sum over v of weights[v] * sum over allowed q of -sum_k P_q[k] log p_v[k]

    Args:
        student: [V * B, K] logits of V views, view-major: row r is view r // B of image r % B. Any floating dtype.
        teacher: [Q * B, K] raw logits of the first Q views, same order; any floating dtype. No gradient flows to it.
        offset: [K] float32, taken from the teacher's logits (the centre).
        student_temp: student temperature.
        teacher_temp: teacher temperature.
        images: B; may be 0.
        exclude_own: leave out q = v, the teacher's crop that is the student's view.
        weights: [V * B] float32, or None for 1 everywhere.

    Returns:
        loss: scalar float32 (float64 if the student is), differentiable in the student; 0 without images.
        column_sum: [K] float32 (or float64), sum of the teacher's raw logits over its rows.

    Raises:
        ValueError: shapes that do not fit each other, or a temperature that is not positive.
        UnsupportedInputError: a kernel was asked for by name and cannot compute these tensors.
    """
    _check(student, teacher, offset, images, exclude_own, weights)
    if student_temp <= 0 or teacher_temp <= 0:
        raise ValueError(f"distill_cross_entropy: temperatures {student_temp} and {teacher_temp} must be positive")
    arguments = (student, teacher, offset, student_temp, teacher_temp, images, exclude_own, weights)
    loss, column_sum = backend.call("distill_cross_entropy", student.device.type, *arguments)
    return loss, column_sum


def _check(
    student: Tensor, teacher: Tensor, offset: Tensor, images: int, exclude_own: bool, weights: Tensor | None
) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits.dim() != 2 or logits.shape[1] != offset.numel() or offset.dim() != 1 or offset.numel() == 0:
            raise ValueError(
                f"distill_cross_entropy needs {name} [rows, K] and offset [K] with K > 0, "
                f"got {list(logits.shape)} and {list(offset.shape)}"
            )
        rows = logits.shape[0]
        if images < 0 or (rows != 0 if images == 0 else rows == 0 or rows % images != 0):
            raise ValueError(f"distill_cross_entropy: {rows} rows of {name} are no views of images={images}")
    if exclude_own and len(student) < len(teacher):
        raise ValueError(
            f"distill_cross_entropy: exclude_own needs a student view of every teacher crop, "
            f"got {len(student)} rows of student and {len(teacher)} of teacher"
        )
    if weights is not None and weights.shape != student.shape[:1]:
        raise ValueError(
            f"distill_cross_entropy needs a weight per row of the student, [{len(student)}], got {list(weights.shape)}"
        )


def _reference(
    student: Tensor,
    teacher: Tensor,
    offset: Tensor,
    student_temp: float,
    teacher_temp: float,
    images: int,
    exclude_own: bool,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.no_grad():
        raw = teacher.to(wide)
        column_sum = raw.sum(dim=0)
    if images == 0:
        return student.to(wide).sum(), column_sum
    with torch.no_grad():
        crops = ((raw - offset) / teacher_temp).softmax(dim=-1).view(-1, images, len(offset)).unbind()  # Q of [B, K]
        all_crops = sum(crops[1:], crops[0])
    losses = []
    for view, logits in enumerate(student.view(-1, images, len(offset)).unbind()):
        target = all_crops
        if exclude_own and view < len(crops):
            target = sum((crop for q, crop in enumerate(crops) if q != view), torch.zeros_like(all_crops))
        log_student = (logits.to(wide) / student_temp).log_softmax(dim=-1)
        losses.append(-(target * log_student).sum(dim=-1))  # [B]
    per_row = torch.cat(losses)
    return (per_row if weights is None else per_row * weights).sum(), column_sum


backend.register(
    backend.Operator(
        "distill_cross_entropy",
        backend.Implementation("reference", _reference, ("cpu", "cuda"), "plain torch, a view at a time"),
        (
            backend.Implementation(
                "triton",
                lambda *args: triton_kernels.distill.distill_cross_entropy(*args),
                ("cuda",),
                "Triton, each logit read once per pass, no probability in memory",
                triton_kernels.why_not,
                lambda *args: triton_kernels.distill.refuses(*args),
            ),
        ),
    )
)
