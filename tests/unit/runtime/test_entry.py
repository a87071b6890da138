from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys

import pytest
import torch

from personvit.errors import ConfigError, PersonViTError
from personvit.runtime.distributed import all_reduce_sum, any_rank, init_distributed, is_main, on_main, world_size
from personvit.runtime.entry import run
from personvit.runtime.progress import ConsoleHandler, Throughput, format_duration, log_progress
from personvit.runtime.signals import StopSignal


def raising(error: BaseException):
    def main(argv: list[str] | None) -> int:
        raise error

    return main


def test_errors_become_one_line_and_an_exit_code(capsys):
    assert run(raising(ConfigError("train.epochs=0 is out of range")), []) == 2
    assert capsys.readouterr().err == "error: train.epochs=0 is out of range\n"
    assert run(raising(KeyboardInterrupt()), []) == 130
    assert run(lambda argv: len(argv or []), ["a", "b"]) == 2


def test_full_disk_is_explained(capsys):
    assert run(raising(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")), []) == 1
    message = capsys.readouterr().err
    assert "disk is full while writing runs/a/metrics.jsonl" in message
    assert "--resume auto" in message
    with pytest.raises(PermissionError):
        run(raising(PermissionError(errno.EACCES, "Permission denied")), [])


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), [])


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = init_distributed()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert world_size() == 1
    assert is_main()
    tensor = torch.ones(2)
    assert all_reduce_sum(tensor) is tensor
    assert any_rank(True, ranks.device)
    assert not any_rank(False, ranks.device)


def test_ranks_without_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 4"):
        init_distributed()


def test_on_main_passes_the_error_on():
    with pytest.raises(PersonViTError, match="full"):
        on_main(lambda: raising(PersonViTError("full"))(None), torch.device("cpu"))


def test_first_signal_is_noted_second_stops():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def console():
    logger = logging.getLogger("personvit")
    handlers, level = logger.handlers, logger.level
    logger.handlers = [ConsoleHandler()]
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers = handlers
    logger.setLevel(level)


def test_progress_refreshes_on_a_terminal(console, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log_progress("step 1")
    log_progress("step 2")
    console.info("saved")
    assert sys.stderr.getvalue().replace("\x1b[K", "") == "\rstep 1\rstep 2\nsaved\n"


def test_progress_is_plain_lines_elsewhere(console, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log_progress("step 1")
    log_progress("step 2")
    assert sys.stderr.getvalue() == "step 1\nstep 2\n"


def test_durations():
    assert [format_duration(s) for s in (0, 59.6, 3661, 200_000)] == ["0:00:00", "0:01:00", "1:01:01", "2d 07:33:20"]


def test_throughput(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    pace = Throughput()
    now[0] += 4.0
    pace.add(images=64, waited=1.0)
    pace.add(images=64, waited=1.0)
    assert (pace.images_per_s, pace.data_wait, pace.eta(10)) == (32.0, 0.5, 20.0)
