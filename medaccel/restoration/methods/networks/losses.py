# SPDX-License-Identifier: Apache-2.0
"""Computes the losses of the networks: squared error and 1 − SSIM, both in SUV within the body."""

from __future__ import annotations

import torch
from torch import Tensor

from medaccel.ops import gaussian_filter
from medaccel.restoration.evaluation.metrics import SSIM_RANGE, SSIM_SIGMA


def _wide(*volumes: Tensor) -> list[Tensor]:
    """Converts half precision to fp32: sums over a volume lose everything in bf16 and overflow in fp16."""
    return [v.to(torch.promote_types(v.dtype, torch.float32)) for v in volumes]


def squared_error(restored: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Returns the body's mean squared error, one value per sample.

    Args:
        restored, reference: (B, 1, i, j, k), SUV.
        mask: (B, 1, i, j, k), 1 in the body.

    Returns:
        (B,), SUV², in fp32 (fp64 for fp64); 0 for a patch that holds no body.
    """
    restored, reference, mask = _wide(restored, reference, mask)
    inside = mask.flatten(1).sum(1)
    return ((restored - reference).square() * mask).flatten(1).sum(1) / inside.clamp_min(1)


def ssim_distance(restored: Tensor, reference: Tensor, mask: Tensor, *, data_range: float = SSIM_RANGE) -> Tensor:
    """Returns 1 − SSIM averaged over the body, one value per sample: `metrics.ssim_distance`, differentiable.

    MONAI's SSIMLoss convolves with the dense 11³ window and drops the border; the window is separable, and our
    filter's borders are the metric's.

    Args:
        restored, reference, mask: see `squared_error`.
        data_range: L of the constants (0.01·L)² and (0.03·L)², SUV.

    Returns:
        (B,), in fp32 (fp64 for fp64).
    """
    restored, reference, mask = _wide(restored, reference, mask)

    def blur(volume: Tensor) -> Tensor:
        return gaussian_filter(volume, SSIM_SIGMA, truncated=3.5, approx="sampled", mode="reflect", normalize=True)

    # A variance is the small difference of two large numbers, for which autocast's half precision is too coarse.
    with torch.autocast(restored.device.type, enabled=False):
        mean_x, mean_y, xx, yy, xy = blur(
            torch.cat([restored, reference, restored * restored, reference * reference, restored * reference], dim=1)
        ).split(1, dim=1)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance, product = xy - mean_x * mean_y, mean_x * mean_y
    powers = mean_x.square() + mean_y.square()
    variances = xx + yy - powers
    similarity = (2 * product + c1) * (2 * covariance + c2) / ((powers + c1) * (variances + c2))
    inside = mask.flatten(1).sum(1)
    return ((1 - similarity) * mask).flatten(1).sum(1) / inside.clamp_min(1)
