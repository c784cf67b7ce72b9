# SPDX-License-Identifier: Apache-2.0
"""Registers instance normalisation: schema, shapes without data, gradients, kernels per device.

Autocast needs no rule: like torch's own instance norm, the op runs in the dtype of its input.
"""

from typing import Any

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops._operands import Operands
from medaccel.ops._registration import register_gradients
from medaccel.ops.instance_norm import native

_lib = torch.library.Library("medaccel", "FRAGMENT")
# The other outputs are each instance's mean and 1/σ, (B, C), for the backward pass.
_lib.define(
    "instance_norm_act(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "float? negative_slope) -> (Tensor, Tensor, Tensor)"
)
# signs: the output (slope >= 0) or the residual (slope < 0: the output's sign is then no longer the input's).
_lib.define(
    "instance_norm_act_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor? signs, Tensor mean, "
    "Tensor rstd, float? negative_slope, bool need_affine, bool need_residual) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def call(*args: Any) -> Tensor:
    """Returns the op's first output."""
    output: Tensor = torch.ops.medaccel.instance_norm_act(*args)[0]
    return output


def _cast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


# --- checks --------------------------------------------------------------------------------------------------
def _check(name: str, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Operands:
    """Checks everything that the kernels' memory accesses rely on."""
    operands = Operands(name, "input", input)
    operands.rank("input", input, (3, 4, 5), "(B, C, *spatial) with 1-3 spatial axes")
    for argument, tensor in (("weight", weight), ("bias", bias)):
        operands.optional(argument, tensor, input.shape[1:2])
    return operands


# --- kernels -------------------------------------------------------------------------------------------------
def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    negative_slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check("instance_norm_act", input, weight, bias).optional("residual", residual, input.shape)
    dtype = _compute_dtype(input)
    if _native.on_gpu_path(input):
        w, b = _cast((weight, bias), dtype)
        (r,) = _cast((residual,), input.dtype)
        output, mean, rstd = native.instance_norm_forward_gpu(input, w, b, r, eps, negative_slope)
        return native.strided_like(output, input), mean, rstd
    w, b, r = _cast((weight, bias, residual), dtype)
    output, mean, rstd = native.instance_norm_forward(input.to(dtype), w, b, r, eps, negative_slope)
    return native.strided_like(output.to(input.dtype), input), mean, rstd


def _backward_op(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = _check("instance_norm_act_backward", input, weight, bias)
    dtype = _compute_dtype(input)
    operands.tensor("grad", grad, input.shape)
    operands.optional("signs", signs, input.shape)
    for argument, tensor in (("mean", mean), ("rstd", rstd)):
        operands.tensor(argument, tensor, input.shape[:2], (dtype,))
    if _native.on_gpu_path(input):
        w, b = _cast((weight, bias), dtype)
        g, s = _cast((grad, signs), input.dtype)
        assert g is not None
        grads = native.instance_norm_backward_gpu(
            g, input, w, b, s, mean, rstd, negative_slope, need_affine, need_residual
        )
    else:
        w, b, s = _cast((weight, bias, signs), dtype)
        grads = native.instance_norm_backward(
            grad.to(dtype), input.to(dtype), w, b, s, mean, rstd, negative_slope, need_affine, need_residual
        )
    grad_input, grad_weight, grad_bias, grad_residual = grads
    empty = input.new_empty(0)
    return (
        native.strided_like(grad_input.to(input.dtype), input),
        empty if grad_weight is None else grad_weight,
        empty.clone() if grad_bias is None else grad_bias,
        empty.clone() if grad_residual is None else native.strided_like(grad_residual.to(input.dtype), input),
    )


for _device in ("CPU", "CUDA"):
    _lib.impl("instance_norm_act", _forward, _device)
    _lib.impl("instance_norm_act_backward", _backward_op, _device)


# --- shapes without data -------------------------------------------------------------------------------------
@torch.library.register_fake("medaccel::instance_norm_act", lib=_lib)
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    negative_slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = input.shape[:2]
    dtype = _compute_dtype(input)
    return torch.empty_like(input), input.new_empty(rows, dtype=dtype), input.new_empty(rows, dtype=dtype)


@torch.library.register_fake("medaccel::instance_norm_act_backward", lib=_lib)
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = input.new_empty(input.shape[1] if need_affine else 0, dtype=_compute_dtype(input))
    return (
        torch.empty_like(input),
        channels if need_affine else input.new_empty(0),
        torch.empty_like(channels) if need_affine else input.new_empty(0),
        torch.empty_like(input) if need_residual else input.new_empty(0),
    )


# --- gradients -----------------------------------------------------------------------------------------------
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, residual, _, ctx.negative_slope = inputs
    y, mean, rstd = output
    signs = None
    if residual is not None and ctx.negative_slope is not None:
        signs = y if ctx.negative_slope >= 0 else residual
    ctx.save_for_backward(input, weight, bias, signs, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    _, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
    input, weight, bias, signs, mean, rstd = ctx.saved_tensors
    grad_input, grad_weight, grad_bias, grad_residual = torch.ops.medaccel.instance_norm_act_backward(
        grad, input, weight, bias, signs, mean, rstd, ctx.negative_slope, need_weight or need_bias, need_residual
    )
    return (
        grad_input if ctx.needs_input_grad[0] else None,
        grad_weight.to(weight.dtype) if need_weight else None,
        grad_bias.to(bias.dtype) if need_bias else None,
        grad_residual if need_residual else None,
        None,
        None,
    )


register_gradients(
    _lib, "instance_norm_act", of="instance_norm_act", setup_context=_setup_context, backward=_backward
)
