# SPDX-License-Identifier: Apache-2.0
"""Registers pixel propagation: schema, shapes without data, gradients, kernels per device.

It has no autocast rule, as in pixel_contrast/op.py: sums over so many pixels are computed in fp32.
"""

from typing import Any

import torch
from torch import Tensor

from medaccel.ops._operands import Operands
from medaccel.ops._registration import register_gradients
from medaccel.ops.pixel_contrast.op import compute_dtype
from medaccel.ops.propagation import native

_lib = torch.library.Library("medaccel", "FRAGMENT")
_lib.define("pixel_propagation(Tensor features, Tensor values, float power) -> Tensor")
_lib.define(
    "pixel_propagation_backward(Tensor grad, Tensor features, Tensor values, float power, bool need_features, "
    "bool need_values) -> (Tensor, Tensor)"
)


def _check(name: str, features: Tensor, values: Tensor, power: float) -> Operands:
    """Checks everything that the kernels' memory accesses rely on."""
    operands = Operands(name, "features", features)
    operands.rank("features", features, (3,), "(B, N, C)")
    operands.rank("values", values, (3,), "(B, N, D)")
    operands.tensor("values", values, (*features.shape[:2], values.shape[2]))
    operands.number("power", power, 1.0)
    return operands


def _forward_cpu(features: Tensor, values: Tensor, power: float) -> Tensor:
    _check("pixel_propagation", features, values, power)
    dtype = compute_dtype(features, values)
    return native.pixel_propagation_forward(features.to(dtype), values.to(dtype), power).to(values.dtype)


def _backward_cpu(
    grad: Tensor, features: Tensor, values: Tensor, power: float, need_features: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    _check("pixel_propagation_backward", features, values, power).tensor("grad", grad, values.shape)
    dtype = compute_dtype(features, values)
    grad_features, grad_values = native.pixel_propagation_backward(
        grad.to(dtype), features.to(dtype), values.to(dtype), power, need_features, need_values
    )
    return (
        features.new_empty(0) if grad_features is None else grad_features.to(features.dtype),
        values.new_empty(0) if grad_values is None else grad_values.to(values.dtype),
    )


def _forward_cuda(features: Tensor, values: Tensor, power: float) -> Tensor:
    from medaccel.ops.propagation import triton  # only here: importing Triton takes a second

    _check("pixel_propagation", features, values, power)
    return triton.forward(features, values, power)


def _backward_cuda(
    grad: Tensor, features: Tensor, values: Tensor, power: float, need_features: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    from medaccel.ops.propagation import triton

    _check("pixel_propagation_backward", features, values, power).tensor("grad", grad, values.shape)
    return triton.backward(grad, features, values, power, need_features, need_values)


_lib.impl("pixel_propagation", _forward_cpu, "CPU")
_lib.impl("pixel_propagation_backward", _backward_cpu, "CPU")
_lib.impl("pixel_propagation", _forward_cuda, "CUDA")
_lib.impl("pixel_propagation_backward", _backward_cuda, "CUDA")


@torch.library.register_fake("medaccel::pixel_propagation", lib=_lib)
def _(features: Tensor, values: Tensor, power: float) -> Tensor:
    return values.new_empty(values.shape)


@torch.library.register_fake("medaccel::pixel_propagation_backward", lib=_lib)
def _(
    grad: Tensor, features: Tensor, values: Tensor, power: float, need_features: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if need_features else (0,)),
        values.new_empty(values.shape if need_values else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, values, ctx.power = inputs
    ctx.save_for_backward(features, values)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_features, need_values, _ = ctx.needs_input_grad
    grads = torch.ops.medaccel.pixel_propagation_backward(
        grad, *ctx.saved_tensors, ctx.power, need_features, need_values
    )
    return *(g if need else None for g, need in zip(grads, (need_features, need_values), strict=True)), None


register_gradients(
    _lib, "pixel_propagation", of="pixel_propagation", setup_context=_setup_context, backward=_backward
)
