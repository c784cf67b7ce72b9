# SPDX-License-Identifier: Apache-2.0
"""Measures how the noise of a reconstructed PET correlates between neighbouring voxels.

Δ_o = PET_t − PET_T inside the body holds noise alone. Its strength follows the activity and the attenuation,
so it is divided by its local standard deviation first. D_d is the difference of two such voxels at distance d
along an axis. White noise has the same histogram of D_d at every d; the histogram of reconstructed PET widens
with d, since close voxels share their noise, and a simulator or a restoration has to know by how much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medaccel.restoration.evaluation.metrics import Array, Mask, check_spacing, check_volumes

AXES = ("i", "j", "k")
HISTOGRAM_EDGES = np.linspace(-5.0, 5.0, 101)


@dataclass(frozen=True)
class NoiseDifference:
    """Describes D_d along one axis; NaN (and an all-zero density) if the mask has no pair at that distance.

    Attributes:
        axis: 0, 1 or 2 (i, j, k).
        voxels: the distance d in voxels.
        distance: the same in mm.
        pairs: voxel pairs with both ends in the mask.
        variance: Var(D_d) of normalised noise (no unit).
        correlation: ρ_d = 1 − Var(D_d) / (2·Var(Δ)); 0 for white noise.
        density: (100,) histogram of D_d over `HISTOGRAM_EDGES`, integrating to the part inside ±5.
    """

    axis: int
    voxels: int
    distance: float
    pairs: int
    variance: float
    correlation: float
    density: NDArray[np.float64]


@dataclass(frozen=True)
class NoiseAnalysis:
    """Holds the `variance` of the normalised noise Δ (about 1), and its differences, by axis, then distance."""

    variance: float
    differences: tuple[NoiseDifference, ...]

    def correlation(self, axis: int, voxels: int) -> float:
        """Returns ρ_d along an axis; raises KeyError if that distance was not analysed."""
        for difference in self.differences:
            if (difference.axis, difference.voxels) == (axis, voxels):
                return difference.correlation
        raise KeyError(f"axis {axis}, {voxels} voxels")

    def rows(self) -> list[dict[str, Any]]:
        """Returns one flat row per difference, without the density, for CSV and JSON."""
        rows = [asdict(difference) for difference in self.differences]
        for row in rows:
            del row["density"]
            row["axis"] = AXES[row["axis"]]
        return rows


def analyse_noise(
    image: Array,
    target: Array,
    mask: Mask,
    spacing: tuple[float, float, float],
    *,
    distances: Sequence[int] = (1, 2, 3),
    window: float = 3.0,
) -> NoiseAnalysis:
    """Computes normalised noise differences at each distance along each axis.

    Args:
        image, target: two exposures of a study, (i, j, k), SUV.
        mask: the body.
        spacing: voxel size, mm.
        distances: distances in voxels.
        window: σ, in voxels, of the Gaussian window of the local standard deviation.

    Raises:
        ValueError: `metrics` would refuse shapes, mask or values; a distance is below 1; image and target are equal.
    """
    check_volumes(mask, image=image, target=target)
    check_spacing(spacing)
    if not distances or any(d < 1 for d in distances):
        raise ValueError(f"distances is {tuple(distances)}; expected voxel distances of at least 1")
    noise = normalised_noise(image.astype(np.float64) - target, mask, window=window)
    variance = float(noise[mask].var())
    differences = []
    for axis in range(3):
        for d in distances:
            ahead = _shifted(noise, axis, d)
            behind = _shifted(noise, axis, -d)
            pairs = (ahead - behind)[_shifted(mask, axis, d) & _shifted(mask, axis, -d)]
            spread = float(pairs.var()) if pairs.size else math.nan
            counts = np.histogram(pairs, HISTOGRAM_EDGES)[0]
            density = counts / (max(pairs.size, 1) * np.diff(HISTOGRAM_EDGES))
            rho = 1 - spread / (2 * variance)
            differences.append(NoiseDifference(axis, d, d * float(spacing[axis]), pairs.size, spread, rho, density))
    return NoiseAnalysis(variance, tuple(differences))


def normalised_noise(difference: Array, mask: Mask, *, window: float = 3.0) -> NDArray[np.float64]:
    """Returns the noise divided by its local standard deviation, 0 outside the mask.

    The local mean is not subtracted: noise has none, and estimating it would bias the correlations downward.

    Raises:
        ValueError: the noise is 0 throughout the mask (equal images), or `window` is not positive.
    """
    from scipy import ndimage

    if not window > 0:
        raise ValueError(f"window is {window}; expected a positive σ in voxels")
    inside = np.where(mask, difference, 0.0)
    if not inside.any():
        raise ValueError("image and target are equal inside the mask: there is no noise to analyse")
    # Zeros outside the body drop out, because the weights are smoothed alike.
    power = ndimage.gaussian_filter(inside * inside, window, mode="constant")
    weight = ndimage.gaussian_filter(mask.astype(np.float64), window, mode="constant")
    sd = np.sqrt(np.divide(power, weight, out=np.zeros_like(power), where=mask))
    return np.asarray(np.divide(inside, sd, out=np.zeros_like(inside), where=mask & (sd > 0)))


def _shifted(array: Array, axis: int, offset: int) -> Array:
    """Returns the part of `array` that has a neighbour `offset` voxels before (positive) or after it (negative)."""
    return array[(slice(None),) * axis + (slice(offset, None) if offset > 0 else slice(None, offset),)]
