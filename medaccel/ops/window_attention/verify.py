# SPDX-License-Identifier: Apache-2.0
"""Checks and times shifted-window attention for `medaccel verify`."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops._dispatch import use_reference
from medaccel.ops.window_attention import shifted_window_attention, unsupported
from medaccel.ops.window_attention.cases import Case, named

# The cases have every head dimension that the GPU's kernels are built for, and one between them.
_CASES = (
    *("swin_unetr", "whole_windows", "padding_fills_a_region", "head_dim_32", "head_dim_64", "head_dim_5", "image"),
    *("dropout", "empty_batch"),
)


def _inputs(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Returns qkv, bias_table, pad_qkv and the output's gradient."""
    qkv, table, _, pad = case.tensors(dtype)
    assert pad is not None
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(*qkv.shape[:-1], qkv.shape[-1] // 3, generator=generator, dtype=dtype)
    return [t.to(device) for t in (qkv, table, pad, grad)]


def _gradients(case: Case, index: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    qkv, table, pad = (t.detach().requires_grad_() for t in tensors[:3])
    options = case.options()
    if options["dropout_seed"] is not None:
        options["dropout_seed"] = options["dropout_seed"].to(qkv.device)
    y = shifted_window_attention(qkv, table, index.to(qkv.device), pad_qkv=pad, **options)
    wanted = (qkv, table, pad)
    return [y.detach(), *torch.autograd.grad(y, wanted, tensors[3].to(y), materialize_grads=True, allow_unused=True)]


def check(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Check:
    """Checks the output and the gradients to qkv, bias table and padding."""
    case = named(name)
    index, tensors = case.tensors(dtype)[2], _inputs(case, device, dtype)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        return _gradients(case, index, tensors)

    # Gradients are sums of terms gradient · value · weight that cancel.
    terms = float(tensors[3].abs().max() * tensors[0].abs().max()) if tensors[0].numel() else 0.0
    reason = unsupported(tensors[0], case.head_dim)
    return _checks.compare("shifted_window_attention", name, reason, run, tensors, (1.0, terms, terms, terms))


def time_attention(device: torch.device, head_dim: int, training: bool) -> _checks.Speed:
    """Times the first stage of a Swin UNETR, at 48³ input on the CPU and 96³ on a GPU."""
    size, dtype = (24, torch.float32) if device.type == "cpu" else (48, torch.bfloat16)
    case = Case("", (size,) * 3, (7, 7, 7), (3, 3, 3), 3, head_dim)
    tensors = _inputs(case, device, dtype)
    index = case.tensors(dtype)[2].to(device)

    def call() -> object:
        if training:
            return _gradients(case, index, tensors)
        with torch.no_grad():
            qkv, table, pad = tensors[:3]
            return shifted_window_attention(qkv, table, index, pad_qkv=pad, **case.options())

    ours = _checks.median_ms(call, device)
    with use_reference():
        plain = _checks.median_ms(call, device)
    windows, products = math.ceil(size / 7) ** 3, 7 if training else 2
    operations = 2 * products * windows * case.heads * 343**2 * head_dim
    share = operations / ours / _checks.product_rate(device, dtype)
    what = "forward + backward" if training else "forward"
    name = f"{size}³, {head_dim}, {what}, {_checks.dtype_name(dtype)}"
    return _checks.Speed("shifted_window_attention", str(device), name, ours, plain, None, "matmul", share)


def speeds(device: torch.device) -> Iterator[_checks.Speed]:
    """Yields the speeds at Swin UNETR's two head dimensions, in inference and in training."""
    return (time_attention(device, *kind) for kind in itertools.product((8, 16), (False, True)))


VERIFIER = _checks.Verifier(_CASES, check, speeds)
