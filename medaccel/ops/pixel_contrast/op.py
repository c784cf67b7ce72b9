# SPDX-License-Identifier: Apache-2.0
"""Registers the pixel contrast: schema, shapes without data, gradients, kernels per device.

There is no autocast rule: nothing is cast, since the kernels take any dtype and compute a loss in fp32, as autocast
does for losses.
"""

from typing import Any

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops._operands import Operands
from medaccel.ops._registration import register_gradients
from medaccel.ops.pixel_contrast import native

_INPUTS = "Tensor query, Tensor key, Tensor query_coords, Tensor key_coords, Tensor radius"
_lib = torch.library.Library("medaccel", "FRAGMENT")
# The loss is followed by the rows' log-sum-exps over all keys and over the positives, in base 2, which the backward
# pass needs. The latter is −∞ for a row without a positive.
_lib.define(f"pixel_contrastive_loss({_INPUTS}, float temperature) -> (Tensor, Tensor, Tensor)")
_lib.define(
    f"pixel_contrastive_loss_backward(Tensor grad, {_INPUTS}, Tensor lse, Tensor positive_lse, float temperature, "
    "bool need_query, bool need_key) -> (Tensor, Tensor)"
)


def compute_dtype(query: Tensor, key: Tensor) -> torch.dtype:
    """Returns the dtype of the arithmetic, and of the loss."""
    return torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32


MAX_TRITON_CHANNELS = 256  # wider ones spill registers


def triton_problem(index: int, dtype: torch.dtype, channels: int) -> str | None:
    """Says in a sentence why the Triton kernel doesn't serve this GPU, dtype and number of channels; returns None if
    it does."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel computes in fp32 and has none for {dtype}"
    if channels > MAX_TRITON_CHANNELS:
        return f"the Triton kernel has up to {MAX_TRITON_CHANNELS} channels, not {channels}"
    return _native.triton_problem(index)


# --- checks --------------------------------------------------------------------------------------------------
def check_pixels(
    name: str, query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor
) -> Operands:
    """Checks everything that the memory accesses of the kernels on two views' pixels rely on."""
    operands = Operands(name, "query", query)
    operands.rank("query", query, (3,), "(B, N, C)")
    operands.rank("key", key, (3,), "(B, M, C)")
    operands.rank("query_coords", query_coords, (3,), "(B, N, S)")
    batch, rows, channels = query.shape
    keys, axes = key.shape[1], query_coords.shape[2]
    operands.tensor("key", key, (batch, keys, channels))
    dtypes = (query_coords.dtype,) if query_coords.dtype in _native.DTYPES else tuple(_native.DTYPES)
    if not 1 <= axes <= 3:
        operands.refuse("query_coords", f"has shape {tuple(query_coords.shape)}", f"({batch}, {rows}, S), S = 1-3")
    operands.tensor("query_coords", query_coords, (batch, rows, axes), dtypes)
    operands.tensor("key_coords", key_coords, (batch, keys, axes), dtypes)
    operands.tensor("radius", radius, (batch,), dtypes)
    return operands


def _check_forward(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor, temperature: float
) -> None:
    operands = check_pixels("pixel_contrastive_loss", query, key, query_coords, key_coords, radius)
    operands.number("temperature", temperature, torch.finfo(torch.float32).tiny)


def _check_backward(grad: Tensor, *arguments: Any) -> None:
    query, key, *place, lse, positive_lse, temperature, _, _ = arguments
    operands = check_pixels("pixel_contrastive_loss_backward", query, key, *place)
    operands.tensor("grad", grad, query.shape[:2])
    for argument, tensor in (("lse", lse), ("positive_lse", positive_lse)):
        operands.tensor(argument, tensor, query.shape[:2], (compute_dtype(query, key),))
    operands.number("temperature", temperature, torch.finfo(torch.float32).tiny)


# --- kernels -------------------------------------------------------------------------------------------------
def _forward_cpu(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_forward(query, key, query_coords, key_coords, radius, temperature)
    dtype = compute_dtype(query, key)
    return native.pixel_contrast_forward(
        query.to(dtype), key.to(dtype), query_coords, key_coords, radius, temperature
    )


def _backward_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    lse: Tensor,
    positive_lse: Tensor,
    temperature: float,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    place = (query_coords, key_coords, radius)
    _check_backward(grad, query, key, *place, lse, positive_lse, temperature, need_query, need_key)
    dtype = compute_dtype(query, key)
    grad_query, grad_key = native.pixel_contrast_backward(
        grad.to(dtype),
        query.to(dtype),
        key.to(dtype),
        query_coords,
        key_coords,
        radius,
        lse,
        positive_lse,
        temperature,
        need_query,
        need_key,
    )
    return (
        query.new_empty(0) if grad_query is None else grad_query.to(query.dtype),
        key.new_empty(0) if grad_key is None else grad_key.to(key.dtype),
    )


def _forward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from medaccel.ops.pixel_contrast import triton  # only here: importing Triton takes a second

    _check_forward(*args)
    return triton.forward(*args)


def _backward_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from medaccel.ops.pixel_contrast import triton

    _check_backward(*args)
    return triton.backward(*args)


_lib.impl("pixel_contrastive_loss", _forward_cpu, "CPU")
_lib.impl("pixel_contrastive_loss_backward", _backward_cpu, "CPU")
_lib.impl("pixel_contrastive_loss", _forward_cuda, "CUDA")
_lib.impl("pixel_contrastive_loss_backward", _backward_cuda, "CUDA")


# --- shapes without data -------------------------------------------------------------------------------------
@torch.library.register_fake("medaccel::pixel_contrastive_loss", lib=_lib)
def _(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = compute_dtype(query, key), query.shape[:2]
    return (
        query.new_empty(shape, dtype=dtype),
        query.new_empty(shape, dtype=dtype),
        query.new_empty(shape, dtype=dtype),
    )


@torch.library.register_fake("medaccel::pixel_contrastive_loss_backward", lib=_lib)
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    lse: Tensor,
    positive_lse: Tensor,
    temperature: float,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty(query.shape if need_query else (0,)),
        key.new_empty(key.shape if need_key else (0,)),
    )


# --- gradients -----------------------------------------------------------------------------------------------
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    need_query, need_key, *_others = ctx.needs_input_grad
    if grad is None or not (need_query or need_key):
        return (None,) * 6
    grads = torch.ops.medaccel.pixel_contrastive_loss_backward(
        grad, *ctx.saved_tensors, ctx.temperature, need_query, need_key
    )
    grad_query, grad_key = (g if need else None for g, need in zip(grads, (need_query, need_key), strict=True))
    return grad_query, grad_key, None, None, None, None


register_gradients(
    _lib, "pixel_contrastive_loss", of="pixel_contrastive_loss", setup_context=_setup_context, backward=_backward
)
