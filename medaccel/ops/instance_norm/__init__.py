# SPDX-License-Identifier: Apache-2.0
"""Normalises instances together with the next steps of a residual block: the skip connection's sum and a leaky
ReLU."""

import math

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch
from medaccel.ops._arguments import check_floating, finite
from medaccel.ops.instance_norm import op, reference


def unsupported(input: Tensor) -> str | None:
    """Says in a sentence why no kernel serves `input`; returns None if one does."""
    device = input.device
    if device.type == "cpu":
        return _native.cpu_problem
    if device.type == "cuda":
        return _native.gpu_problem(device.index)
    return f"instance_norm_act has no kernel for device {device.type!r}"


def instance_norm_act(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    negative_slope: float | None = None,
) -> Tensor:
    """Computes leaky_relu(instance_norm(input) · weight + bias + residual), in two reads of the input and one write.

    PyTorch's layers read and write the tensor once for each of the three steps, and keep two of the results for the
    backward pass. Here that pass needs the input, each instance's mean and 1/σ, and the sign of the activation's
    input: from the input, or, with a residual, from the output, which the next layer keeps anyway.

    Args:
        input: (B, C, *spatial) with 1-3 spatial axes, floating point. fp32 and fp64 are computed in their own
            precision, bf16 and fp16 in fp32. Contiguous and channels-last tensors are worked on as they lie. fp32
            deviations may be as large as 1e35 (in torch's own layer, variances overflow from 1e19 on).
        weight, bias: (C,), the affine part; None: 1 and 0.
        residual: like `input`, added before the activation; None: nothing.
        eps: number added to the variance.
        negative_slope: slope of the leaky ReLU, any number; 0 is a ReLU. None: no activation.

    Returns:
        Like `input` in shape, dtype and strides (`torch.empty_like`). Same bits whatever the number of threads,
        gradients included. A NaN spreads over its own channel of its own sample.

    Raises:
        TypeError: a tensor is not floating point, or a number is none.
        ValueError: a shape, number or device makes no sense; or there is a single spatial element, whose variance is
            0 (torch's error).

    Differentiable by `input`, `weight`, `bias` and `residual`. Source: Ulyanov et al., "Instance normalization",
    arXiv:1607.08022, as ``torch.nn.InstanceNorm3d`` computes it (biased variance, the instance's own statistics).

    >>> import torch, medaccel
    >>> medaccel.ops.instance_norm_act(torch.randn(1, 8, 16, 16, 16), negative_slope=0.01).shape
    torch.Size([1, 8, 16, 16, 16])
    """
    _check(input, weight, bias, residual)
    if residual is not None and residual.dtype != input.dtype:
        residual = residual.to(input.dtype)  # as an in-place sum would
    slope = None if negative_slope is None else finite("instance_norm_act", "negative_slope", negative_slope)
    added = _check_eps(eps, input)
    tensors = (input, weight, bias, residual)
    if _dispatch.kernel_serves(*tensors) and unsupported(input) is None:
        return op.call(*tensors, added, slope)
    return reference.instance_norm_act(*tensors, added, slope)


def _check_eps(eps: object, input: Tensor) -> float:
    """Returns eps as a number that the arithmetic's dtype holds: with a smaller one, a constant channel would be 0 ·
    ∞."""
    value = finite("instance_norm_act", "eps", eps)
    least = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).tiny
    if value < least:
        raise ValueError(f"instance_norm_act: eps is {eps}; expected a number above 0, at least {least:.3g}")
    return value


def _check(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    name = "instance_norm_act"
    given = {"weight": weight, "bias": bias, "residual": residual}
    check_floating(name, input=input, **{argument: t for argument, t in given.items() if t is not None})
    if not 3 <= input.dim() <= 5:
        raise ValueError(
            f"{name}: input has shape {tuple(input.shape)}; expected (B, C, *spatial) with 1-3 spatial axes"
        )
    if math.prod(input.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {input.shape}")
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (input.shape[1],):
            raise ValueError(f"{name}: {argument} has shape {tuple(tensor.shape)}; expected ({input.shape[1]},)")
    if residual is not None and residual.shape != input.shape:
        raise ValueError(f"{name}: residual has shape {tuple(residual.shape)}; expected {tuple(input.shape)}")
    for argument, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{name}: {argument} is on {tensor.device} and input on {input.device}; expected the same device"
            )
