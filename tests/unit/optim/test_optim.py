from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from personvit.config import OptimConfig
from personvit.models import ProjectionHead, VisionTransformer
from personvit.optim import build_schedules, clip_gradients, cosine_schedule, param_groups


def test_groups_decay_matrices_tokens_and_prototypes_only():
    network = torch.nn.ModuleDict(
        {
            "backbone": VisionTransformer((32, 16), embed_dim=16, depth=1, num_heads=2, masked_embed=True),
            "head": ProjectionHead(16, 8, 8, hidden_dim=12, bottleneck_dim=4),
        }
    )
    name_of = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, plain = ([name_of[id(parameter)] for parameter in group["params"]] for group in param_groups(network))
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.masked_embed"} <= set(decayed)
    assert {"head.last_layer.weight_v", "head.last_layer.weight_g"} <= set(decayed)
    assert set(plain) == {name for name in name_of.values() if name.endswith(".bias") or ".norm" in name}
    assert sorted(decayed + plain) == sorted(name_of.values())  # each once, the shared matrix too
    assert "weight_decay" not in param_groups(network)[0]
    assert param_groups(network)[1]["weight_decay"] == 0


def test_groups_leave_out_frozen_parameters():
    head = ProjectionHead(16, 8, 8, hidden_dim=12, bottleneck_dim=4, norm_last_layer=True)
    parameters = [parameter for group in param_groups(head) for parameter in group["params"]]
    assert all(parameter is not head.last_layer.weight_g for parameter in parameters)


def _parameters(gradients):
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def test_each_tensor_is_clipped_by_its_own_norm():
    gradients = [torch.full((4,), 10.0), torch.full((2, 2), 0.1), torch.zeros(3)]
    parameters = [*_parameters(gradients), torch.nn.Parameter(torch.zeros(1))]
    total = clip_gradients(parameters, 3.0)
    torch.testing.assert_close(parameters[0].grad, gradients[0] * (3.0 / (20 + 1e-6)))
    assert torch.equal(parameters[1].grad, gradients[1])
    assert torch.equal(parameters[2].grad, gradients[2])
    assert parameters[3].grad is None
    assert total.item() == pytest.approx(math.sqrt(400 + 0.04))


def test_limit_zero_only_measures():
    parameters = _parameters([torch.full((4,), 10.0)])
    assert clip_gradients(parameters, 0.0).item() == pytest.approx(20)
    assert torch.equal(parameters[0].grad, torch.full((4,), 10.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_shows_in_the_norm(bad):
    parameters = _parameters([torch.ones(2), torch.tensor([1.0, bad])])
    assert not clip_gradients(parameters, 3.0).isfinite()


def test_no_gradients_at_all():
    assert clip_gradients([torch.nn.Parameter(torch.zeros(1))], 3.0) == 0


def test_cosine_ends_one_step_short_of_the_final_value():
    schedule = cosine_schedule(1.0, 0.0, 100, warmup_steps=10)
    assert schedule.dtype == np.float64
    assert (schedule[0], schedule[9], schedule[10]) == (0, 1, 1)
    assert 0 < schedule[-1] < 1e-3
    assert (np.diff(schedule[10:]) < 0).all()


@pytest.mark.parametrize(("steps", "warmup"), [(5, 10), (10, 10), (1, 0), (0, 0)])
def test_schedule_always_has_one_value_per_step(steps, warmup):
    assert len(cosine_schedule(1.0, 0.1, steps, warmup)) == steps


def test_schedules_of_a_run():
    schedules = build_schedules(OptimConfig(warmup_epochs=0.5), batch_size=1024, epochs=4, steps_per_epoch=10)
    assert [len(array) for array in (schedules.lr, schedules.weight_decay, schedules.momentum)] == [40, 40, 40]
    assert schedules.lr.argmax() == 4  # half an epoch: steps 0 to 4, the last at the peak
    assert schedules.lr.max() == pytest.approx(5e-4 * 4)
    assert (schedules.weight_decay[0], schedules.momentum[0]) == pytest.approx((0.04, 0.996))
    assert schedules.momentum.max() < 1
