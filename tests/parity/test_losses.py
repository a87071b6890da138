"""Losses, their gradients and centres against the published iBOT code.

The published loss takes every patch; ours takes the masked ones, so the tests gather them first.
"""

from __future__ import annotations

import pytest
import torch

from personvit.losses import DINOLoss, IBOTPatchLoss


def _step(values, case, step):
    prefix = f"{case}_{step}_"
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in values.items() if k.startswith(prefix)}


@pytest.mark.parametrize("case", ["a", "b"])
def test_losses_gradients_and_centres_equal_ibot(golden, case):
    values = golden("ibot_loss")
    prototypes, patch_prototypes, views = int(values[f"{case}_cfg"][1]), int(values[f"{case}_cfg"][2]), 2
    views += int(values[f"{case}_cfg"][5])
    dino, patch = DINOLoss(prototypes), IBOTPatchLoss(patch_prototypes)
    dino.center.copy_(torch.from_numpy(values[f"{case}_center0"]))
    patch.center2.copy_(torch.from_numpy(values[f"{case}_center2_0"]))
    for step in range(3):
        data = _step(values, case, step)
        student_global = data["student_cls"].requires_grad_()
        student_local = data["local_cls"].requires_grad_() if "local_cls" in data else None
        student_cls = student_global if student_local is None else torch.cat([student_global, student_local])
        masks = data["masks"].flatten(0, 1).flatten(1)  # [2B, N], crop-major
        crops = len(masks)
        assert (masks.sum(dim=1) == 0).any(), "the fixture holds a crop without a mask"
        indices = masks.flatten().nonzero().squeeze(1)
        weights = (1 / masks.sum(dim=1).clamp(min=1)).repeat_interleave(masks.sum(dim=1))
        student_patches = data["student_patch"].requires_grad_()
        teacher_patches = data["teacher_patch"]

        loss_cls = dino(student_cls, data["teacher_cls"], views, float(data["temp"]))
        loss_patch = patch(
            student_patches.flatten(0, 1)[indices],
            teacher_patches.flatten(0, 1)[indices],
            weights,
            crops,
            float(data["temp2"]),
        )
        torch.testing.assert_close(loss_cls, data["cls"].float(), rtol=1e-5, atol=0)
        torch.testing.assert_close(loss_patch, data["patch"].float(), rtol=1e-5, atol=0)
        torch.testing.assert_close(loss_cls + loss_patch, data["loss"].float(), rtol=1e-5, atol=0)
        if "grad_cls" in data:
            (loss_cls + loss_patch).backward()
            torch.testing.assert_close(student_global.grad, data["grad_cls"], rtol=1e-5, atol=1e-7)
            if "grad_patch" in data:
                torch.testing.assert_close(student_patches.grad, data["grad_patch"], rtol=1e-5, atol=1e-7)
            if student_local is not None:
                torch.testing.assert_close(student_local.grad, data["grad_local"], rtol=1e-5, atol=1e-7)

        patch.accumulate(teacher_patches.mean(dim=(0, 1)), crops)
        dino.apply_centre()
        patch.apply_centre()
        torch.testing.assert_close(dino.center, data["center"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(patch.center2, data["center2"], rtol=1e-5, atol=1e-7)
