# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Holds what the Triton kernels on pixels' feature vectors share: loads of rows, and their way to unit vectors and
back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_rows(ptr, row, count, channel, WIDTH: tl.constexpr):
    """Loads (rows, channels) of a matrix of `count` rows; 0 beyond its rows and its WIDTH channels."""
    inside = (row < count)[:, None] & (channel < WIDTH)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * WIDTH + channel[None, :], mask=inside, other=0.0)


def aligned(rows: Tensor) -> Tensor:
    """Returns rows (…, C), contiguous, with zeros up to a multiple of 16 channels: vector loads read them then, and
    the kernels need fewer registers."""
    missing = -rows.shape[-1] % 16
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the unit vectors, contiguous and in fp32, the largest elements (∞ for a zero vector) and the lengths in
    units of them, (…, 1).

    Squares of the vectors as they are would overflow or vanish, from a scale of 1e19 or 1e-19 on.
    """
    x = x.float().contiguous()
    largest = x.abs().amax(dim=-1, keepdim=True)
    largest = torch.where(largest == 0, torch.inf, largest)
    scaled = x / largest
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=1)
    return scaled / length, largest, length


def through_norm(grad: Tensor, unit: Tensor, largest: Tensor, length: Tensor) -> Tensor:
    """Returns the gradient by the vectors from that by their unit vectors; the others are `unit_rows`' results."""
    return (grad - (grad * unit).sum(dim=-1, keepdim=True) * unit) / length / largest
