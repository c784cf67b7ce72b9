# SPDX-License-Identifier: Apache-2.0
"""Computes the pixel-level contrastive loss in plain PyTorch: differentiable, readable, with N × M tensors."""

import torch
from torch import Tensor

from medaccel.ops._dispatch import without_autocast


def unit(x: Tensor) -> Tensor:
    """Divides x (..., C) by its length, at any scale; a zero vector stays zero, and so does its gradient."""
    # It is divided by its largest element first, which changes no direction: squares would overflow or vanish. The
    # length is then at least 1, or that of a zero vector.
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    scaled = x / torch.where(largest == 0, torch.inf, largest)
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=1)


def near(query_coords: Tensor, key_coords: Tensor, radius: Tensor) -> Tensor:
    """Tells for (B, N, M) whether query i and key j lie closer to each other than the sample's radius.

    Differences are taken before they are squared and summed, axis by axis: the expansion that `torch.cdist` uses
    rounds differently, which flips pairs on a grid whose distance is the radius itself.
    """
    squared = torch.zeros((), dtype=query_coords.dtype, device=query_coords.device)
    for a in range(query_coords.shape[-1]):
        squared = squared + (query_coords[:, :, None, a] - key_coords[:, None, :, a]).square()
    return squared < radius.square()[:, None, None]


def pixel_contrastive_loss(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the loss (B, N), 0 for a query without a positive, and (B, N), True for queries that have one."""
    with without_autocast(query.device):
        scores = unit(query) @ unit(key).transpose(1, 2) / temperature  # (B, N, M)
    positive = near(query_coords, key_coords, radius)
    valid = positive.any(dim=-1)
    # In a row without a positive, all keys count as positives: its result is replaced, and must not be NaN until
    # then.
    of_positives = scores.masked_fill(~positive & valid[..., None], -torch.inf).logsumexp(dim=-1)
    return torch.where(valid, scores.logsumexp(dim=-1) - of_positives, 0.0), valid
