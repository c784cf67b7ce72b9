# SPDX-License-Identifier: Apache-2.0
"""`medaccel verify`: every kernel against its reference on the devices of this machine, errors and speed.

What CI can't do for a GPU, it does on the user's: numbers on the hardware, then speed against plain PyTorch (and
MONAI, where it is installed) and the share of a copy's bandwidth. It needs torch, numpy and the built modules,
nothing else: ``python -m medaccel.verify`` runs in a bare container (tools/build_in_place builds there). Its JSON
belongs into a bug report.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from medaccel._doctor import doctor
from medaccel.ops import gaussian_filter, use_reference
from medaccel.ops.gaussian import reference, unsupported

# Allowed beyond twice plain PyTorch's error, relative to the size of what is summed up.
_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
_SHAPES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "signal": ((2, 3, 37), (1.3,)),
    "image": ((2, 2, 19, 26), (0.8, 2.0)),
    "volume": ((1, 2, 11, 14, 17), (1.0, 2.0, 0.6)),
    "several tiles": ((1, 1, 6, 35, 70), (2.0, 2.0, 2.0)),
    "size-one axes": ((2, 1, 1, 9, 1), (2.0, 2.0, 2.0)),
    "radius beyond the volume": ((1, 1, 5, 6, 7), (4.0, 9.0, 6.0)),
    "empty": ((0, 1, 4, 5, 6), (1.0, 1.0, 1.0)),
}
_MODES = ("constant", "reflect", "nearest", "mirror", "wrap")


@dataclass(frozen=True)
class Check:
    """One comparison: the worst error of output and gradients, as a share of what is allowed."""

    op: str
    device: str
    dtype: str
    case: str
    kernel: str  # "kernel", or why the reference served
    share: float  # error / allowed; NaN counts as infinite
    passed: bool


@dataclass(frozen=True)
class Speed:
    """Medians in ms, MONAI's where it is installed; `bandwidth_share`: 2 × the volume over the time, as a copy's."""

    op: str
    device: str
    case: str
    kernel_ms: float
    pytorch_ms: float
    monai_ms: float | None
    bandwidth_share: float


def _peer(milliseconds: float | None, kernel_ms: float) -> str:
    """A peer's time, and how many times the kernel's that is."""
    if milliseconds is None:
        return f"{'not here':>19}"
    return f"{milliseconds:>8.2f} ms{milliseconds / kernel_ms:>7.1f}×"


@dataclass
class Verification:
    """The outcome; `str()` prints it, `json()` is for a bug report."""

    machine: list[tuple[str, str]]
    checks: list[Check] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def json(self) -> str:
        content = {
            "machine": dict(self.machine),
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "speeds": [asdict(speed) for speed in self.speeds],
        }
        return json.dumps(content, indent=1) + "\n"

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine] + [""]
        lines.append(
            f"{'op':<17}{'device':<8}{'dtype':<10}{'cases':>6}{'failed':>8}{'worst error / allowed':>23}  served by"
        )
        key = lambda c: (c.op, c.device, c.dtype, c.kernel)  # noqa: E731
        for (op, device, dtype, kernel), group in itertools.groupby(sorted(self.checks, key=key), key):
            checks = list(group)
            failed = sum(not c.passed for c in checks)
            worst = max(c.share for c in checks)
            lines.append(f"{op:<17}{device:<8}{dtype:<10}{len(checks):>6}{failed:>8}{worst:>23.2f}  {kernel}")
        lines += [f"FAILED {c.op} {c.device} {c.dtype} {c.case}: {c.share:.3g}" for c in self.checks if not c.passed]
        lines += [
            "",
            f"{'op':<17}{'device':<8}{'case':<24}{'kernel':>11}{'PyTorch':>11}{'ratio':>8}{'MONAI':>11}{'ratio':>8}"
            f"{'of copy bandwidth':>19}",
        ]
        for s in self.speeds:
            lines.append(
                f"{s.op:<17}{s.device:<8}{s.case:<24}{s.kernel_ms:>8.2f} ms{_peer(s.pytorch_ms, s.kernel_ms)}"
                f"{_peer(s.monai_ms, s.kernel_ms)}{100 * s.bandwidth_share:>18.0f}%"
            )
        lines += ["", "all held" if self.passed else "SOME KERNELS GIVE WRONG NUMBERS HERE: please report the JSON"]
        return "\n".join(lines)


def verify(*, devices: list[str] | None = None, speed: bool = True) -> Verification:
    """Runs everything on the devices given, by default the CPU and each GPU that torch sees."""
    names = devices or ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    outcome = Verification(doctor().facts)
    for name in names:
        device = torch.device(name)
        for dtype, case, mode in itertools.product(_FLOOR, _SHAPES, _MODES):
            outcome.checks.append(_check_gaussian(device, dtype, case, mode))
        if speed:
            outcome.speeds += [_time_gaussian(device, sigma) for sigma in (1.0, 2.0, 4.0)]
    return outcome


def _gradients(x: Tensor, sigma: Tensor, grad: Tensor, mode: str) -> list[Tensor]:
    x, sigma = x.detach().requires_grad_(), sigma.detach().requires_grad_()
    y = gaussian_filter(x, sigma, mode=mode)
    return [y.detach(), *torch.autograd.grad(y, (x, sigma), grad.to(y), materialize_grads=True)]


def _check_gaussian(device: torch.device, dtype: torch.dtype, case: str, mode: str) -> Check:
    shape, sigmas = _SHAPES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    sigma = torch.tensor(sigmas, dtype=torch.float64, device=device)
    with use_reference():
        truth = _gradients(x.cpu().double(), sigma.cpu(), grad.cpu().double(), mode)
        plain = _gradients(x, sigma, grad, mode)
    ours = _gradients(x, sigma, grad, mode)
    sizes = (1.0, 1.0, float(grad.double().norm() * x.double().norm()))
    share = 0.0
    for actual, same, exact, size in zip(ours, plain, truth, sizes, strict=True):
        if exact.numel() == 0:
            continue
        error = float((actual.cpu().double() - exact).abs().max())
        largest = float(exact.abs().max())
        allowed = 2 * float((same.cpu().double() - exact).abs().max()) + _FLOOR[dtype] * max(largest, size)
        if error != 0:  # NaN included
            share = max(share, error / allowed if error == error and allowed > 0 else float("inf"))
    name = str(dtype).removeprefix("torch.")
    served = "its kernel" if unsupported(x) is None else f"plain PyTorch: {unsupported(x)}"
    return Check("gaussian_filter", str(device), name, f"{case}, {mode}", served, share, share <= 1)


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
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


def _time_gaussian(device: torch.device, sigma: float) -> Speed:
    size = 96 if device.type == "cpu" else 256
    x = torch.rand(1, 1, size, size, size, device=device)
    taps = reference.taps(torch.tensor(sigma), 4.0, "erf", False).to(x)
    radius = len(taps) // 2

    def convolutions() -> Tensor:  # a convolution an axis
        y = x
        for axis in range(3):
            kernel = taps.reshape([1, 1, *(-1 if a == axis else 1 for a in range(3))])
            y = torch.nn.functional.conv3d(y, kernel, padding=[radius if a == axis else 0 for a in range(3)])
        return y

    with torch.no_grad():
        ours = _median_ms(lambda: gaussian_filter(x, sigma), device)
        plain = _median_ms(convolutions, device)
        layer = _monai_gaussian(sigma)
        monai = None if layer is None else _median_ms(functools.partial(layer.to(device), x), device)
        target = torch.empty_like(x)
        copy = _median_ms(lambda: target.copy_(x), device)
    return Speed("gaussian_filter", str(device), f"{size}³, σ = {sigma:g}, fp32", ours, plain, monai, copy / ours)


def _monai_gaussian(sigma: float) -> torch.nn.Module | None:
    """MONAI's layer, or None where MONAI isn't installed."""
    try:
        from monai.networks.layers import GaussianFilter
    except ImportError:
        return None
    layer: torch.nn.Module = GaussianFilter(3, sigma)
    return layer


if __name__ == "__main__":
    result = verify()
    print(result)
    sys.exit(0 if result.passed else 1)
