"""How much memory and how many files this process holds, and whether it becomes more."""

import ctypes
import gc
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE")
# Of Student's t, 97.5 %: what a slope of so many samples less two is uncertain by, in standard errors.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 15: 2.13, 20: 2.09}


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def allocated_bytes() -> int | None:
    """Return the memory that is in use, without what only waits for the collector; None: this system does not say.

    What the process occupies is more, and goes on growing for a while: each thread has a heap of its own, and the holes
    in it stay with the process.
    """
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    gc.collect()
    mallinfo.restype = _Mallinfo
    told = mallinfo()
    return int(told.uordblks + told.hblkhd) + _small_objects()


def _small_objects() -> int:
    """Return the bytes that Python's own allocator has given out, which it prints and tells nobody."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        usual = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            sys._debugmallocstats()
        finally:
            os.dup2(usual, 2)
            os.close(usual)
        file.seek(0)
        found = re.search(rb"bytes in allocated blocks\s*=\s*([0-9,]+)", file.read())
    return int(found[1].replace(b",", b"")) if found else 0


def resident_bytes() -> int:
    """Return the memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def open_files() -> int:
    """Return how many file descriptors are open."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Slope(NamedTuple):
    """A straight line through samples: its slope, and the confidence interval (95 %) around it."""

    slope: float
    uncertainty: float

    @property
    def is_zero(self) -> bool:
        """Whether it cannot be told from a level line."""
        return abs(self.slope) <= self.uncertainty

    def rises_by(self, least: float) -> bool:
        """Whether it surely rises by more than that."""
        return self.slope - self.uncertainty > least


def slope_of(samples: Sequence[tuple[float, float]]) -> Slope | None:
    """Return the line of least squares through the samples (x, y); None: there are fewer than three."""
    count = len(samples)
    if count < 3:
        return None
    x_mean = math.fsum(x for x, _ in samples) / count
    y_mean = math.fsum(y for _, y in samples) / count
    spread = math.fsum((x - x_mean) ** 2 for x, _ in samples)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in samples) / spread
    rest = math.fsum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in samples)
    t = _T[max(known for known in _T if known <= count - 2)]
    return Slope(slope, t * math.sqrt(rest / (count - 2) / spread))
