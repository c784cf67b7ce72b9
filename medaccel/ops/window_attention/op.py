# SPDX-License-Identifier: Apache-2.0
"""Registers the attention: schema, shapes without data, gradients, autocast, kernels per device."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops._arguments import INTEGERS
from medaccel.ops._operands import Operands
from medaccel.ops._registration import register_gradients
from medaccel.ops._transforms import host_values
from medaccel.ops.window_attention import native

_INPUTS = "Tensor qkv, Tensor bias_table, Tensor bias_index, Tensor? pad_qkv, Tensor? dropout_seed"
_SETTINGS = "int[] window_size, int[] shift_size, float scale, float dropout_p"
_lib = torch.library.Library("medaccel", "FRAGMENT")
# The second output is the rows' log-sum-exp, (B, windows, heads, tokens), by which the backward pass recomputes the
# scores; it is in base 2, like the kernels' exponentials: a conversion would round large scores twice more.
_lib.define(f"shifted_window_attention({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)")
_lib.define(
    f"shifted_window_attention_backward(Tensor grad, {_INPUTS}, Tensor output, Tensor lse, {_SETTINGS}, "
    "bool need_qkv, bool need_table, bool need_pad) -> (Tensor, Tensor, Tensor)"
)

HALF = (torch.bfloat16, torch.float16)
MAX_TRITON_HEAD_DIM = 64  # wider ones spill registers


def compute_dtype(qkv: Tensor) -> torch.dtype:
    """Returns the dtype of the arithmetic, and of the log-sum-exp."""
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32


def window_count(sizes: Sequence[int], window_size: Sequence[int]) -> int:
    """Counts the windows of one sample of a map with these spatial sizes, padding included."""
    return math.prod((size + w - 1) // w for size, w in zip(sizes, window_size, strict=True))


def check_index(bias_index: Tensor, rows: int) -> None:
    """Raises a ValueError if an index on the CPU points outside the table; elsewhere nothing is read."""
    known = host_values(bias_index)
    if known is None or known.numel() == 0:
        return
    index = known.to(torch.int64) if known.dtype in INTEGERS[-3:] else known  # torch has no aminmax
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0 or high >= rows:
        raise ValueError(
            f"shifted_window_attention: bias_index has values from {low} to {high}; expected [0, {rows}), the rows "
            "of bias_table"
        )


def triton_problem(index: int, dtype: torch.dtype, head_dim: int) -> str | None:
    """Says in a sentence why the Triton kernel doesn't serve this GPU, dtype and head dimension; returns None if it
    does."""
    if dtype not in (torch.float32, *HALF):
        return f"the Triton kernel computes in fp32 and has none for {dtype}"
    return head_dim_problem(head_dim) or _native.triton_problem(index)


def head_dim_problem(head_dim: int) -> str | None:
    """Says in a sentence why the Triton kernel doesn't serve a head dimension; returns None if it does."""
    if head_dim > MAX_TRITON_HEAD_DIM:
        return f"the Triton kernel has head dimensions up to {MAX_TRITON_HEAD_DIM}, not {head_dim}"
    return None


# --- checks --------------------------------------------------------------------------------------------------
def _check(name: str, *arguments: Any) -> Operands:
    """Checks everything that the kernels' memory accesses rely on, except the index's values: a GPU's kernel clamps
    them itself."""
    qkv, bias_table, bias_index, pad_qkv, dropout_seed, window_size, shift_size, scale, dropout_p = arguments
    operands = Operands(name, "qkv", qkv)
    operands.rank("qkv", qkv, (3, 4, 5), "(B, *spatial, 3·C) with 1-3 spatial axes")
    channels, spatial = qkv.shape[-1], qkv.dim() - 2
    if len(window_size) != spatial or min(window_size) < 1:
        operands.refuse("window_size", f"is {tuple(window_size)}", f"{spatial} sizes >= 1")
    if len(shift_size) != spatial or any(not 0 <= s < w for s, w in zip(shift_size, window_size, strict=True)):
        operands.refuse(
            "shift_size", f"is {tuple(shift_size)}", f"{spatial} values from 0 to below the window's sizes"
        )
    operands.rank("bias_table", bias_table, (2,), "(T, heads)")
    heads = bias_table.shape[1]
    operands.tensor("bias_table", bias_table, None)
    if heads < 1 or channels < 1 or channels % (3 * heads):
        operands.refuse("qkv", f"has {channels} channels for {heads} heads", "3 · heads · head_dim channels")
    tokens = math.prod(window_size)
    operands.tensor("bias_index", bias_index, (tokens, tokens), INTEGERS)
    operands.optional("pad_qkv", pad_qkv, (channels,))
    operands.number("scale", scale, -math.inf)
    operands.number("dropout_p", dropout_p, 0.0, 1 - 2.0**-53)
    if dropout_p > 0:
        operands.tensor("dropout_seed", dropout_seed, None, (torch.int64,))
        if dropout_seed.numel() != 1:
            operands.refuse("dropout_seed", f"has shape {tuple(dropout_seed.shape)}", "one element")
    return operands


