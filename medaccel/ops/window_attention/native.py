# SPDX-License-Identifier: Apache-2.0
"""Calls shifted-window attention's CPU kernels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medaccel._native import DTYPES, cpu_module
from medaccel.ops.window_attention.reference import dropout_threshold


def _three_axes(values: Sequence[int], missing: int) -> list[int]:
    """Returns one value per axis (z, y, x) of a map with 1-3 of them."""
    return [*[missing] * (3 - len(values)), *values]


def _window_settings(
    qkv: Tensor,
    bias_table: Tensor,
    dropout_seed: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    dropout_p: float,
) -> tuple[object, ...]:
    """Returns the arguments of both attention kernels after their tensors; `dropout_seed` must outlive the call."""
    batch, *sizes, channels = qkv.shape
    return (
        DTYPES[qkv.dtype], [batch, *_three_axes(sizes, 1), channels], bias_table.shape[1], bias_table.shape[0],
        _three_axes(window_size, 1), _three_axes(shift_size, 0), scale, dropout_p, dropout_threshold(dropout_p),
        0 if dropout_seed is None else dropout_seed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def window_attention_forward(
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Runs the native attention on a float32 or float64 CPU map (B, *spatial, 3·C); the others have the same dtype.

    It returns the output (B, *spatial, C) and the base-2 log-sum-exp (B, windows, heads, tokens). The caller has
    checked that the index lies within the table.
    """
    cpu = cpu_module()
    batch, *sizes, channels = qkv.shape
    windows = math.prod(-(-size // w) for size, w in zip(sizes, window_size, strict=True))
    source, table = qkv.contiguous(), bias_table.contiguous()
    index, pad = bias_index.to(torch.int32).contiguous(), None if pad_qkv is None else pad_qkv.contiguous()
    output = qkv.new_empty((batch, *sizes, channels // 3))
    lse = qkv.new_empty((batch, windows, bias_table.shape[1], math.prod(window_size)))
    if output.numel() > 0:
        settings = _window_settings(source, table, dropout_seed, window_size, shift_size, scale, dropout_p)
        cpu.window_attention_forward(
            source.data_ptr(), table.data_ptr(), index.data_ptr(), 0 if pad is None else pad.data_ptr(),
            output.data_ptr(), lse.data_ptr(), *settings,
        )  # fmt: skip
    return output, lse


def window_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    dropout_p: float,
    need_table: bool,
    need_pad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients to qkv, and where needed to bias_table and pad_qkv, from the forward kernel's results."""
    cpu = cpu_module()
    g, source, table, out = grad.contiguous(), qkv.contiguous(), bias_table.contiguous(), output.contiguous()
    index, pad = bias_index.to(torch.int32).contiguous(), None if pad_qkv is None else pad_qkv.contiguous()
    rows = lse.contiguous()
    grad_qkv = torch.empty_like(source)
    grad_table = torch.zeros_like(table) if need_table else None
    grad_pad = source.new_zeros(source.shape[-1]) if need_pad else None
    if out.numel() > 0:
        settings = _window_settings(source, table, dropout_seed, window_size, shift_size, scale, dropout_p)
        cpu.window_attention_backward(
            g.data_ptr(), source.data_ptr(), table.data_ptr(), index.data_ptr(), 0 if pad is None else pad.data_ptr(),
            out.data_ptr(), rows.data_ptr(), grad_qkv.data_ptr(), 0 if grad_table is None else grad_table.data_ptr(),
            0 if grad_pad is None else grad_pad.data_ptr(), *settings,
        )  # fmt: skip
    return grad_qkv, grad_table, grad_pad
