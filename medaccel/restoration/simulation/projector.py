# SPDX-License-Identifier: Apache-2.0
"""Projects slice by slice, in 2-D parallel beams with one sparse matrix for all slices, and reconstructs by OSEM.

A transaxial slice is projected along ``n_angles`` directions onto ``n_bins`` radial bins. An entry of the
matrix is the share of a pixel's area that lies in the strip of a bin (exact for a square or rectangular
pixel: its shadow is a trapezoid), so each column sums to 1 per angle. Slices are independent (thin detector
rows); they are the columns of dense right-hand sides that are worked on in blocks of fixed size, so that
memory is bounded. SciPy's sparse products are serial (and hold the GIL), so the bits do not depend on the
number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import sparse

# One dense right-hand side has so many columns. 32 float32 columns of a 128x128 slice are 2 MB, which stays in the
# second-level cache.
SLICE_BLOCK = 32
# Weights below this share of a pixel are rounding noise of the trapezoid's integral.
_MIN_WEIGHT = 1e-7


@dataclass(frozen=True)
class Geometry:
    """Describes a transaxial image grid and its projections. Two grids with the same bins share sinograms.

    Args:
        shape: pixels along i and j.
        spacing: pixel size along i and j, mm.
        n_angles: directions, evenly spaced over 180 degrees.
        n_bins: radial bins, centred on the grid's centre.
        bin_width: width of a bin, mm.
        n_subsets: ordered subsets of the angles; must divide ``n_angles``.
    """

    shape: tuple[int, int]
    spacing: tuple[float, float]
    n_angles: int
    n_bins: int
    bin_width: float
    n_subsets: int

    def __post_init__(self) -> None:
        if self.n_subsets < 1 or self.n_angles % self.n_subsets:
            raise ValueError(
                f"Geometry: n_subsets={self.n_subsets} does not divide n_angles={self.n_angles}; expected a divisor"
            )

    @property
    def sinogram_shape(self) -> tuple[int, int, int]:
        """Returns (subset, angle within the subset, bin): subset s holds the angles s, s + n_subsets, …"""
        return self.n_subsets, self.n_angles // self.n_subsets, self.n_bins

    @property
    def line_length(self) -> float:
        """Returns the factor that makes a projection a line integral in mm: pixel area / bin width."""
        return self.spacing[0] * self.spacing[1] / self.bin_width


def _trapezoid_cdf(u: np.ndarray, a: float, b: float) -> np.ndarray:
    """Returns the cumulative distribution at ``u`` of the sum of two uniform variables on [-a, a] and [-b, b]."""
    result = np.zeros_like(u)
    for shift, sign in ((a + b, 1.0), (a - b, -1.0), (b - a, -1.0), (-a - b, 1.0)):
        result += sign * np.square(np.maximum(u + shift, 0.0))
    return result / (8.0 * a * b)


@lru_cache(maxsize=4)
def system_matrices(geometry: Geometry) -> tuple[sparse.csr_array, ...]:
    """Returns one matrix per subset, float32, (angles in the subset · bins, pixels), both row-major.

    They are kept for the last four geometries of the process. Parts of a pixel outside the bins are lost, as on a
    scanner.
    """
    n_i, n_j = geometry.shape
    centres_i = (np.arange(n_i) - (n_i - 1) / 2) * geometry.spacing[0]  # (n_i,)
    centres_j = (np.arange(n_j) - (n_j - 1) / 2) * geometry.spacing[1]  # (n_j,)
    radius = geometry.n_bins * geometry.bin_width / 2
    pixels = np.arange(n_i * n_j, dtype=np.int32)
    # Angles lie half a step off the axes, so that no trapezoid degenerates into a box.
    angles = (np.arange(geometry.n_angles) + 0.5) * np.pi / geometry.n_angles

    subsets = []
    for subset in range(geometry.n_subsets):
        blocks = []
        for theta in angles[subset :: geometry.n_subsets]:
            a = max(abs(np.cos(theta)) * geometry.spacing[0], 1e-3 * geometry.bin_width) / 2
            b = max(abs(np.sin(theta)) * geometry.spacing[1], 1e-3 * geometry.bin_width) / 2
            position = np.add.outer(centres_i * np.cos(theta), centres_j * np.sin(theta)).ravel()  # (pixels,)
            first = np.floor((position - a - b + radius) / geometry.bin_width).astype(np.int32)
            lower = _trapezoid_cdf(first * geometry.bin_width - radius - position, a, b)
            rows, columns, weights = [], [], []
            for step in range(int(np.ceil(2 * (a + b) / geometry.bin_width)) + 1):
                edge = (first + step + 1) * geometry.bin_width - radius
                upper = _trapezoid_cdf(edge - position, a, b)
                weight = upper - lower
                row = first + step
                keep = (weight > _MIN_WEIGHT) & (row >= 0) & (row < geometry.n_bins)
                rows.append(row[keep])
                columns.append(pixels[keep])
                weights.append(weight[keep].astype(np.float32))
                lower = upper
            entries = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
            blocks.append(sparse.coo_array(entries, shape=(geometry.n_bins, pixels.size)).tocsr())
        subsets.append(sparse.vstack(blocks, format="csr"))
    return tuple(subsets)


def slice_blocks(n_slices: int) -> list[slice]:
    """Returns fixed blocks of slices, the unit of work."""
    return [slice(k, min(k + SLICE_BLOCK, n_slices)) for k in range(0, n_slices, SLICE_BLOCK)]


def forward_project(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Projects a block of slices: (n_i, n_j, slices) -> (subsets, angles, bins, slices), float32."""
    columns = np.ascontiguousarray(image, dtype=np.float32).reshape(-1, image.shape[-1])
    projections = [matrix @ columns for matrix in system_matrices(geometry)]
    return np.stack(projections).reshape(*geometry.sinogram_shape, image.shape[-1])


