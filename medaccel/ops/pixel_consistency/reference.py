# SPDX-License-Identifier: Apache-2.0
"""Computes the cosines of near pairs in plain PyTorch: differentiable, readable, with N × M tensors."""

import torch
from torch import Tensor

from medaccel.ops._dispatch import without_autocast
from medaccel.ops.pixel_contrast.reference import near, unit


def pair_similarity(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns Σ cos(query_i, key_j) over the keys nearer than the radius, and their number, (B, N) each."""
    with without_autocast(query.device):
        cosines = unit(query) @ unit(key).transpose(1, 2)  # (B, N, M)
    positive = near(query_coords, key_coords, radius)
    return torch.where(positive, cosines, 0.0).sum(dim=-1), positive.sum(dim=-1).to(query.dtype)
