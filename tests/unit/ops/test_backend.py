from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from personvit import ops
from personvit.errors import BackendUnavailableError, ConfigError
from personvit.ops import backend, native

NATIVE = [
    "block_masks",
    "inverted_index",
    "jaccard",
    "k_reciprocal",
    "knn",
    "pairwise_distance",
    "photometry",
    "query_expansion",
    "rank_counts",
    "reciprocal_weights",
    "rerank_lists",
    "rerank_matrix",
]
PLAIN = ["adamw_ema", "add_layer_norm", "assemble_tokens", "distill_cross_entropy", "gather_rows"]
"""Triton kernels on CUDA, plain torch on a CPU."""
ALL = sorted([*NATIVE, *PLAIN, "packed_attention"])


@pytest.fixture(autouse=True)
def _restore_backend() -> Iterator[None]:
    yield
    ops.set_backend("auto")


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_cpu", lambda: "personvit/_C.so was not built")
    backend._chosen.clear()


def test_auto_takes_the_fast_ones_on_the_cpu() -> None:
    rows = {row.op: row.backend for row in ops.report("cpu")}
    assert rows == {"packed_attention": "bmm"} | dict.fromkeys(PLAIN, "reference") | dict.fromkeys(NATIVE, "native")
    assert [row.op for row in ops.report("cpu")] == ALL


def test_reference_takes_the_plain_ones() -> None:
    ops.set_backend("reference")
    assert {row.backend for row in ops.report("cpu")} == {"reference"}
    assert ops.get_backend() == "reference"


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ops.set_backend("auto")  # forgets earlier choices
    with caplog.at_level(logging.INFO, logger="personvit.ops.backend"):
        for _ in range(3):
            ops.block_masks(torch.ones(2), 4, 4, seed=0)
    assert [record.getMessage() for record in caplog.records] == ["block_masks on cpu: native (C++/CUDA extension)"]


def test_auto_without_the_extension_says_so_once_and_works(
    no_extension: None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = native.block_masks(torch.full((3,), 30.0), 16, 8, 7, 0, -1.0, 1.0)
    with caplog.at_level(logging.WARNING, logger="personvit.ops.backend"):
        for _ in range(2):
            masks = ops.block_masks(torch.full((3,), 30.0), 16, 8, 7, aspect=(0.36787944117144233, 2.718281828459045))
    assert torch.equal(masks, expected)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "personvit/_C.so was not built" in message
    assert native.BUILD_COMMAND in message


def test_fused_without_the_extension_is_an_error_with_a_remedy(no_extension: None) -> None:
    with pytest.raises(BackendUnavailableError, match=r"_C.so was not built.*pip install -e \."):
        ops.set_backend("fused")
    assert ops.get_backend() == "auto"  # the mode in force stays


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without CUDA")
def test_fused_without_cuda_says_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="personvit.ops.backend"):
        ops.set_backend("fused")
    message = caplog.records[0].getMessage()
    assert "Triton kernels are off" in message
    for expected in ("packed_attention: bmm", "add_layer_norm: reference", "block_masks: native", "knn: native"):
        assert expected in message


def test_unknown_backend() -> None:
    with pytest.raises(ConfigError, match=r"kernels.backend=fast is not one of auto, reference, fused, triton"):
        ops.set_backend("fast")


def test_report_tells_what_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    ops.set_backend("fused")
    monkeypatch.setattr(native, "load_cpu", lambda: "broken")
    row = next(row for row in ops.report("cpu") if row.op == "knn")
    assert row.backend == "unavailable"
    assert "broken" in row.reason


def test_first_available_of_several_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_operators", {})
    monkeypatch.setattr(backend, "_implementations", {})
    plain = backend.Implementation("reference", lambda x: "plain", ("cpu",), "plain")
    off = backend.Implementation("triton", lambda x: "triton", ("cpu",), "kernel", lambda device: ("asleep", "wake it"))
    elsewhere = backend.Implementation("xformers", lambda x: "xformers", ("cuda",), "kernel")
    on = backend.Implementation("native", lambda x: "native", ("cpu",), "compiled")
    backend.register(backend.Operator("twice", plain, (off, elsewhere, on)))
    ops.set_backend("auto")
    assert backend.call("twice", "cpu", 1) == "native"
    assert ops.report("cpu") == [("twice", "native", "compiled; not triton: asleep, remedy: wake it")]
    with pytest.raises(BackendUnavailableError, match=r"triton implementation on cpu: asleep. Remedy: wake it"):
        ops.set_backend("fused")


def test_missing_and_foreign_libraries_are_explained(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    assert native._load_library("_C.so") == "personvit/_C.so was not built"
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert "personvit/_C.so does not load" in str(native._load_library("_C.so"))


def test_cuda_module_is_not_touched_under_a_cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    native.load_cuda.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in str(native.load_cuda())
    native.load_cuda.cache_clear()
