# SPDX-License-Identifier: Apache-2.0
"""Computes the denoised copy of a PET that networks may start from: non-local means of a fixed strength."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from medaccel.restoration.evaluation.metrics import body_mask
from medaccel.restoration.methods.base import RestorationTask
from medaccel.restoration.methods.classical import NonLocalMeans

# This factor multiplies the noise level that is estimated in each PET; the search finds it on phantoms at 30 and at
# 60 s.
STRENGTH = 1.6


@cache
def _filter() -> NonLocalMeans:
    return NonLocalMeans(RestorationTask())


def base_image(volume: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Denoises a PET by non-local means: (i, j, k), SUV, float32. If no body is found, returns the PET itself.

    Args:
        volume: (i, j, k), SUV.
        spacing: mm.
    """
    mask = body_mask(volume, (float(spacing[0]), float(spacing[1]), float(spacing[2])))
    if not mask.any():
        return volume.astype(np.float32)
    return _filter().denoised(volume, mask, STRENGTH)
