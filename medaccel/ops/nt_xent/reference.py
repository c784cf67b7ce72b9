# SPDX-License-Identifier: Apache-2.0
"""Computes log-sum-exps of cosine similarities in plain PyTorch: differentiable, readable, with N × M tensors."""

import torch
from torch import Tensor

from medaccel.ops._dispatch import without_autocast
from medaccel.ops.pixel_contrast.reference import unit


def similarity_lse(query: Tensor, key: Tensor, temperature: float | Tensor, self_offset: int) -> Tensor:
    """Returns log Σ_j exp(cos(query_i, key_j) / temperature), (B, N); key i + self_offset of query i is left out if
    self_offset ≥ 0."""
    with without_autocast(query.device):
        scores = unit(query) @ unit(key).transpose(1, 2) / temperature  # (B, N, M)
    if self_offset >= 0:
        own = torch.arange(query.shape[1], device=query.device)[:, None] + self_offset
        scores = scores.masked_fill(own == torch.arange(key.shape[1], device=key.device), -torch.inf)
    return scores.logsumexp(dim=-1)
