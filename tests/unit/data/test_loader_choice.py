from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from personvit.config import DataConfig
from personvit.data import loaders
from personvit.errors import BackendUnavailableError, ConfigError


@pytest.fixture
def machine(monkeypatch):
    """`machine(dali=, cuda=)` pretends."""

    def pretend(dali: bool, cuda: bool) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if dali else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)

    loaders.choose_loader.cache_clear()
    yield pretend
    loaders.choose_loader.cache_clear()


@pytest.mark.parametrize(
    ("dali", "cuda", "chosen", "why"),
    [
        (True, True, "dali-gpu", "CUDA device"),
        (True, False, "dali-cpu", "no CUDA device"),
        (False, True, "torchvision", "pip install nvidia-dali-cuda130"),
        (False, False, "torchvision", "pip install nvidia-dali-cuda130"),
    ],
)
def test_auto_takes_what_is_there_and_says_why_once(machine, caplog, dali, cuda, chosen, why):
    machine(dali, cuda)
    with caplog.at_level(logging.INFO, "personvit"):
        assert [loaders.choose_loader("auto") for _ in range(3)] == [chosen] * 3
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert f"data.loader=auto -> {chosen}" in messages[0]
    assert why in messages[0]


@pytest.mark.parametrize(
    ("wanted", "dali", "cuda", "remedy"),
    [
        ("dali-cpu", False, False, "pip install nvidia-dali-cuda130"),
        ("dali-gpu", False, True, "pip install nvidia-dali-cuda130"),
        ("dali-gpu", True, False, "data.loader=dali-cpu"),
    ],
)
def test_what_was_asked_for_and_cannot_run_is_an_error_with_the_remedy(machine, wanted, dali, cuda, remedy):
    machine(dali, cuda)
    with pytest.raises(BackendUnavailableError, match=remedy):
        loaders.choose_loader(wanted)


def test_torchvision_always_runs(machine):
    machine(False, False)
    assert loaders.choose_loader("torchvision") == "torchvision"


def test_values_of_the_configuration():
    with pytest.raises(ConfigError, match=r"Did you mean data\.loader=dali-cpu"):
        DataConfig(loader="dali-cqu")
    with pytest.raises(ConfigError, match=r"data\.threads"):
        DataConfig(threads=0)
    with pytest.raises(ConfigError, match=r"data\.loader=dali-gpu"):
        DataConfig(loader="dali-cpu", decode="mixed")
    with pytest.raises(ConfigError, match="hw_decoder_load"):
        DataConfig(hw_decoder_load=1.5)
