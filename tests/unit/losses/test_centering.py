from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from personvit.losses import DINOLoss, IBOTPatchLoss, sinkhorn_knopp, temperature_schedule


def collect(loss, teacher):
    """Let a DINO loss see teacher logits [2, K] or [2B, K]; the student's make no difference to the centre."""
    loss(torch.zeros_like(teacher), teacher, 2, 0.05)


def test_temperature_warms_up_once_and_stays():
    schedule = temperature_schedule(0.04, 0.07, 3, 6)
    np.testing.assert_allclose(schedule, [0.04, 0.055, 0.07, 0.07, 0.07, 0.07])
    np.testing.assert_allclose(temperature_schedule(0.04, 0.07, 0, 2), [0.07, 0.07])


@pytest.mark.parametrize("delay", [0, 2, 5, 9])
def test_temperature_has_one_value_per_epoch(delay):
    schedule = temperature_schedule(0.04, 0.07, 3, 6, delay)
    assert len(schedule) == 6
    assert (schedule[:delay] == 0.04).all()


def test_loss_uses_the_centre_from_before_its_own_update():
    loss, student, teacher = DINOLoss(8), torch.randn(6, 8), torch.randn(4, 8)
    first = loss(student, teacher, 3, 0.05)
    assert torch.equal(loss(student, teacher, 3, 0.05), first)
    loss.apply_centre()
    assert not torch.equal(loss(student, teacher, 3, 0.05), first)
    torch.testing.assert_close(loss.center, 0.1 * teacher.mean(dim=0, keepdim=True))


def test_only_training_adds_to_the_centre():
    loss = DINOLoss(8)
    with torch.no_grad():
        loss(torch.randn(6, 8), torch.randn(4, 8), 3, 0.05)
    loss.apply_centre()
    assert not loss.center.any()


def test_discarded_and_empty_updates_leave_the_centre():
    loss = DINOLoss(8)
    collect(loss, torch.randn(4, 8))
    loss.discard()
    loss.apply_centre()
    assert not loss.center.any()


@pytest.mark.parametrize("make", [DINOLoss, IBOTPatchLoss])
def test_momentum_one_never_moves_the_centre(make):
    loss = make(8, centre_momentum=1.0)
    collect(loss, torch.ones(4, 8)) if make is DINOLoss else loss.accumulate(torch.ones(8), 4)
    loss.apply_centre()
    assert not loss.state_dict().popitem()[1].any()


def test_state_dict_names_and_shapes_are_the_published_ones():
    states = {**DINOLoss(5).state_dict(), **IBOTPatchLoss(7).state_dict()}
    assert {name: tuple(value.shape) for name, value in states.items()} == {"center": (1, 5), "center2": (1, 1, 7)}


def test_pending_sums_are_not_part_of_the_state():
    loss = DINOLoss(4)
    collect(loss, torch.randn(2, 4))
    assert list(loss.state_dict()) == ["center"]


def _work_of_a_rank(rank, folder, logits, splits):
    """Body of one of two processes: its share of each batch, results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {}
    for split in splits:
        share = (logits[:split], logits[split:])[rank]
        loss = IBOTPatchLoss(logits.shape[1])
        loss.accumulate(share.mean(dim=0).nan_to_num(), len(share))
        loss.apply_centre()
        results[split] = (sinkhorn_knopp(share, 0.05), loss.center2)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    """Targets and centre of a batch do not depend on how it is split over ranks, an empty rank included."""
    logits, splits = torch.randn(16, 6), (8, 5, 16)
    torch.multiprocessing.spawn(_work_of_a_rank, (str(tmp_path), logits, splits), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    whole = IBOTPatchLoss(6)
    whole.accumulate(logits.mean(dim=0), len(logits))
    whole.apply_centre()
    for split in splits:
        targets = torch.cat([ranks[0][split][0], ranks[1][split][0]])
        torch.testing.assert_close(targets, sinkhorn_knopp(logits, 0.05), rtol=1e-4, atol=1e-6)
        for rank in ranks:
            torch.testing.assert_close(rank[split][1], whole.center2)


def test_sinkhorn_keeps_large_logits_finite():
    targets = sinkhorn_knopp(torch.randn(8, 5) * 50, 0.04)
    assert targets.isfinite().all()


def test_sinkhorn_of_nothing():
    assert sinkhorn_knopp(torch.empty(0, 5), 0.04).shape == (0, 5)


def test_sinkhorn_uses_no_centre():
    cls, patch = DINOLoss(6, centering="sinkhorn"), IBOTPatchLoss(6, centering="sinkhorn")
    teacher = torch.randn(4, 6)
    collect(cls, teacher)
    patch.accumulate(teacher.mean(dim=0), 4)
    for loss in (cls, patch):
        loss.apply_centre()
        assert not loss.centre.any()


def test_sinkhorn_targets_are_a_softmax_of_shifted_logits():
    """The losses against targets that the published alternation made, multiplied out in float64."""
    teacher, student, weights = torch.randn(4, 6), torch.randn(4, 6), torch.rand(4)
    mass = (teacher.double() / 0.05).exp()
    for _ in range(3):
        mass = mass / mass.sum(dim=0)
        mass = mass / mass.sum(dim=1, keepdim=True)
    log_student = (student.double() / 0.1).log_softmax(-1)
    patch = IBOTPatchLoss(6, centering="sinkhorn")(student, teacher, weights, 3, 0.05)
    expected = -((mass * log_student).sum(-1) * weights).sum() / 3
    torch.testing.assert_close(patch.double(), expected, rtol=1e-5, atol=1e-5)
    cls = DINOLoss(6, centering="sinkhorn")(student, teacher, 2, 0.05)
    swapped = mass.view(2, 2, 6).flip(0).reshape(4, 6)  # two views of two images: each sees the other's target
    torch.testing.assert_close(cls.double(), -(swapped * log_student).sum() / 4, rtol=1e-5, atol=1e-5)


def test_losses_are_float32_for_bfloat16_logits():
    student, teacher = torch.randn(6, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    loss = DINOLoss(8)(student, teacher, 3, 0.05)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, DINOLoss(8)(student.float(), teacher.float(), 3, 0.05))


def test_teacher_gets_no_gradient():
    teacher = torch.randn(4, 8, requires_grad=True)
    student = torch.randn(6, 8, requires_grad=True)
    loss = DINOLoss(8)
    loss(student, teacher, 3, 0.05).backward()
    loss.apply_centre()
    assert teacher.grad is None
    assert student.grad is not None
    assert not loss.center.requires_grad


def test_empty_mask_set_is_zero_with_zero_gradient():
    student = torch.empty(0, 8, requires_grad=True)
    loss = IBOTPatchLoss(8)(student, torch.empty(0, 8), torch.empty(0), 4, 0.05)
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 8)
