# SPDX-License-Identifier: Apache-2.0
"""Computes the attenuation of 511 keV photons from CT numbers."""

from __future__ import annotations

import numpy as np

WATER_ATTENUATION = 0.096  # 1/cm at 511 keV
# Carney et al., Med Phys 33:976-983, 2006, give this bilinear scaling of CT numbers for 120 kVp.
_BREAK_HU = 47.0
_BONE_SLOPE = 5.10e-5  # 1/cm per HU
_BONE_INTERCEPT = 4.71e-2  # 1/cm at −1000 HU


def hu_to_attenuation(ct: np.ndarray) -> np.ndarray:
    """Converts CT numbers in HU to attenuation at 511 keV in 1/cm, float32 (bilinear, 120 kVp; Carney et al.
    2006)."""
    above_air = np.asarray(ct, dtype=np.float32) + 1000.0
    soft = 9.6e-5 * above_air
    bone = _BONE_SLOPE * above_air + _BONE_INTERCEPT
    return np.maximum(np.where(above_air > _BREAK_HU + 1000.0, bone, soft), 0.0).astype(np.float32)
