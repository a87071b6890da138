from __future__ import annotations

import torch

from personvit.retrieval import memory
from personvit.retrieval.memory import available_memory, format_bytes


def test_something_is_free_here():
    free = available_memory(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50


def test_a_container_counts_without_the_files_it_caches(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 400\n")
    monkeypatch.setattr(memory, "_CGROUPS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),))
    assert available_memory(torch.device("cpu")) == 500
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = available_memory(torch.device("cpu"))
    assert unlimited is None or unlimited > 500


def test_bytes_for_people():
    assert format_bytes(3.57 * 2**30) == "3.6 GiB"
    assert format_bytes(5 * 2**20) == "5.0 MiB"
