# SPDX-License-Identifier: Apache-2.0
"""`medaccel verify`: every kernel against its reference on the devices of this machine, errors and speed.

What CI can't do for a GPU, it does on the user's: numbers on the hardware, then speed against plain PyTorch (and
MONAI, where it is installed) and the share of the machine's ceiling: a copy's bandwidth, or a matrix product's rate.
It needs torch, numpy and the built modules, nothing else: ``python -m medaccel.verify`` runs in a bare container
(tools/build_in_place builds there). Its JSON belongs into a bug report.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from medaccel._doctor import doctor
from medaccel.ops import (
    diffusion_step,
    gaussian,
    gaussian_filter,
    instance_norm,
    instance_norm_act,
    pixel_contrast,
    pixel_contrastive_loss,
    shifted_window_attention,
    use_reference,
    window_attention,
)
from medaccel.ops.diffusion_step import unsupported as diffusion_step_unsupported

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


# Shape, channels last, slope.
_NORMS = {
    "volume": ((2, 5, 9, 10, 11), False, 0.01),
    "channels last": ((2, 12, 9, 10, 11), True, 0.01),
    "negative slope": ((1, 3, 17, 18), True, -0.5),
}


@dataclass(frozen=True)
class _Windows:
    """One call of the attention on a batch of 2."""

    sizes: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    heads: int
    head_dim: int
    dropout_p: float = 0.0


_WINDOWS = {
    "Swin UNETR's window": _Windows((9, 14, 8), (7, 7, 7), (3, 3, 3), 3, 8),
    "not shifted": _Windows((8, 8, 8), (4, 4, 4), (0, 0, 0), 2, 16),
    "padding fills a region": _Windows((5, 9, 6), (4, 4, 4), (2, 2, 2), 2, 32),
    "image": _Windows((16, 20), (7, 7), (3, 3), 1, 64),
    "odd head dimension": _Windows((6, 7, 5), (3, 3, 3), (1, 1, 1), 2, 5),
    "dropout": _Windows((6, 7, 5), (4, 4, 4), (2, 2, 2), 2, 8, 0.3),
}

# Pixels of the two views, channels, radius, temperature; coordinates fill a cube of side 1.
_VIEWS: dict[str, tuple[tuple[int, int], int, float, float]] = {
    "two maps": ((343, 343), 64, 0.2, 0.3),
    "a finer one": ((100, 517), 37, 0.15, 0.1),
    "few positives": ((300, 200), 128, 0.03, 0.3),
    "no positive": ((40, 50), 16, 1e-6, 0.3),
}


_STEP = {"a": 1.25, "b": -0.75, "c": 0.3, "d": 0.65, "e": 0.1, "s": 0.4, "seed": 20200619, "offset": 2**33 + 5}
_STEPS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "noise": ((2, 1, 9, 10, 11), {}),
    "clipped": ((1, 2, 17, 16, 19), {"clip": (-1.0, 1.0)}),
    "no noise": ((1, 1, 16, 16, 16), {"s": 0.0}),
    "multistep": ((2, 1, 5, 6, 7), {"f": -0.2, "s": 0.0}),
    "mask and guide": ((3, 1, 8, 7, 9), {"mask": True, "clip": (-1.0, 1.0)}),
    "empty": ((0, 1, 4, 5, 6), {}),
}


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
    """Medians in ms, MONAI's where it is installed.

    `ceiling_share`: how much of the device's measured ceiling the kernel reaches: of a copy's bandwidth, counting the
    input and the output once, or of a matrix product's rate, counting all pairs of a window
    (the kernel leaves out those that the shift keeps apart: more than 100 % is possible).
    """

    op: str
    device: str
    case: str
    kernel_ms: float
    pytorch_ms: float
    monai_ms: float | None
    ceiling: str
    ceiling_share: float


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
            f"{'op':<26}{'device':<8}{'dtype':<10}{'cases':>6}{'failed':>8}{'worst error / allowed':>23}  served by"
        )
        key = lambda c: (c.op, c.device, c.dtype, c.kernel)  # noqa: E731
        for (op, device, dtype, kernel), group in itertools.groupby(sorted(self.checks, key=key), key):
            checks = list(group)
            failed = sum(not c.passed for c in checks)
            worst = max(c.share for c in checks)
            lines.append(f"{op:<26}{device:<8}{dtype:<10}{len(checks):>6}{failed:>8}{worst:>23.2f}  {kernel}")
        lines += [f"FAILED {c.op} {c.device} {c.dtype} {c.case}: {c.share:.3g}" for c in self.checks if not c.passed]
        lines += [
            "",
            f"{'op':<26}{'device':<8}{'case':<36}{'kernel':>11}{'PyTorch':>11}{'ratio':>8}{'MONAI':>11}{'ratio':>8}"
            f"{'of ceiling':>18}",
        ]
        for s in self.speeds:
            lines.append(
                f"{s.op:<26}{s.device:<8}{s.case:<36}{s.kernel_ms:>8.2f} ms{_peer(s.pytorch_ms, s.kernel_ms)}"
                f"{_peer(s.monai_ms, s.kernel_ms)}{100 * s.ceiling_share:>5.0f}% of {s.ceiling}"
            )
        lines += ["", "all held" if self.passed else "SOME KERNELS GIVE WRONG NUMBERS HERE: please report the JSON"]
        return "\n".join(lines)


def check_devices(names: Sequence[str]) -> None:
    """Raises ValueError unless all are devices that kernels are for and that torch sees here."""
    if not names:
        raise ValueError("devices is empty; expected some, such as cpu or cuda:0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    for name in names:
        try:
            device = torch.device(name)
        except (RuntimeError, TypeError):
            device = None
        if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise ValueError(f"devices names {name!r}, for which there are no kernels; expected some of {there}")
        if device.type == "cuda" and (device.index or 0) >= count:
            seen = f"torch sees {count} GPUs here" if count else "torch sees no GPU here"
            raise ValueError(f"devices names {name!r}, but {seen}; expected some of {there}")


def verify(*, devices: list[str] | None = None, speed: bool = True) -> Verification:
    """Runs everything on the devices given, by default the CPU and each GPU that torch sees.

    Raises:
        ValueError: as `check_devices`.
    """
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if devices is None else devices
    check_devices(names)
    outcome = Verification(doctor().facts)
    for name in names:
        device = torch.device(name)
        for dtype, case, mode in itertools.product(_FLOOR, _SHAPES, _MODES):
            outcome.checks.append(_check_gaussian(device, dtype, case, mode))
        for dtype, case in itertools.product(_FLOOR, _WINDOWS):
            outcome.checks.append(_check_attention(device, dtype, case))
        for dtype, case in itertools.product(_FLOOR, _NORMS):
            outcome.checks.append(_check_norm(device, dtype, case))
        for dtype, case in itertools.product(_FLOOR, _STEPS):
            outcome.checks.append(_check_step(device, dtype, case))
        for dtype, case in itertools.product(_FLOOR, _VIEWS):
            outcome.checks.append(_check_contrast(device, dtype, case))
        if speed:
            outcome.speeds += [_time_gaussian(device, sigma) for sigma in (1.0, 2.0, 4.0)]
            outcome.speeds += [_time_attention(device, head_dim, training) for head_dim, training in _TIMED_HEADS]
            outcome.speeds += [_time_step(device, s) for s in (0.0, 0.4)]
            outcome.speeds.append(_time_contrast(device))
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
    return _judge("gaussian_filter", x, f"{case}, {mode}", gaussian.unsupported(x), (ours, plain, truth), sizes)


def _judge(
    op: str,
    x: Tensor,
    case: str,
    reason: str | None,
    results: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    sizes: Sequence[float],
) -> Check:
    """The 2× rule on (ours, plain PyTorch in the same precision, fp64 reference); sizes: of what is summed up."""
    share = 0.0
    for actual, same, exact, size in zip(*results, sizes, strict=True):
        if exact.numel() == 0:
            continue
        error = float((actual.cpu().double() - exact).abs().max())
        largest = float(exact.abs().max())
        allowed = 2 * float((same.cpu().double() - exact).abs().max()) + _FLOOR[x.dtype] * max(largest, size)
        if error != 0:  # NaN included
            share = max(share, error / allowed if error == error and allowed > 0 else float("inf"))
    served = "its kernel" if reason is None else f"plain PyTorch: {reason}"
    name = str(x.dtype).removeprefix("torch.")
    return Check(op, str(x.device), name, case, served, share, share <= 1)


def _attention_inputs(c: _Windows, device: torch.device, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """qkv, bias_table, pad_qkv and the output's gradient."""
    channels, rows = c.heads * c.head_dim, math.prod(2 * w - 1 for w in c.window)
    shapes = ((batch, *c.sizes, 3 * channels), (rows, c.heads), (3 * channels,), (batch, *c.sizes, channels))
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.to(device, dtype) for t in tensors]