def osem(
    rates: Sequence[np.ndarray],
    background: np.ndarray,
    factors: np.ndarray,
    geometry: Geometry,
    *,
    iterations: int,
) -> list[np.ndarray]:
    """Reconstructs a block of slices by ordered-subsets expectation maximisation, for several measurements.

    The model of the expected rates is ``factors · (P x) + background`` (Hudson and Larkin, IEEE Trans Med
    Imaging 13:601-609, 1994, with the additive term of an ordinary Poisson reconstruction). Counts and
    counts per second give the same image, since the update knows only ratios of data and model.

    Args:
        rates: measured prompts per second, each (subsets, angles, bins, slices).
        background: expected scatter and randoms per second, same shape, > 0.
        factors: attenuation times sensitivity, same shape: counts per second and bin for a projection of 1.
        geometry: the image grid and its projections.
        iterations: passes over all subsets.

    Returns:
        One image per measurement, (n_i, n_j, slices), float32, >= 0. Pixels that too few bins see are 0.
    """
    matrices = system_matrices(geometry)
    n_slices = factors.shape[-1]
    factors, background, *measured = (
        np.ascontiguousarray(array, dtype=np.float32).reshape(geometry.n_subsets, -1, n_slices)
        for array in (factors, background, *rates)
    )
    inverse_sensitivity = []
    for subset, matrix in enumerate(matrices):
        sensitivity = matrix.T @ factors[subset]  # (pixels, slices)
        # Few angles see the corners outside the field of view, so that no stable update exists there.
        seen = sensitivity > 1e-3 * sensitivity.max(initial=0.0)
        inverse_sensitivity.append(np.divide(1.0, sensitivity, out=np.zeros_like(sensitivity), where=seen))

    images = []
    for data in measured:
        image = np.ones((geometry.shape[0] * geometry.shape[1], n_slices), dtype=np.float32)
        for _ in range(iterations):
            for subset, matrix in enumerate(matrices):
                ratio = matrix @ image  # (rows of the subset, slices)
                ratio *= factors[subset]
                ratio += background[subset]
                np.divide(data[subset], ratio, out=ratio)
                ratio *= factors[subset]
                image *= matrix.T @ ratio
                image *= inverse_sensitivity[subset]
        images.append(image.reshape(*geometry.shape, n_slices))
    return images


def geometry_for(
    shape: tuple[int, int],
    spacing: tuple[float, float],
    *,
    n_angles: int,
    bin_width: float,
    n_subsets: int,
    corners: bool,
) -> Geometry:
    """Returns the geometry of an image grid, with as many bins as its field of view needs.

    The field of view is the circle whose diameter is the grid's longer side, as on a scanner, or with ``corners`` the
    circle around the whole grid.
    """
    sides = [n * s for n, s in zip(shape, spacing, strict=True)]
    diameter = math.hypot(*sides) if corners else max(sides)
    n_bins = int(np.ceil(diameter / bin_width)) + 2
    return Geometry(shape, spacing, n_angles, n_bins, bin_width, n_subsets)


def finer(geometry: Geometry, factor: int) -> Geometry:
    """Returns the same bins over a grid with ``factor`` times as many pixels along each axis."""
    shape: Any = tuple(n * factor for n in geometry.shape)
    spacing: Any = tuple(s / factor for s in geometry.spacing)
    return Geometry(shape, spacing, geometry.n_angles, geometry.n_bins, geometry.bin_width, geometry.n_subsets)
