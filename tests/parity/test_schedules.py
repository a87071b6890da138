"""Schedules against the published iBOT code."""

from __future__ import annotations

import numpy as np
import pytest

from personvit.losses import temperature_schedule
from personvit.optim import cosine_schedule


@pytest.mark.parametrize("case", range(6))
def test_cosine_equals_ibot(golden, case):
    values = golden("dino_schedules")
    base, final, epochs, per_epoch, warmup_epochs, start = values[f"args_{case}"]
    ours = cosine_schedule(base, final, int(epochs * per_epoch), int(warmup_epochs * per_epoch), start)
    np.testing.assert_allclose(ours, values[f"out_{case}"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", ["a", "b"])
def test_temperatures_equal_ibot(golden, case):
    values = golden("ibot_loss")
    cfg = values[f"{case}_cfg"]
    warmup, epochs, delay = int(cfg[10]), int(cfg[11]), int(cfg[14])
    ours = temperature_schedule(cfg[6], cfg[7], warmup, epochs)
    np.testing.assert_allclose(ours, values[f"{case}_temp_schedule"], rtol=1e-12)
    ours = temperature_schedule(cfg[8], cfg[9], warmup, epochs, delay)
    np.testing.assert_allclose(ours, values[f"{case}_temp2_schedule"], rtol=1e-12)
