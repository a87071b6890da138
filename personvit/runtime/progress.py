"""The console: plain log lines, and one progress line that refreshes in place where standard error is a terminal."""

from __future__ import annotations

import logging
import resource
import sys
import time

import torch

_progress_logger = logging.getLogger("personvit.progress")
_ERASE_REST_OF_LINE = "\x1b[K"


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Log handler for standard error, whatever that is at the time of the message.

    Records logged by `log_progress` overwrite each other on a terminal and are ordinary lines elsewhere (files, CI).
    """

    def __init__(self) -> None:
        super().__init__()
        self._open_line = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        if record.name == _progress_logger.name and self.stream.isatty():
            self.stream.write(f"\r{self.format(record)}{_ERASE_REST_OF_LINE}")
            self.stream.flush()
            self._open_line = True
            return
        if self._open_line:
            self.stream.write("\n")
            self._open_line = False
        super().emit(record)


def log_progress(line: str) -> None:
    """Show a progress line; log files receive it as an ordinary line."""
    _progress_logger.info(line)


def format_duration(seconds: float) -> str:
    """Seconds as `h:mm:ss`, with days in front where there are any: `2d 03:04:05`."""
    total = round(seconds)
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{days}d {hours:02}:{minutes:02}:{secs:02}" if days else f"{hours}:{minutes:02}:{secs:02}"


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the CUDA device, else resident in RAM (without readers)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


class Throughput:
    """Images per second and the share of time spent waiting for data, over the steps since the last `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self._start = time.perf_counter()
        self._images = 0
        self._steps = 0
        self._waited = 0.0

    def add(self, images: int, waited: float) -> None:
        """Count one optimiser step of `images` images (over all ranks) that waited `waited` seconds for data."""
        self._images += images
        self._steps += 1
        self._waited += waited

    @property
    def images_per_s(self) -> float:
        """Images of all ranks per second of this window."""
        return self._images / max(time.perf_counter() - self._start, 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of the window spent waiting for the loader, 0 to 1."""
        return min(1.0, self._waited / max(time.perf_counter() - self._start, 1e-9))

    def eta(self, steps_left: int) -> float:
        """Seconds that `steps_left` steps take at the pace of this window."""
        return steps_left * (time.perf_counter() - self._start) / max(self._steps, 1)
