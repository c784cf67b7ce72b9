# SPDX-License-Identifier: Apache-2.0
"""PixPro's pixel propagation: every pixel takes over from the pixels that look like it."""

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch
from medaccel.ops._arguments import check_floating, learnt, number
from medaccel.ops._transforms import host_values
from medaccel.ops._views import check_devices
from medaccel.ops.pixel_contrast.op import triton_problem
from medaccel.ops.propagation import op, reference

_NAME = "pixel_propagation"


def unsupported(features: Tensor, values: Tensor | None = None) -> str | None:
    """Says in a sentence why no kernel serves `features` and (if they are given) `values`; returns None if one
    does."""
    if features.device.type == "cpu":
        return _native.cpu_problem
    if features.device.type == "cuda":
        other = features if values is None else values
        dtype = other.dtype if other.dtype == torch.float64 else features.dtype
        return triton_problem(features.device.index, dtype, max(features.shape[-1], other.shape[-1]))
    return f"{_NAME} has no kernel for device {features.device.type!r}"


def pixel_propagation(features: Tensor, values: Tensor, *, power: float | Tensor = 2.0) -> Tensor:
    """Computes y_i = Σ_j max(cos(features_i, features_j), 0)^power · values_j, without an N × N tensor, even
    backward.

    Args:
        features: (B, N, C), floating point; normalised inside. A zero vector is like nothing and gets no gradient.
        values: (B, N, D), the values to propagate: in PixPro a 1 × 1 convolution of the features. Not normalised.
        power: a number of at least 1: how much the most similar are preferred. A tensor of one element that requires
            grad gets one,
            in plain PyTorch, whose memory is quadratic in the pixels.

    Returns:
        (B, N, D) in the dtype of `values`, computed in fp32 (fp64 for fp64). Same bits whatever the number of
        threads, gradients included. On a GPU, features and values that are both bf16 or both fp16 are multiplied as
        such and summed in fp32. A NaN in a pixel reaches all pixels of its sample.

    Raises:
        TypeError: a dtype makes no sense.
        ValueError: a shape, power or device makes no sense.

    Source: Xie et al., "Propagate Yourself", CVPR 2021, eq. 3-4.

    >>> import torch, medaccel
    >>> medaccel.ops.pixel_propagation(torch.randn(1, 216, 32), torch.randn(1, 216, 8)).shape
    torch.Size([1, 216, 8])
    """
    check_floating(_NAME, features=features, values=values)
    if features.dim() != 3 or features.shape[2] == 0:
        raise ValueError(f"{_NAME}: features has shape {tuple(features.shape)}; expected (B, N, C) with C >= 1")
    if values.dim() != 3 or values.shape[:2] != features.shape[:2]:
        expected = f"({features.shape[0]}, {features.shape[1]}, D)"
        raise ValueError(f"{_NAME}: values has shape {tuple(values.shape)}; expected {expected}, a row per pixel")
    check_devices(_NAME, "features", features=features, values=values)
    exponent = _check_power(power)
    if (
        isinstance(exponent, float)
        and _dispatch.kernel_serves(features, values)
        and unsupported(features, values) is None
    ):
        propagated: Tensor = torch.ops.medaccel.pixel_propagation(features, values, exponent)
        return propagated
    dtype = op.compute_dtype(features, values)
    return reference.pixel_propagation(features.to(dtype), values.to(dtype), exponent).to(values.dtype)


def _check_power(power: object) -> float | Tensor:
    """Returns the power as a number or, if a gradient by it is needed, as the scalar tensor that it is."""
    if isinstance(power, Tensor) and learnt(power) and power.numel() == 1:
        known = host_values(power)
        values = [] if known is None else known.flatten().tolist()
        exponent: float | Tensor = power.reshape(())
    else:
        exponent = number(_NAME, "power", power)
        values = [exponent]
    for value in values:
        if not 1 <= value <= torch.finfo(torch.float32).max:
            raise ValueError(f"{_NAME}: power is {value}; expected a finite number of at least 1")
    return exponent
