"""Cross entropy between a teacher's and a student's distributions over prototypes, gradient included.

With P_q the teacher probabilities of crop q, and T_v the sum of P_q over the crops q that view v is compared with, the
loss of a student row is linear in T: -sum_k T_k log p_k. So a student row is read once whatever the number of teacher
crops, and no probability is ever written to memory:

1. `teacher_pieces` reads the teacher once: peak and sum of exponentials of each piece of a row, and column sums.
2. `student_pieces`: a program takes some columns of one image, rebuilds its P_q in registers, and walks through the
   views. It leaves four numbers per piece of a student row, which `student_rows` combines into the row's
   softmax statistics and its loss.
3. `student_gradient` walks the same way and writes (n p - T) / temperature times weight and incoming gradient.

Exponents are powers of 2: z = logit * scale with scale = log2(e) / temperature. The statistics of a softmax stay two
numbers, the peak (the largest z) and log2 of the sum of 2 ** (z - peak): added up, the second would lose its digits
where logits are large. z - peak is a fused multiply-add, so z itself is never rounded; what the peak was rounded by is
the same for all of a row and falls out. No atomics; every sum has a fixed order.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _load(pointers, inside, outside, EVEN: tl.constexpr):
    """A tile in float32, `outside` beyond the last column."""
    tile = tl.load(pointers) if EVEN else tl.load(pointers, mask=inside, other=outside)
    return tile.to(tl.float32)


@triton.jit
def _store(pointers, tile, inside, EVEN: tl.constexpr):
    """Write a tile in the type of the pointers, nothing beyond the last column."""
    tile = tile.to(pointers.dtype.element_ty)
    if EVEN:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def teacher_pieces(
    teacher,
    offset,
    peaks,
    sums,
    column_sums,
    rows,
    scale,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax pieces peaks, sums [rows, BLOCKS] of teacher - offset, and column sums [cdiv(rows, ROWS), K]."""
    EVEN: tl.constexpr = K % BLOCK == 0
    program = tl.program_id(0).to(tl.int64)
    block, group = program % BLOCKS, program // BLOCKS
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    centre = _load(offset + columns, inside, 0.0, EVEN)
    total = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(group * ROWS, tl.minimum(group * ROWS + ROWS, rows), num_stages=STAGES):
        logits = _load(teacher + row * K + columns, inside, float("-inf"), EVEN)
        total += logits
        logits -= centre
        peak = tl.max(logits, 0) * scale
        tl.store(peaks + row * BLOCKS + block, peak)
        tl.store(sums + row * BLOCKS + block, tl.sum(tl.exp2(tl.fma(logits, scale, -peak)), 0))
    _store(column_sums + group * K + columns, total, inside, EVEN)


@triton.jit
def _combine(peaks, sums):
    """Peak and log2 of the sum of exponentials of a row from its pieces."""
    peak = tl.max(peaks, 0)
    return peak, tl.log2(tl.sum(sums * tl.exp2(peaks - peak), 0))


