# SPDX-License-Identifier: Apache-2.0
"""Pixel propagation in plain PyTorch: differentiable, readable, with N × N tensors."""

from torch import Tensor

from medaccel.ops._dispatch import without_autocast
from medaccel.ops.pixel_contrast.reference import unit


def pixel_propagation(features: Tensor, values: Tensor, power: float | Tensor) -> Tensor:
    """Σ_j max(cos(features_i, features_j), 0)^power · values_j, (B, N, D)."""
    directions = unit(features)
    with without_autocast(features.device):
        return (directions @ directions.transpose(1, 2)).clamp(min=0).pow(power) @ values
