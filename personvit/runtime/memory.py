"""How the C library hands out memory on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed instead of giving it back to the system, for the rest of this process.

    A training step on a CPU frees and asks again for the same large blocks. By default glibc returns blocks of
    megabytes to the system at once, and the next step pays for fresh pages, zeroed by the kernel: about a tenth of a
    step of the recipe `demo`. The price: resident memory stays near its highest instead of falling between steps.

    Returns:
        Whether the C library took the setting: only glibc has it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    limit = 2**31 - 1  # mallopt takes an int
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_M_TRIM_THRESHOLD, limit))