def _attention_gradients(c: _Windows, tensors: Sequence[Tensor]) -> list[Tensor]:
    qkv, table, pad = (t.detach().requires_grad_() for t in tensors[:3])
    tokens, rows = math.prod(c.window), len(table)
    index = torch.arange(tokens, device=qkv.device)
    index = (index[:, None] * 7 + index * 3) % rows  # any will do
    seed = torch.tensor(20211011, device=qkv.device)
    options: dict[str, Any] = {"window_size": c.window, "shift_size": c.shift, "dropout_p": c.dropout_p}
    y = shifted_window_attention(qkv, table, index, pad_qkv=pad, dropout_seed=seed, **options)
    wanted = (qkv, table, pad)
    return [y.detach(), *torch.autograd.grad(y, wanted, tensors[3].to(y), materialize_grads=True, allow_unused=True)]


def _check_attention(device: torch.device, dtype: torch.dtype, case: str) -> Check:
    c = _WINDOWS[case]
    tensors = _attention_inputs(c, device, dtype)
    with use_reference():
        truth = _attention_gradients(c, [t.cpu().double() for t in tensors])
        plain = _attention_gradients(c, tensors)
    ours = _attention_gradients(c, tensors)
    # Gradients are sums of terms gradient · value · weight that cancel.
    terms = float(tensors[3].abs().max() * tensors[0].abs().max())
    reason = window_attention.unsupported(tensors[0])
    return _judge(
        "shifted_window_attention", tensors[0], case, reason, (ours, plain, truth), (1.0, terms, terms, terms)
    )


