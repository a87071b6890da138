"""The step in one operator against clipping, torch.optim.AdamW and a moving average one after another."""

from __future__ import annotations

import copy

import pytest
import torch

from personvit.optim import (
    AdamWEma,
    clip_coefficients,
    clip_gradients,
    ema_update,
    param_groups,
    trained_parameters,
)

LIMIT, MOMENTUM = 0.5, 0.99


class Run:
    """A student, its teacher (which lacks the last bias), and an AdamW."""

    def __init__(self, fused=True, **options):
        torch.manual_seed(0)
        self.student = torch.nn.Sequential(torch.nn.Linear(7, 19), torch.nn.GELU(), torch.nn.Linear(19, 5))
        self.student[0].bias.requires_grad_(False)  # as the prototypes' norms: never trained, followed all the same
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        averages = dict(self.teacher.named_parameters())
        del averages["2.bias"]
        self.teacher_of = {p: averages[name] for name, p in self.student.named_parameters() if name in averages}
        groups = param_groups(self.student)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.04, fused=fused, **options)

    def backward(self, step):
        torch.manual_seed(step)
        self.optimizer.zero_grad()
        self.student(torch.randn(11, 7)).square().sum().backward()
        if step < 2:
            self.student[2].weight.grad = None  # as the prototypes of the first epoch
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        self.optimizer.param_groups[0]["weight_decay"] = 0.04 + 0.01 * step

    def one_after_another(self, steps):
        for step in steps:
            self.backward(step)
            self.norm = clip_gradients(self.student.parameters(), LIMIT)
            self.optimizer.step()
            ema_update(list(self.teacher_of.values()), list(self.teacher_of), MOMENTUM)
        return self

    def at_once(self, steps):
        update = AdamWEma(self.optimizer, self.teacher_of)
        for step in steps:
            self.backward(step)
            self.norm, coefficients = clip_coefficients(trained_parameters(self.optimizer), LIMIT)
            update.step(coefficients, MOMENTUM)
        return self

    def tensors(self):
        state = self.optimizer.state_dict()["state"]
        return [
            *self.student.parameters(),
            *self.teacher.parameters(),
            *(value for index in sorted(state) for _, value in sorted(state[index].items())),
        ]


def assert_same(a: Run, b: Run):
    ours, theirs = a.tensors(), b.tensors()
    assert len(ours) == len(theirs)
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine.dtype, mine.device, mine.shape) == (their.dtype, their.device, their.shape)
        assert torch.equal(mine, their)


def test_same_bits_as_one_after_another():
    ours, theirs = Run().at_once(range(6)), Run().one_after_another(range(6))
    assert_same(ours, theirs)
    torch.testing.assert_close(ours.norm, theirs.norm, rtol=1e-6, atol=0)
    assert ours.norm > LIMIT  # something was clipped


def test_another_implementation_of_adamw_within_rounding():
    ours, theirs = Run(fused=False).at_once(range(6)), Run(fused=False).one_after_another(range(6))
    for mine, their in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(mine, their, rtol=2e-6, atol=1e-7)


def test_the_two_ways_mix_in_one_run():
    mixed = Run()
    update = AdamWEma(mixed.optimizer, mixed.teacher_of)
    for step in range(6):
        if step % 2:
            mixed.one_after_another([step])
            continue
        mixed.backward(step)
        update.step(clip_coefficients(trained_parameters(mixed.optimizer), LIMIT)[1], MOMENTUM)
    assert_same(mixed, Run().one_after_another(range(6)))


@pytest.mark.parametrize(("first", "then"), [("at_once", "one_after_another"), ("one_after_another", "at_once")])
def test_states_are_exchanged(first, then):
    begun = getattr(Run(), first)(range(3))
    resumed = Run()
    resumed.student.load_state_dict(begun.student.state_dict())
    resumed.teacher.load_state_dict(begun.teacher.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(begun.optimizer.state_dict()))
    getattr(resumed, then)(range(3, 6))
    assert_same(resumed, Run().one_after_another(range(6)))


def test_a_state_loaded_into_a_running_step_is_seen():
    run = Run()
    update = AdamWEma(run.optimizer, run.teacher_of)
    saved = copy.deepcopy(run.one_after_another(range(3)))
    for step in range(3, 5):
        run.backward(step)
        update.step(None, MOMENTUM)
    run.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
    run.backward(3)
    update.step(None, MOMENTUM)
    counts = {float(state["step"]) for state in run.optimizer.state.values()}
    assert counts == {4.0, 2.0}  # the last weight had no gradient in the first two steps


def test_gradients_stay_as_they_are():
    run = Run()
    run.backward(3)
    before = [p.grad.clone() for p in trained_parameters(run.optimizer)]
    _, coefficients = clip_coefficients(trained_parameters(run.optimizer), LIMIT)
    AdamWEma(run.optimizer, run.teacher_of).step(coefficients, MOMENTUM)
    after = [p.grad for p in trained_parameters(run.optimizer)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_without_any_gradient_the_teacher_follows():
    run = Run()
    with torch.no_grad():
        run.student[0].weight.add_(1)
    before = run.teacher[0].weight.clone()
    AdamWEma(run.optimizer, run.teacher_of).step(None, 0.75)
    torch.testing.assert_close(run.teacher[0].weight, before + 0.25)
    assert not run.optimizer.state


def test_coefficients_are_what_clipping_scales_by():
    run = Run()
    run.backward(3)
    parameters = list(run.student.parameters())
    norm, coefficients = clip_coefficients(parameters, LIMIT)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    assert torch.equal(norm, clip_gradients(parameters, LIMIT))
    after = [p.grad for p in parameters if p.grad is not None]
    for gradient, clipped, coefficient in zip(before, after, coefficients, strict=True):
        assert torch.equal(gradient * coefficient, clipped)
    assert clip_coefficients(parameters, 0.0)[1] is None
    assert clip_coefficients([], LIMIT)[1] is None


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_other_kinds_of_adamw_are_refused(option):
    run = Run(**{option: True})
    with pytest.raises(ValueError, match=option):
        AdamWEma(run.optimizer, run.teacher_of)


def test_groups_with_other_rates_are_refused():
    run = Run()
    run.backward(3)
    run.optimizer.param_groups[1]["lr"] = 5.0
    with pytest.raises(ValueError, match="one lr for all groups"):
        AdamWEma(run.optimizer, run.teacher_of).step(None, MOMENTUM)
