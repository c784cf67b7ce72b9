# SPDX-License-Identifier: Apache-2.0
"""Measures what a piece of work costs: the seconds that it takes, and the most memory that it has at once.

The memory is the growth of the process's resident size from before the work to its peak. Linux keeps that peak; it is
set back before the work (by writing 5 to /proc/self/clear_refs), after the allocator has handed back what it kept
free, so that earlier work leaves nothing that later work could hide in. What a GPU's allocator gained comes on top.
Elsewhere, or where the system forbids it, the memory is unknown (NaN): guesses are not mixed with measurements. The
first work of its kind also pays for the packages that it imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_PEAK_RESIDENT = "5"  # the kernel's word for "set the peak of the resident size back"


@dataclass(frozen=True)
class Cost:
    """Holds the cost of a piece of work: `seconds`, and `memory` in bytes, NaN if it can't be measured."""

    seconds: float
    memory: float


def measured(work: Callable[[], T]) -> tuple[T, Cost]:
    """Does the work, and returns its result and its cost; other threads' work counts too."""
    before = _start()
    on_gpu = _gpu_start()
    start = time.perf_counter()
    result = work()
    gpu = _gpu_peak() - on_gpu  # waits for the GPU
    seconds = time.perf_counter() - start
    memory = math.nan
    if before is not None:
        memory = float(max(_status("VmHWM") - before, 0) + gpu)
    return result, Cost(seconds, memory)


def _start() -> int | None:
    """Sets the peak back and returns the resident size, in bytes; None if the system can't or won't."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text(_PEAK_RESIDENT)
        return _status("VmRSS")
    except (OSError, ValueError):
        return None


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS}: has no {key}")


def _gpu_start() -> int:
    torch = sys.modules.get("torch")  # work that never imported torch has no tensors on a GPU
    if torch is None or not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _gpu_peak() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())