def _check_norm(device: torch.device, dtype: torch.dtype, case: str) -> Check:
    shape, channels_last, slope = _NORMS[case]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3)]
    if channels_last:
        tensors = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in tensors]

    def gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
        x, residual = (t.detach().requires_grad_() for t in tensors[:2])
        y = instance_norm_act(x, residual=residual, negative_slope=slope)
        return [y.detach(), *torch.autograd.grad(y, (x, residual), tensors[2].to(y))]

    with use_reference():
        truth, plain = gradients([t.cpu().double() for t in tensors]), gradients(tensors)
    reason = instance_norm.unsupported(tensors[0])
    return _judge("instance_norm_act", tensors[0], case, reason, (gradients(tensors), plain, truth), (1.0,) * 3)


def _step_gradients(tensors: Sequence[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """tensors: sample, model_output, previous, guide, gradients of x′ and x0."""
    x, m, previous, guide = (t.detach().requires_grad_() for t in tensors[:4])
    o = {"f": 0.0, **options}
    masked = o.pop("mask", False)
    if masked:
        o["guide"] = guide
        o["mask"] = torch.arange(x.numel(), device=x.device).reshape(x.shape) % 3 != 0
    y = diffusion_step(x, m, previous=previous, **o)
    wanted = (x, m, previous, guide)
    grads = torch.autograd.grad(y, wanted, [g.to(x) for g in tensors[4:]], materialize_grads=True, allow_unused=True)
    return [*(t.detach() for t in y), *grads]


def _check_step(device: torch.device, dtype: torch.dtype, case: str) -> Check:
    shape, changes = _STEPS[case]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(6)]
    options = {**_STEP, **changes}
    with use_reference():
        truth = _step_gradients([t.cpu().double() for t in tensors], options)
        plain = _step_gradients(tensors, options)
    ours = _step_gradients(tensors, options)
    reason = diffusion_step_unsupported(tensors[0])
    return _judge("diffusion_step", tensors[0], case, reason, (ours, plain, truth), (1.0,) * 6)


def _contrast_gradients(tensors: Sequence[Tensor], radius: float, temperature: float) -> list[Tensor]:
    query, key = (t.detach().requires_grad_() for t in tensors[:2])
    options: dict[str, Any] = {"radius": radius, "temperature": temperature}
    loss = pixel_contrastive_loss(query, key, *tensors[2:], **options)
    return [loss.detach(), *torch.autograd.grad(loss, (query, key))]


def _check_contrast(device: torch.device, dtype: torch.dtype, case: str) -> Check:
    (queries, keys), channels, radius, temperature = _VIEWS[case]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, n, channels, generator=generator).to(device, dtype) for n in (queries, keys)]
    tensors += [torch.rand(2, n, 3, generator=generator).to(device) for n in (queries, keys)]
    with use_reference():
        truth = _contrast_gradients(
            [*(t.cpu().double() for t in tensors[:2]), *(t.cpu() for t in tensors[2:])], radius, temperature
        )
        plain = _contrast_gradients(tensors, radius, temperature)
    ours = _contrast_gradients(tensors, radius, temperature)
    reason = pixel_contrast.unsupported(tensors[0])
    terms = 1 / (temperature * queries)  # a gradient is a difference of two mean vectors of that size
    results = (ours, plain, truth)
    return _judge("pixel_contrastive_loss", tensors[0], case, reason, results, (1 / temperature, terms, terms))


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
    taps = gaussian.reference.taps(torch.tensor(sigma), 4.0, "erf", False).to(x)
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
    case = f"{size}³, σ = {sigma:g}, fp32"
    return Speed("gaussian_filter", str(device), case, ours, plain, monai, "copy", copy / ours)


