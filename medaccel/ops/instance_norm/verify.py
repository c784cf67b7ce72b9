# SPDX-License-Identifier: Apache-2.0
"""Checks and times instance norm for `medaccel verify`."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops.instance_norm import instance_norm_act, unsupported
from medaccel.ops.instance_norm.cases import named

_CASES = (
    *("plain", "residual", "residual_negative_slope", "several_chunks", "several_chunks_channels_last"),
    *("norm_alone", "large_mean", "empty_batch"),
)


def work(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Work:
    """Returns one norm: the output and the gradients to input, weight, bias and residual, where they are given."""
    case = named(name)
    *every, grad = (None if t is None else t.to(device) for t in case.tensors(dtype))
    there = [t is not None for t in every]
    tensors = [t for t in every if t is not None]

    def forward(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        x, weight, bias, residual = (next(given) if here else None for here in there)
        assert x is not None
        return instance_norm_act(x, weight, bias, residual=residual, negative_slope=case.slope)

    # 1/σ multiplies differences from the mean: the rounded terms are as large as the input.
    size, x = 1.0, tensors[0].double()
    if x.numel() > 0:
        spread = x.var(tuple(range(2, x.dim())), correction=0).sqrt()
        size = float(x.abs().max() / spread.min())
    sizes = [size] * (1 + len(tensors))
    assert grad is not None
    reason = unsupported(tensors[0])
    return _checks.Work("instance_norm_act", name, reason, forward, tensors, sizes, grads=[grad])


def time_norm(device: torch.device) -> _checks.Speed:
    """Times the norm, the residual's sum and the leaky ReLU at the end of a Swin UNETR's block."""
    size = 48 if device.type == "cpu" else 96
    x, residual = (torch.rand(1, 24, size, size, size, device=device) for _ in range(2))
    with torch.no_grad():
        ours = _checks.median_ms(lambda: instance_norm_act(x, residual=residual, negative_slope=0.01), device)
        plain = _checks.median_ms(lambda: F.leaky_relu_(F.instance_norm(x).add_(residual), 0.01), device)
        copy = _checks.copy_ms(x)
    # A copy reads one map and writes one; this reads two and writes one.
    case = f"24 × {size}³, fp32"
    return _checks.Speed("instance_norm_act", str(device), case, ours, plain, None, "copy", 1.5 * copy / ours)


def speeds(device: torch.device) -> Iterator[_checks.Speed]:
    """Yields the speed on one map of a Swin UNETR's decoder."""
    yield time_norm(device)


VERIFIER = _checks.Verifier(_CASES, work, speeds, "production")
