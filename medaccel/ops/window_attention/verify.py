# SPDX-License-Identifier: Apache-2.0
"""Checks and times shifted-window attention for `medaccel verify`."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops._dispatch import use_reference
from medaccel.ops.window_attention import shifted_window_attention, unsupported
from medaccel.ops.window_attention.cases import Case, named

# The cases have every head dimension that the GPU's kernels are built for, and one between them.
_CASES = (
    *("swin_unetr", "whole_windows", "padding_fills_a_region", "head_dim_32", "head_dim_64", "head_dim_5", "image"),
    *("dropout", "empty_batch", "swin_unetr, learnt scale"),
)


_LEARNT = ", learnt scale"


def _forward(case: Case, *, padded: bool) -> Callable[..., Tensor]:
    """Returns the op as a function of qkv, bias_table, pad_qkv, if there is one, bias_index, and a seed or scale."""
    names = ("bias_table", *(("pad_qkv",) if padded else ()), "bias_index")
    options = case.options()
    del options["dropout_seed"]

    def forward(qkv: Tensor, *tensors: Tensor) -> Tensor:
        names_of_all = (*names, "dropout_seed" if case.dropout_p else "scale")[: len(tensors)]
        return shifted_window_attention(qkv, **dict(zip(names_of_all, tensors, strict=True)), **options)

    return forward


def work_of(case: Case, device: torch.device, dtype: torch.dtype, name: str) -> _checks.Work:
    """Returns the attention of any case."""
    qkv, table, index, pad = (None if t is None else t.to(device) for t in case.tensors(dtype))
    assert qkv is not None
    assert table is not None
    assert index is not None
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(*qkv.shape[:-1], qkv.shape[-1] // 3, generator=generator, dtype=dtype).to(device)
    seed = case.options()["dropout_seed"]
    others = [index] if seed is None else [index, seed.to(device)]
    # Gradients are sums of terms gradient · value · weight that cancel.
    terms = float(grad.abs().max() * qkv.abs().max()) if qkv.numel() else 0.0
    tensors = [qkv, table] if pad is None else [qkv, table, pad]
    sizes = [1.0, *[terms] * len(tensors)]
    if name.endswith(_LEARNT):
        others.append(torch.tensor(case.head_dim**-0.5, device=device, requires_grad=True))
        sizes.append(terms * qkv.numel() ** 0.5)
    reason = unsupported(qkv, case.head_dim)
    parts = ("shifted_window_attention", name, reason, _forward(case, padded=pad is not None), tensors, sizes)
    return _checks.Work(*parts, grads=[grad], others=others)


def work(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Work:
    """Returns one attention: the output and the gradients to qkv, bias table and padding, and to a learnt scale."""
    return work_of(named(name.removesuffix(_LEARNT)), device, dtype, name)


def time_attention(device: torch.device, head_dim: int, training: bool) -> _checks.Speed:
    """Times the first stage of a Swin UNETR, at 48³ input on the CPU and 96³ on a GPU."""
    size, dtype = (24, torch.float32) if device.type == "cpu" else (48, torch.bfloat16)
    case = Case("", (size,) * 3, (7, 7, 7), (3, 3, 3), 3, head_dim)
    one = work_of(case, device, dtype, "")
    call = one.run if training else one.output
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


VERIFIER = _checks.Verifier(_CASES, work, speeds, "production")
