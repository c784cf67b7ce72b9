# SPDX-License-Identifier: Apache-2.0
"""Checks and times a kernel, for `medaccel verify` and the tests.

The 2× rule says: against the reference in fp64, a kernel's error is at most twice that of plain PyTorch in the
kernel's own precision, plus a floor for the rounding of the result itself.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medaccel.ops._dispatch import use_reference

# So much is allowed beyond twice plain PyTorch's error, relative to the size of the summed terms.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


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
    """Says how `medaccel verify` checks one op, `check(device, dtype, case)` for each case, and how it times it."""

    cases: Sequence[str]
    check: Callable[[torch.device, torch.dtype, str], Check]
    speeds: Callable[[torch.device], Iterable[Speed]]

    def checks(self, device: torch.device) -> Iterator[Check]:
        """Yields the check of every case in every dtype."""
        return (self.check(device, dtype, case) for dtype in FLOOR for case in self.cases)


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Returns the largest |actual − truth|; infinite if only one of the two is NaN."""
    a, t = actual.detach().cpu().double(), truth.detach().cpu().double()
    assert a.shape == t.shape, f"shapes differ: {tuple(a.shape)} and {tuple(t.shape)}"
    if a.numel() == 0:
        return 0.0
    error = (a - t).abs()
    both, either = a.isnan() & t.isnan(), a.isnan() | t.isnan()
    error = torch.where(either, torch.inf, error)
    return float(torch.where(both | (a == t), 0.0, error).max())


def compare(
    op: str,
    case: str,
    reason: str | None,
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    sizes: Sequence[float],
) -> Check:
    """Holds the op to the 2× rule on one case.

    Args:
        op: the public function's name.
        case: its name, for the report.
        reason: the reason why no kernel serves the tensors; None if one does.
        run: maps the tensors to the op's outputs and gradients; it makes all else on the first tensor's device.
        tensors: the tensors that have the kernel's precision; the fp64 reference gets them on the CPU.
        sizes: sizes of the summed terms, one per result; the result's own largest value counts if it is larger.
    """
    with use_reference():
        truth = run([t.cpu().double() for t in tensors])
        plain = run(tensors)
    share = 0.0
    for actual, same, exact, size in zip(run(tensors), plain, truth, sizes, strict=True):
        if exact.numel() == 0:
            continue
        error = max_error(actual, exact)
        allowed = 2 * max_error(same, exact) + FLOOR[tensors[0].dtype] * max(float(exact.abs().max()), size)
        if error != 0:
            share = max(share, error / allowed if 0 < allowed < torch.inf else torch.inf)
    served = "its kernel" if reason is None else f"plain PyTorch: {reason}"
    x = tensors[0]
    return Check(op, str(x.device), dtype_name(x.dtype), case, served, share, share <= 1)


def dtype_name(dtype: torch.dtype) -> str:
    """Writes torch.float32 as "float32"."""
    return str(dtype).removeprefix("torch.")


# --- times -------------------------------------------------------------------------------------------------------
def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Returns the median of seven calls after one that is not counted, each waited for."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    finish()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        finish()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[3]


def copy_ms(x: Tensor) -> float:
    """Returns the time of one copy: `x` is read once, and as much is written."""
    target = torch.empty_like(x)
    return median_ms(lambda: target.copy_(x), x.device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the operations per ms of torch's own matrix product."""
    a = torch.rand(1024, 1024, device=device, dtype=dtype)
    return 2 * 1024**3 / median_ms(lambda: a @ a, device)
