# SPDX-License-Identifier: Apache-2.0
"""Checks and times a kernel, for `medaccel verify`, tools/gpu_check and the tests.

The 2× rule says: against the reference in fp64, a kernel's error is at most twice that of plain PyTorch in the
kernel's own precision, plus a floor for the rounding of the result itself. On a GPU a kernel's result must besides
not depend on what was in its memory before, on the stream, or on whether a CUDA graph replays it (`_conditions`).
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medaccel.ops import _conditions
from medaccel.ops._dispatch import use_reference
from medaccel.ops._work import Work as Work

# So much is allowed beyond twice plain PyTorch's error, relative to the size of the summed terms.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# From so many elements on, the fp64 reference runs on the tensors' own device: the CPU would take minutes.
_LARGE = 1 << 20


@dataclass(frozen=True)
class Check:
    """Holds one comparison: the worst error of output and gradients, as a share of the allowed one."""

    op: str
    device: str
    dtype: str
    case: str
    kernel: str  # "its kernel", or the reason why the reference served
    share: float  # error / allowed; NaN counts as infinite
    passed: bool
    fault: str = ""  # the conditions under which the result changes (see `_conditions`), or how the check ended


@dataclass(frozen=True)
class Speed:
    """Holds medians in ms, MONAI's if it is installed.

    `ceiling_share` is the share of the device's measured ceiling that the kernel reaches: a copy's bandwidth,
    counting each input and output once, or a matrix product's rate, counting all pairs of a window or of two views (a
    kernel may leave some out: more than 100 % is possible).
    """

    op: str
    device: str
    case: str
    kernel_ms: float
    pytorch_ms: float
    monai_ms: float | None
    ceiling: str
    ceiling_share: float


@dataclass(frozen=True)
class Verifier:
    """Says how `medaccel verify` checks one op, with `work(device, dtype, case)` of each case, and how it times it.

    `production` names the case that is as large as in practice: tools/gpu_check has it checked on a GPU.
    """

    cases: Sequence[str]
    work: Callable[[torch.device, torch.dtype, str], Work]
    speeds: Callable[[torch.device], Iterable[Speed]]
    production: str

    def check(self, device: torch.device, dtype: torch.dtype, case: str) -> Check:
        """Holds the op to the 2× rule on one case, and on a GPU to the conditions."""
        return compare(self.work(device, dtype, case))

    def checks(self, device: torch.device) -> Iterator[Check]:
        """Yields the check of every case in every dtype."""
        return (self.check(device, dtype, case) for dtype in FLOOR for case in self.cases)


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Returns the largest |actual − truth|; infinite if only one of the two is NaN."""
    a, t = actual.detach().to(truth.device).double(), truth.detach().double()
    assert a.shape == t.shape, f"shapes differ: {tuple(a.shape)} and {tuple(t.shape)}"
    if a.numel() == 0:
        return 0.0
    error = (a - t).abs()
    both, either = a.isnan() & t.isnan(), a.isnan() | t.isnan()
    error = torch.where(either, torch.inf, error)
    return float(torch.where(both | (a == t), 0.0, error).max())


def compare(work: Work, conditions: Iterable[str] | None = None, results: Sequence[Tensor] | None = None) -> Check:
    """Holds one call to the 2× rule; a kernel that passes is held to the conditions too.

    Args:
        work: the call.
        conditions: those of `_conditions.CONDITIONS` that are tried; None: all of them on a GPU, none on the CPU.
        results: those that are judged, if the work was run in another way (compiled, say); None: `work.run()`.
    """
    x = work.tensors[0]
    on_gpu = x.device.type == "cuda"
    apart = on_gpu and sum(t.numel() for t in work.tensors) >= _LARGE
    with use_reference():
        truth = work.to(x.device if apart else torch.device("cpu"), torch.float64).run()
        plain = work.run()
    ours = work.run() if results is None else results
    share = 0.0
    for actual, same, exact, size in zip(ours, plain, truth, work.sizes, strict=True):
        if exact.numel() == 0:
            continue
        error = max_error(actual, exact)
        allowed = 2 * max_error(same, exact) + FLOOR[x.dtype] * max(float(exact.abs().max()), size)
        if error != 0:
            share = max(share, error / allowed if 0 < allowed < torch.inf else torch.inf)
    names = (_conditions.CONDITIONS if on_gpu else ()) if conditions is None else conditions
    # The bits of plain PyTorch may differ from run to run on a GPU: they are not ours to promise.
    faults = _conditions.faults(work, ours, names) if work.reason is None and share <= 1 else []
    served = "its kernel" if work.reason is None else f"plain PyTorch: {work.reason}"
    passed = share <= 1 and not faults
    return Check(work.op, str(x.device), dtype_name(x.dtype), work.case, served, share, passed, "; ".join(faults))


def dtype_name(dtype: torch.dtype) -> str:
    """Writes torch.float32 as "float32"."""
    return str(dtype).removeprefix("torch.")


# --- times -------------------------------------------------------------------------------------------------------
def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Returns the median time of a call, after some that are not counted.

    On a GPU, events on the stream are timed, so that Python and the launches are not, unless they are slower than the
    kernels: 20 calls follow one another without a wait. On the CPU it is the clock, and seven calls.
    """
    if device.type == "cuda":
        return statistics.median(event_times(call, device, 20))
    call()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def event_times(call: Callable[[], object], device: torch.device, count: int, warm: int = 3) -> list[float]:
    """Returns the times in ms of `count` calls on a GPU, measured by events on its current stream."""
    with torch.cuda.device(device):
        for _ in range(warm):
            call()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def copy_ms(x: Tensor) -> float:
    """Returns the time in which a copy reads as many bytes as `x` has, and writes as many.

    On a GPU that follows from the bandwidth of a copy far larger than its caches.
    """
    if x.device.type == "cuda":
        return 2 * x.numel() * x.element_size() / copy_rate(x.device)
    target = torch.empty_like(x)
    return median_ms(lambda: target.copy_(x), x.device)


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Returns the bytes per ms, read and written together, of a GPU's copy of 2 GB (less where memory is short)."""
    free, _ = torch.cuda.mem_get_info(device)
    source = torch.empty(min(2 << 30, free // 4), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device)


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the operations per ms of torch's own matrix product, of 8192³ on a GPU: 1024³ would measure its
    launch."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.rand(size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_ms(lambda: a @ a, device)