def _monai_gaussian(sigma: float) -> torch.nn.Module | None:
    """MONAI's layer, or None where MONAI isn't installed."""
    try:
        from monai.networks.layers import GaussianFilter
    except ImportError:
        return None
    layer: torch.nn.Module = GaussianFilter(3, sigma)
    return layer


_TIMED_HEADS = ((8, False), (8, True), (16, False), (16, True))


def _time_attention(device: torch.device, head_dim: int, training: bool) -> Speed:
    """The first stage of a Swin UNETR, at 48³ input on the CPU and 96³ on a GPU."""
    size, dtype = (24, torch.float32) if device.type == "cpu" else (48, torch.bfloat16)
    c = _Windows((size,) * 3, (7, 7, 7), (3, 3, 3), 3, head_dim)
    tensors = _attention_inputs(c, device, dtype, batch=1)

    def call() -> object:
        if training:
            return _attention_gradients(c, tensors)
        with torch.no_grad():
            qkv, table, pad = tensors[:3]
            index = torch.zeros(343, 343, dtype=torch.int64, device=device)
            return shifted_window_attention(qkv, table, index, pad_qkv=pad, window_size=c.window, shift_size=c.shift)

    ours = _median_ms(call, device)
    with use_reference():
        plain = _median_ms(call, device)
    windows, products = math.ceil(size / 7) ** 3, 7 if training else 2
    operations = 2 * products * windows * c.heads * 343**2 * head_dim
    a = torch.rand(1024, 1024, device=device, dtype=dtype)
    rate = 2 * 1024**3 / _median_ms(lambda: a @ a, device)
    what = "forward + backward" if training else "forward"
    case = f"{size}³, {head_dim}, {what}, {str(dtype).removeprefix('torch.')}"
    name = "shifted_window_attention"
    return Speed(name, str(device), case, ours, plain, None, "matmul", operations / ours / rate)


def _time_step(device: torch.device, s: float) -> Speed:
    """A sampler's step with clip, with its noise (s > 0) or without."""
    size = 96 if device.type == "cpu" else 256
    x, m = (torch.rand(1, 1, size, size, size, device=device) for _ in range(2))
    options: dict[str, Any] = {**_STEP, "s": s, "clip": (-1.0, 1.0)}

    def steps() -> tuple[Tensor, Tensor]:  # as a sampler in PyTorch writes it
        x0 = (1.25 * x - 0.75 * m).clamp(-1, 1)
        y = 0.3 * x0 + 0.65 * x + 0.1 * m
        return (y + s * torch.randn_like(x) if s else y), x0

    with torch.no_grad():
        ours = _median_ms(lambda: diffusion_step(x, m, **options), device)
        plain = _median_ms(steps, device)
        monai = _monai_ddpm(x, m, device) if s else None
        target = torch.empty_like(x)
        copy = _median_ms(lambda: target.copy_(x), device)
    case = f"{size}³, {'with' if s else 'without'} noise, fp32"
    # A copy reads one volume and writes one, a step reads two and writes two.
    return Speed("diffusion_step", str(device), case, ours, plain, monai, "copy", 2 * copy / ours)


def _monai_ddpm(x: Tensor, m: Tensor, device: torch.device) -> float | None:
    """The time of MONAI's DDPM step, or None where MONAI isn't installed."""
    try:
        from monai.networks.schedulers import DDPMScheduler
    except ImportError:
        return None
    scheduler = DDPMScheduler()
    return _median_ms(lambda: scheduler.step(m, 500, x), device)


def _time_contrast(device: torch.device) -> Speed:
    """Two maps of 12³ pixels on the CPU, of 24³ on a GPU; forward + backward."""
    size, dtype = (12, torch.float32) if device.type == "cpu" else (24, torch.bfloat16)
    at = torch.cartesian_prod(*[torch.arange(float(size), device=device)] * 3)[None]
    features = [torch.randn(1, size**3, 64, device=device, dtype=dtype) for _ in range(2)]
    call = functools.partial(_contrast_gradients, [*features, at, at + 0.3], 1.0, 0.3)
    ours = _median_ms(call, device)
    with use_reference():
        plain = _median_ms(call, device)
    a = torch.rand(1024, 1024, device=device, dtype=dtype)
    rate = 2 * 1024**3 / _median_ms(lambda: a @ a, device)
    operations = 4 * 2 * size**6 * 64
    case = f"{size}³ pixels, {str(dtype).removeprefix('torch.')}"
    return Speed("pixel_contrastive_loss", str(device), case, ours, plain, None, "matmul", operations / ours / rate)


if __name__ == "__main__":
    result = verify()
    print(result)
    sys.exit(0 if result.passed else 1)
