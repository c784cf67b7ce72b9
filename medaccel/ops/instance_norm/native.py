# SPDX-License-Identifier: Apache-2.0
"""Calls instance norm's kernels, CPU and GPU."""

import math

import torch
from torch import Tensor

from medaccel._native import DTYPES, GPU_DTYPES, address, cpu_module, gpu_module


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


# --- GPU ------------------------------------------------------------------------------------------------------
# A slice of so many times its own channels is read as it lies. A concatenation of two maps has twice as many; within
# few voxels of a much wider one, a copy is no loss.
_WIDEST = 8


def _gpu_problem(input: Tensor, channels_last: bool) -> tuple[int, int, int, int, bool]:
    batch, channels, *spatial = input.shape
    return GPU_DTYPES[input.dtype], batch, channels, math.prod(spatial), channels_last


def _strides(grad: Tensor, channels_last: bool) -> tuple[int, int] | None:
    """Returns the strides of a sample and of a voxel (channels last) or channel; None if the kernel needs a copy."""
    batch, channels, *spatial = grad.shape
    step = pitch = 1
    if channels_last:
        if channels != 1 and grad.stride(1) != 1:
            return None
        # An axis of size 1 has a stride that says nothing.
        steps = [s for n, s in zip(reversed(spatial), reversed(grad.stride()[2:]), strict=True) if n != 1]
        step = pitch = steps[0] if steps else channels
        if not channels <= pitch <= _WIDEST * channels:
            return None
    for size, stride in zip(reversed(spatial), reversed(grad.stride()[2:]), strict=True):
        if size != 1 and stride != step:
            return None
        step *= size
    if not channels_last:
        pitch = step if channels == 1 else grad.stride(1)
    sample = 0 if batch == 1 else grad.stride(0)
    return (sample, pitch) if pitch > 0 and (batch == 1 or sample > 0) else None


def instance_norm_forward_gpu(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    negative_slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Does the work of `instance_norm_forward` on a GPU, for input and residual of one floating dtype.

    weight, bias, mean and 1/σ are float32, beside a float64 input float64.
    """
    module, device, stream = gpu_module(input)
    last = _channels_last(input)
    source, added = _dense(input, last), None if residual is None else _dense(residual, last)
    w, b = (None if t is None else t.contiguous() for t in (weight, bias))
    output = torch.empty_like(source)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    mean, rstd = (input.new_empty(input.shape[:2], dtype=compute) for _ in range(2))
    if source.numel() == 0:
        return output, mean.zero_(), rstd.zero_()
    problem = _gpu_problem(source, last)
    work = source.new_empty(module.instance_norm_bytes(False, *problem), dtype=torch.uint8)
    module.instance_norm_forward(
        source.data_ptr(), address(w), address(b), address(added), output.data_ptr(), mean.data_ptr(),
        rstd.data_ptr(), work.data_ptr(), *problem, eps, negative_slope is not None, negative_slope or 0.0, device,
        stream,
    )  # fmt: skip
    return output, mean, rstd


def instance_norm_backward_gpu(
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
    """Does the work of `instance_norm_backward` on a GPU, for gradient, input and signs of one floating dtype.

    A gradient that is a slice of a larger map's channels, as after a concatenation, is read as it lies.
    """
    module, device, stream = gpu_module(input)
    last = _channels_last(input)
    source, known = _dense(input, last), None if signs is None else _dense(signs, last)
    g, strides = grad, _strides(grad, last)
    if strides is None:
        g = _dense(grad, last)
        channels, voxels = source.shape[1], math.prod(source.shape[2:])
        strides = (channels * voxels, channels if last else voxels)
    w, b = (None if t is None else t.contiguous() for t in (weight, bias))
    m, r = mean.contiguous(), rstd.contiguous()
    grad_input = torch.empty_like(source)
    grad_weight, grad_bias = (m.new_empty(source.shape[1]) if need_affine else None for _ in range(2))
    grad_residual = torch.empty_like(source) if need_residual else None
    if source.numel() == 0:
        for t in (grad_weight, grad_bias):
            if t is not None:
                t.zero_()
        return grad_input, grad_weight, grad_bias, grad_residual
    kind = 0 if signs is None else 1 if negative_slope is not None and negative_slope >= 0 else 2
    problem = _gpu_problem(source, last)
    work = source.new_empty(module.instance_norm_bytes(True, *problem), dtype=torch.uint8)
    module.instance_norm_backward(
        g.data_ptr(), *strides, source.data_ptr(), address(w), address(b), address(known), kind, m.data_ptr(),
        r.data_ptr(), grad_input.data_ptr(), address(grad_weight), address(grad_bias), address(grad_residual),
        work.data_ptr(), *problem, 0.0, negative_slope is not None, negative_slope or 0.0, device, stream,
    )  # fmt: skip
    return grad_input, grad_weight, grad_bias, grad_residual
