"""Losses and centres for any number of views, images and micro-batches, against plain float64 loops."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personvit.losses import DINOLoss, IBOTPatchLoss, sinkhorn_knopp

seeds = st.integers(0, 2**31)


def _naive_dino(student, teacher, centre, views, student_temp, teacher_temp):
    """Mean over pairs of different views, one cross entropy at a time, in float64."""
    images = len(student) // views
    students, teachers = student.double().view(views, images, -1), teacher.double().view(2, images, -1)
    terms = []
    for q in range(2):
        target = ((teachers[q] - centre.double()) / teacher_temp).softmax(-1)
        for v in range(views):
            if v != q:
                terms.append(-(target * (students[v] / student_temp).log_softmax(-1)).sum(-1).mean())
    assert len(terms) == 2 * (views - 1)
    return sum(terms) / len(terms)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 10), st.integers(1, 4), st.integers(1, 33), st.sampled_from([0.04, 0.07, 1.0]))
def test_dino_equals_the_mean_over_all_pairs(seed, views, images, prototypes, temp):
    torch.manual_seed(seed)
    student = torch.randn(views * images, prototypes, requires_grad=True)
    teacher = torch.randn(2 * images, prototypes)
    loss = DINOLoss(prototypes)
    loss.center.normal_()
    ours = loss(student, teacher, views, temp)
    oracle_input = student.detach().double().requires_grad_()
    oracle = _naive_dino(oracle_input, teacher, loss.center, views, 0.1, temp)
    torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours, student)
    (expected,) = torch.autograd.grad(oracle, oracle_input)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 12), st.floats(0, 1))
def test_patch_loss_and_gradient_equal_the_dense_form(seed, crops, patches, ratio):
    torch.manual_seed(seed)
    student = torch.randn(crops, patches, 9, requires_grad=True)
    teacher = torch.randn(crops, patches, 9)
    masks = torch.rand(crops, patches) < ratio
    loss = IBOTPatchLoss(9)
    loss.center2.normal_()
    target = ((teacher.double() - loss.center2.double()) / 0.05).softmax(-1)
    dense_input = student.detach().double().requires_grad_()
    entropy = -(target * (dense_input / 0.1).log_softmax(-1)).sum(-1)  # [crops, patches]
    dense = ((entropy * masks).sum(-1) / masks.sum(-1).clamp(min=1)).mean()
    weights = (1 / masks.sum(-1, keepdim=True).clamp(min=1)).expand_as(masks)[masks]
    ours = loss(student[masks], teacher[masks], weights, crops, 0.05)
    torch.testing.assert_close(ours.double(), dense, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours, student)
    (expected,) = torch.autograd.grad(dense, dense_input)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)
    assert not gradient[~masks].any()


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_centre_does_not_depend_on_the_split_into_micro_batches(seed, sizes):
    torch.manual_seed(seed)
    logits = torch.randn(sum(sizes), 4, 7)  # crops, patches, prototypes
    whole, parts = (DINOLoss(7), IBOTPatchLoss(7)), (DINOLoss(7), IBOTPatchLoss(7))
    for losses, chunks in ((whole, [logits]), (parts, logits.split(sizes))):
        for chunk in chunks:
            cls = chunk[:, 0].repeat(2, 1)  # two views of an image for each crop
            losses[0](torch.zeros_like(cls), cls, 2, 0.05)
            losses[1].accumulate(chunk.mean(dim=(0, 1)), len(chunk))
        for loss in losses:
            loss.apply_centre()
    torch.testing.assert_close(parts[0].center, whole[0].center, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[1].center2, whole[1].center2, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.04, 0.1, 1.0]), st.integers(1, 5))
def test_sinkhorn_rows_sum_to_one(seed, rows, prototypes, temp, iterations):
    torch.manual_seed(seed)
    targets = sinkhorn_knopp(torch.randn(rows, prototypes), temp, iterations)
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(rows))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 20), st.integers(1, 20), st.integers(1, 4))
def test_sinkhorn_equals_the_published_products(seed, rows, prototypes, iterations):
    torch.manual_seed(seed)
    logits = torch.rand(rows, prototypes) * 2 - 1
    mass = (logits.double() / 0.04).exp().t()
    mass /= mass.sum()
    for _ in range(iterations):
        mass /= mass.sum(dim=1, keepdim=True) * prototypes
        mass /= mass.sum(dim=0, keepdim=True) * rows
    torch.testing.assert_close(
        sinkhorn_knopp(logits, 0.04, iterations).double(), (mass * rows).t(), rtol=1e-3, atol=1e-6
    )


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 30), st.integers(2, 30))
def test_many_sinkhorn_iterations_share_the_batch_evenly(seed, rows, prototypes):
    torch.manual_seed(seed)
    targets = sinkhorn_knopp(torch.randn(rows, prototypes), 1.0, 200)
    torch.testing.assert_close(targets.sum(dim=0), torch.full((prototypes,), rows / prototypes), rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(-50, 50))
def test_a_common_shift_of_the_teacher_changes_nothing(seed, shift):
    torch.manual_seed(seed)
    student, teacher = torch.randn(12, 8), torch.randn(4, 8)
    for loss in (DINOLoss(8), DINOLoss(8, centering="sinkhorn")):
        shifted = loss(student, teacher + shift, 6, 1.0)
        torch.testing.assert_close(shifted, loss(student, teacher, 6, 1.0), rtol=1e-4, atol=1e-4)


def test_uniform_student_has_the_loss_of_a_fair_die():
    loss = DINOLoss(16)(torch.zeros(12, 16), torch.randn(4, 16), 6, 0.05)
    torch.testing.assert_close(loss, torch.tensor(math.log(16)))