def _check_backward(grad: Tensor, *arguments: Any) -> None:
    *tensors, output, lse, window_size, shift_size, scale, dropout_p, _, _, _ = arguments
    settings = (window_size, shift_size, scale, dropout_p)
    operands = _check("shifted_window_attention_backward", *tensors, *settings)
    qkv, bias_table, *_ = tensors
    batch, *sizes, channels = qkv.shape
    shape = (batch, *sizes, channels // 3)
    operands.tensor("grad", grad, shape)
    operands.tensor("output", output, shape)
    rows = (batch, window_count(sizes, window_size), bias_table.shape[1], math.prod(window_size))
    operands.tensor("lse", lse, rows, (compute_dtype(qkv),))


# --- kernels -------------------------------------------------------------------------------------------------
def _forward_cpu(
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    window_size: list[int],
    shift_size: list[int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    settings = (window_size, shift_size, scale, dropout_p)
    _check("shifted_window_attention", qkv, bias_table, bias_index, pad_qkv, dropout_seed, *settings)
    check_index(bias_index, bias_table.shape[0])
    dtype = compute_dtype(qkv)
    output, lse = native.window_attention_forward(
        qkv.to(dtype),
        bias_table.to(dtype),
        bias_index,
        None if pad_qkv is None else pad_qkv.to(dtype),
        dropout_seed,
        window_size,
        shift_size,
        scale,
        dropout_p,
    )
    return output.to(qkv.dtype), lse


def _backward_cpu(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    window_size: list[int],
    shift_size: list[int],
    scale: float,
    dropout_p: float,
    need_qkv: bool,
    need_table: bool,
    need_pad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors, settings = (
        (qkv, bias_table, bias_index, pad_qkv, dropout_seed),
        (window_size, shift_size, scale, dropout_p),
    )
    _check_backward(grad, *tensors, output, lse, *settings, need_qkv, need_table, need_pad)
    check_index(bias_index, bias_table.shape[0])  # again: it may have been changed since
    dtype = compute_dtype(qkv)
    grad_qkv, grad_table, grad_pad = native.window_attention_backward(
        grad.to(dtype),
        qkv.to(dtype),
        bias_table.to(dtype),
        bias_index,
        None if pad_qkv is None else pad_qkv.to(dtype),
        dropout_seed,
        output.to(dtype),
        lse,
        window_size,
        shift_size,
        scale,
        dropout_p,
        need_table,
        need_pad,
    )
    return (
        grad_qkv.to(qkv.dtype) if need_qkv else qkv.new_empty(0),
        bias_table.new_empty(0) if grad_table is None else grad_table.to(bias_table.dtype),
        _pad_like(pad_qkv, qkv).new_empty(0) if grad_pad is None else grad_pad.to(_pad_like(pad_qkv, qkv).dtype),
    )


def _pad_like(pad_qkv: Tensor | None, qkv: Tensor) -> Tensor:
    return qkv if pad_qkv is None else pad_qkv


def _forward_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from medaccel.ops.window_attention import triton  # only here: importing Triton takes a second

    _check("shifted_window_attention", *args)
    return triton.forward(*args)


def _backward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from medaccel.ops.window_attention import triton

    _check_backward(*args)
    return triton.backward(*args)


_lib.impl("shifted_window_attention", _forward_cpu, "CPU")
_lib.impl("shifted_window_attention_backward", _backward_cpu, "CPU")
_lib.impl("shifted_window_attention", _forward_cuda, "CUDA")
_lib.impl("shifted_window_attention_backward", _backward_cuda, "CUDA")


# --- shapes without data -------------------------------------------------------------------------------------
@torch.library.register_fake("medaccel::shifted_window_attention", lib=_lib)
def _(
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    window_size: list[int],
    shift_size: list[int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    batch, *sizes, channels = qkv.shape
    windows = window_count(sizes, window_size)
    rows = (batch, windows, bias_table.shape[1], math.prod(window_size))
    return qkv.new_empty((batch, *sizes, channels // 3)), qkv.new_empty(rows, dtype=compute_dtype(qkv))


@torch.library.register_fake("medaccel::shifted_window_attention_backward", lib=_lib)
def _(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    window_size: list[int],
    shift_size: list[int],
    scale: float,
    dropout_p: float,
    need_qkv: bool,
    need_table: bool,
    need_pad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        qkv.new_empty(qkv.shape if need_qkv else (0,)),
        bias_table.new_empty(bias_table.shape if need_table else (0,)),
        _pad_like(pad_qkv, qkv).new_empty(qkv.shape[-1:] if need_pad else (0,)),
    )


# --- gradients -----------------------------------------------------------------------------------------------
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window_size, ctx.shift_size, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    need_qkv, need_table, _, need_pad, *_ = ctx.needs_input_grad
    if grad is None:
        return (None,) * 9
    settings = (ctx.window_size, ctx.shift_size, ctx.scale, ctx.dropout_p)
    grads = torch.ops.medaccel.shifted_window_attention_backward(
        grad, *ctx.saved_tensors, *settings, need_qkv, need_table, need_pad
    )
    grad_qkv, grad_table, grad_pad = (
        g if need else None for g, need in zip(grads, (need_qkv, need_table, need_pad), strict=True)
    )
    return grad_qkv, grad_table, None, grad_pad, None, None, None, None, None


register_gradients(
    _lib, "shifted_window_attention", of="shifted_window_attention", setup_context=_setup_context, backward=_backward
)


# --- autocast: only qkv is cast; the bias table keeps its precision ------------------------------------------
def _autocast(device_type: str) -> Any:
    def forward(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        if qkv.dtype != torch.float64:
            qkv = qkv.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return torch.ops.medaccel.shifted_window_attention(qkv, *others)

    return forward


_lib.impl("shifted_window_attention", _autocast("cpu"), "AutocastCPU")
_lib.impl("shifted_window_attention", _autocast("cuda"), "AutocastCUDA")