@triton.jit
def teacher_rows(peaks, sums, stats, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """Statistics [rows, 2] of teacher rows from their pieces."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PADDED)
    peak, log_sum = _combine(
        tl.load(peaks + row * BLOCKS + piece, mask=piece < BLOCKS, other=float("-inf")),
        tl.load(sums + row * BLOCKS + piece, mask=piece < BLOCKS, other=0.0),
    )
    tl.store(stats + row * 2, peak)
    tl.store(stats + row * 2 + 1, log_sum)


@triton.jit
def _softmax(logits, stats, row, scale):
    """Probabilities of a tile of a row, 0 beyond the last column."""
    return tl.exp2(tl.fma(logits, scale, -tl.load(stats + row * 2)) - tl.load(stats + row * 2 + 1))


@triton.jit
def _teacher_parts(
    teacher, offset, stats, image, images, columns, inside, scale, K: tl.constexpr, Q: tl.constexpr, EVEN: tl.constexpr
):
    """Tuple of the probabilities P_q of an image's teacher crops on a tile."""
    centre = _load(offset + columns, inside, 0.0, EVEN)
    parts = ()
    for q in tl.static_range(Q):
        row = q * images + image
        logits = _load(teacher + row * K + columns, inside, float("-inf"), EVEN) - centre
        parts = parts + (_softmax(logits, stats, row, scale),)  # noqa: RUF005  # Triton knows no unpacking
    return parts


@triton.jit
def _target(parts, view, EXCLUDE_OWN: tl.constexpr):
    """T_v: sum of the parts of the teacher crops that a view is compared with."""
    total = tl.where(view == 0, 0.0, parts[0]) if EXCLUDE_OWN else parts[0]
    for q in tl.static_range(1, len(parts)):
        total += tl.where(view == q, 0.0, parts[q]) if EXCLUDE_OWN else parts[q]
    return total


@triton.jit
def _student_piece(logits, target, pieces, at, plane, inside, scale, EVEN: tl.constexpr):
    """Leave a piece of a student row: peak, sum of exponentials, sum T (z - peak), sum T."""
    peak = tl.max(logits, 0) * scale
    behind = tl.fma(logits, scale, -peak)
    tl.store(pieces + at, peak)
    tl.store(pieces + at + plane, tl.sum(tl.exp2(behind), 0))
    # Beyond the last column 0 * -inf would be NaN.
    tl.store(pieces + at + 2 * plane, tl.sum(target * (behind if EVEN else tl.where(inside, behind, 0.0)), 0))


@triton.jit(do_not_specialize=["images", "views"])
def student_pieces(
    student,
    teacher,
    offset,
    teacher_stats,
    pieces,
    images,
    views,
    student_scale,
    teacher_scale,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    Q: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Pieces [4, views * images, BLOCKS]: peak, sum of exponentials, sum T (z - peak), sum T."""
    EVEN: tl.constexpr = K % BLOCK == 0
    OWN: tl.constexpr = Q if EXCLUDE_OWN else 0
    program = tl.program_id(0).to(tl.int64)
    block, image = program % BLOCKS, program // BLOCKS
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    plane = views.to(tl.int64) * images * BLOCKS
    # Views with a teacher crop of their own have targets of their own. Apart from the loop over the others they cost
    # these no instruction; their logits are on the way while the targets are made.
    own = ()
    for view in tl.static_range(OWN):
        own = own + (_load(student + (view * images + image) * K + columns, inside, float("-inf"), EVEN),)  # noqa: RUF005
    parts = _teacher_parts(teacher, offset, teacher_stats, image, images, columns, inside, teacher_scale, K, Q, EVEN)
    masses = ()
    for q in tl.static_range(Q):
        masses = masses + (tl.sum(parts[q], 0),)  # noqa: RUF005
    for view in tl.static_range(OWN):
        at = (view * images + image) * BLOCKS + block
        _student_piece(own[view], _target(parts, view, True), pieces, at, plane, inside, student_scale, EVEN)
        tl.store(pieces + at + 3 * plane, _target(masses, view, True))
    target, mass = _target(parts, 0, False), _target(masses, 0, False)
    for view in tl.range(OWN, views, num_stages=STAGES):
        row = view * images + image
        at = row * BLOCKS + block
        logits = _load(student + row * K + columns, inside, float("-inf"), EVEN)
        _student_piece(logits, target, pieces, at, plane, inside, student_scale, EVEN)
        tl.store(pieces + at + 3 * plane, mass)


@triton.jit(do_not_specialize=["rows"])
def student_rows(pieces, weights, stats, losses, rows, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """Statistics [rows, 2] and weighted losses [rows] of student rows from their pieces.

    A piece with peak m_c of a row with peak m adds sum T (m + log_sum - z), which is
    sum T * (log_sum + m - m_c) - sum T (z - m_c): no term is negative, so nothing cancels.
    """
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PADDED)
    inside = piece < BLOCKS
    at = pieces + row * BLOCKS + piece
    plane = rows.to(tl.int64) * BLOCKS
    peaks = tl.load(at, mask=inside, other=float("-inf"))
    peak, log_sum = _combine(peaks, tl.load(at + plane, mask=inside, other=0.0))
    behind = tl.load(at + 2 * plane, mask=inside, other=0.0)
    mass = tl.load(at + 3 * plane, mask=inside, other=0.0)
    loss = tl.sum(mass * (log_sum + tl.where(inside, peak - peaks, 0.0)) - behind, 0) * _LN2
    if weights is not None:
        loss *= tl.load(weights + row)
    tl.store(stats + row * 2, peak)
    tl.store(stats + row * 2 + 1, log_sum)
    tl.store(losses + row, loss)


@triton.jit(do_not_specialize=["images", "views"])
def student_gradient(
    grad_loss,
    student,
    teacher,
    offset,
    weights,
    teacher_stats,
    student_stats,
    gradient,
    images,
    views,
    student_scale,
    teacher_scale,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    Q: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of the student: grad_loss * weight * (n p - T) / temperature, n the number of compared crops."""
    EVEN: tl.constexpr = K % BLOCK == 0
    program = tl.program_id(0).to(tl.int64)
    block, image = program % BLOCKS, program // BLOCKS
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    parts = _teacher_parts(teacher, offset, teacher_stats, image, images, columns, inside, teacher_scale, K, Q, EVEN)
    incoming = tl.load(grad_loss) * (student_scale * _LN2)
    for view in tl.range(0, views, num_stages=STAGES):
        row = view * images + image
        logits = _load(student + row * K + columns, inside, float("-inf"), EVEN)
        factor = incoming if weights is None else incoming * tl.load(weights + row)
        compared = tl.where(view < Q, Q - 1.0, Q * 1.0) if EXCLUDE_OWN else Q * 1.0
        change = compared * _softmax(logits, student_stats, row, student_scale) - _target(parts, view, EXCLUDE_OWN)
        _store(gradient + row * K + columns, change * factor, inside, EVEN)
