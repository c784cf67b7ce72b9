# SPDX-License-Identifier: Apache-2.0
"""Calls instance norm's CPU kernels."""

import math

import torch
from torch import Tensor

from medaccel._native import DTYPES, address, cpu_module


def strided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns `tensor`'s values with the strides of `torch.empty_like(like)`: itself if it has them already."""
    if tensor.stride() == like.stride():  # `tensor` is dense, so `like` is
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _dense(tensor: Tensor, channels_last: bool) -> Tensor:
    """Returns (B, C, *spatial) dense in one of two orders: as torch.contiguous gives it, or with the channels
    last."""
    if not channels_last:
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def _norm_settings(input: Tensor, channels_last: bool, eps: float, slope: float | None) -> tuple[object, ...]:
    batch, channels, *spatial = input.shape
    return (
        DTYPES[input.dtype], batch, channels, math.prod(spatial), channels_last, eps, slope is not None,
        0.0 if slope is None else slope, torch.get_num_threads(),
    )  # fmt: skip


def instance_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    negative_slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the native norm on a float32 or float64 CPU tensor (B, C, *spatial); the others have the same dtype.

    It returns the output, channels last if the input is and contiguous otherwise, and mean and 1/σ, (B, C).
    """
    cpu = cpu_module()
    last = _channels_last(input)
    source, added = _dense(input, last), None if residual is None else _dense(residual, last)
    w, b = (None if t is None else t.contiguous() for t in (weight, bias))
    output = torch.empty_like(source)
    mean, rstd = input.new_empty(input.shape[:2]), input.new_empty(input.shape[:2])
    if source.numel() > 0:
        cpu.instance_norm_forward(
            source.data_ptr(), address(w), address(b), address(added), output.data_ptr(), mean.data_ptr(),
            rstd.data_ptr(), *_norm_settings(source, last, eps, negative_slope),
        )  # fmt: skip
    else:
        mean.zero_(), rstd.zero_()
    return output, mean, rstd


def instance_norm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    negative_slope: float | None,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients to input and, where needed, to weight, bias and residual; csrc's `Sign` explains
    `signs`."""
    cpu = cpu_module()
    last = _channels_last(input)
    source, g = _dense(input, last), _dense(grad, last)
    known = None if signs is None else _dense(signs, last)
    w, b = (None if t is None else t.contiguous() for t in (weight, bias))
    m, r = mean.contiguous(), rstd.contiguous()
    grad_input = torch.empty_like(source)
    grad_weight, grad_bias = (source.new_zeros(source.shape[1]) if need_affine else None for _ in range(2))
    grad_residual = torch.empty_like(source) if need_residual else None
    kind = 0 if signs is None else 1 if negative_slope is not None and negative_slope >= 0 else 2
    if source.numel() > 0:
        cpu.instance_norm_backward(
            g.data_ptr(), source.data_ptr(), address(w), address(b), address(known), kind, m.data_ptr(),
            r.data_ptr(), grad_input.data_ptr(), address(grad_weight), address(grad_bias), address(grad_residual),
            *_norm_settings(source, last, 0.0, negative_slope),
        )  # fmt: skip
    return grad_input, grad_weight, grad_bias, grad_residual
