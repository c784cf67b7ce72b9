# SPDX-License-Identifier: Apache-2.0
"""Checks and times the pixel consistency for `medaccel verify`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops._dispatch import use_reference
from medaccel.ops.pixel_consistency import pixel_consistency_loss, unsupported
from medaccel.ops.pixel_consistency.cases import Views, named

_CASES = (
    *("volume", "image", "finer_view", "coarser_view", "half_overlap", "no_overlap", "odd_channels"),
    *("several_chunks", "empty_batch", "volume, radius a number"),
)


_NUMBER = ", radius a number"


def work(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Work:
    """Returns one loss: its value and the gradients to both views' features. The radius lies on the device, or is a
    number."""
    case = named(name.removesuffix(_NUMBER))
    query, key, *place = (t.to(device) for t in case.tensors(dtype))
    shortest = min((float(t.norm(dim=-1).min()) for t in (query, key) if t.numel()), default=1.0)
    # A gradient is a mean of unit vectors over the feature's length.
    terms = 1 / (shortest * max(1, query.shape[1]))
    others = place[:2] if name.endswith(_NUMBER) else place

    def forward(q: Tensor, k: Tensor, at_q: Tensor, at_k: Tensor, radius: Tensor | float = case.radius) -> Tensor:
        return pixel_consistency_loss(q, k, at_q, at_k, radius=radius)

    parts = ("pixel_consistency_loss", name, unsupported(query), forward, [query, key], (1.0, terms, terms))
    return _checks.Work(*parts, others=others)


def time_consistency(device: torch.device) -> _checks.Speed:
    """Times two maps of 12³ pixels on the CPU, of 16³ on a GPU; forward + backward."""
    size = 12 if device.type == "cpu" else 16
    case = Views("", (size,) * 3, 64, batch=1, radius=1.0)
    query, key, *place = (t.to(device) for t in case.tensors())

    def forward(q: Tensor, k: Tensor, at_q: Tensor, at_k: Tensor, radius: Tensor) -> Tensor:
        return pixel_consistency_loss(q, k, at_q, at_k, radius=radius)

    call = _checks.Work("pixel_consistency_loss", "", None, forward, [query, key], (), others=place).run
    ours = _checks.median_ms(call, device)
    with use_reference():
        plain = _checks.median_ms(call, device)
    # Forward and backward read both maps, and the backward pass writes two gradients: three copies' traffic.
    share = 3 * _checks.copy_ms(query) / ours
    name = f"{size}³ pixels, fp32"
    return _checks.Speed("pixel_consistency_loss", str(device), name, ours, plain, None, "copy", share)


def speeds(device: torch.device) -> Iterator[_checks.Speed]:
    """Yields the speed on one pair of maps."""
    yield time_consistency(device)


VERIFIER = _checks.Verifier(_CASES, work, speeds, "production")
