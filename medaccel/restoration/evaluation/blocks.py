# SPDX-License-Identifier: Apache-2.0
"""Sums errors of one patient's image by axial block, which `medaccel.studies.statistics.ratio_score` resamples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medaccel.restoration.evaluation.metrics import Array, Mask, check_spacing, check_volumes, ssim_map


def block_errors(
    image: Array,
    target: Array,
    mask: Mask,
    spacing: tuple[float, float, float],
    *,
    distance: str = "mse",
    block_length: float = 50.0,
) -> NDArray[np.float64]:
    """Sums errors over the body in each axial block: (blocks,), as `ratio_score` needs them.

    Args:
        image, target: (i, j, k), SUV.
        distance: "mse", or "ssim" for 1 − SSIM (primary convention).
        block_length: length of a block in mm: several times the range over which PET noise correlates.

    Raises:
        ValueError: `distance` is unknown; the volumes' shapes differ.
    """
    if distance not in ("mse", "ssim"):
        raise ValueError(f"distance is {distance!r}; expected 'mse' or 'ssim'")
    check_volumes(mask, image=image, target=target)
    if distance == "mse":
        error = (image.astype(np.float64) - target) ** 2
    else:
        error = np.maximum(1 - ssim_map(image, target), 0)
    by_slice = np.where(mask, error, 0).sum(axis=(0, 1), dtype=np.float64)
    return np.asarray(np.add.reduceat(by_slice, block_starts(mask.shape[2], spacing, block_length)))


def block_starts(slices: int, spacing: tuple[float, float, float], block_length: float) -> NDArray[np.int64]:
    """Returns the first slices of axial blocks of `block_length` mm or more; one block if the volume is shorter."""
    check_spacing(spacing)
    if not block_length > 0:
        raise ValueError(f"block_length is {block_length}; expected a positive length in mm")
    blocks = max(int(slices * spacing[2] // block_length), 1)
    return np.unique(np.linspace(0, slices, blocks, endpoint=False).astype(np.int64))
