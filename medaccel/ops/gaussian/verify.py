# SPDX-License-Identifier: Apache-2.0
"""Checks and times the Gaussian filter for `medaccel verify`."""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops.gaussian import gaussian_filter, reference, unsupported
from medaccel.ops.gaussian.cases import MODES, PRODUCTION, named

_NAMES = (
    *("signal", "image", "volume", "several_tiles", "size_one_axes", "radius_beyond_volume", "empty_batch"),
    *("normalized", "channels_last"),
)
_CASES = {f"{name}, {mode}": (named(name), mode) for name, mode in itertools.product(_NAMES, MODES)}
# σ is a number on the host here; in the others a tensor on the device, which gets a gradient.
_ON_HOST = {f"{name}, numbers": (named(name), "reflect") for name in ("signal", "volume", "several_tiles")}
_LARGE = {"production": (PRODUCTION, "nearest")}


def work(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Work:
    """Returns one filtering: the filtered volume and the gradients to input and σ."""
    case, mode = (_CASES | _ON_HOST | _LARGE)[name]
    x, grad = (case.input(dtype, seed).to(device) for seed in (0, 1))
    sigma = torch.tensor(case.sigma, dtype=torch.float64, device=device, requires_grad=True)

    def forward(x: Tensor, sigma: Tensor | tuple[float, ...] = case.sigma) -> Tensor:
        return gaussian_filter(x, sigma, mode=mode, **case.options)

    sizes = (1.0, 1.0, float(grad.double().norm() * x.double().norm()))
    others = () if name in _ON_HOST else (sigma,)
    parts = ("gaussian_filter", name, unsupported(x), forward, [x], sizes[: 2 + len(others)])
    return _checks.Work(*parts, grads=[grad], others=others)


def time_filter(device: torch.device, sigma: float) -> _checks.Speed:
    """Times filtering a volume in fp32, beside one convolution per axis and MONAI's layer."""
    size = 96 if device.type == "cpu" else 256
    x = torch.rand(1, 1, size, size, size, device=device)
    taps = reference.taps(torch.tensor(sigma), 4.0, "erf", False).to(x)
    radius = len(taps) // 2

    def convolutions() -> Tensor:
        y = x
        for axis in range(3):
            kernel = taps.reshape([1, 1, *(-1 if a == axis else 1 for a in range(3))])
            y = torch.nn.functional.conv3d(y, kernel, padding=[radius if a == axis else 0 for a in range(3)])
        return y

    with torch.no_grad():
        ours = _checks.median_ms(lambda: gaussian_filter(x, sigma), device)
        plain = _checks.median_ms(convolutions, device)
        layer = _monai_layer(sigma)
        monai = None if layer is None else _checks.median_ms(functools.partial(layer.to(device), x), device)
        copy = _checks.copy_ms(x)
    case = f"{size}³, σ = {sigma:g}, fp32"
    return _checks.Speed("gaussian_filter", str(device), case, ours, plain, monai, "copy", copy / ours)


def _monai_layer(sigma: float) -> torch.nn.Module | None:
    """Returns MONAI's layer, or None if MONAI isn't installed."""
    try:
        from monai.networks.layers import GaussianFilter
    except ImportError:
        return None
    layer: torch.nn.Module = GaussianFilter(3, sigma)
    return layer


def speeds(device: torch.device) -> Iterator[_checks.Speed]:
    """Yields the speeds at a small, a medium and a large σ."""
    return (time_filter(device, sigma) for sigma in (1.0, 2.0, 4.0))


VERIFIER = _checks.Verifier((*_CASES, *_ON_HOST), work, speeds, "production")
