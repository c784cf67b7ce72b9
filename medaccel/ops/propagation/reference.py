# SPDX-License-Identifier: Apache-2.0
"""Computes pixel propagation in plain PyTorch: differentiable, readable, with N × N tensors."""

from torch import Tensor

from medaccel.ops._dispatch import without_autocast
from medaccel.ops.pixel_contrast.reference import unit


def pixel_propagation(features: Tensor, values: Tensor, power: float | Tensor) -> Tensor:
    """Returns Σ_j max(cos(features_i, features_j), 0)^power · values_j, (B, N, D)."""
    directions = unit(features)
    with without_autocast(features.device):
        cosines = directions @ directions.transpose(1, 2)  # (B, N, N)
        # Cosines are not clamped to 0 for the power: the second derivative of x^1.5 is infinite there, and 0 · ∞ is
        # NaN.
        unlike = cosines <= 0
        return cosines.masked_fill(unlike, 1).pow(power).masked_fill(unlike, 0) @ values
