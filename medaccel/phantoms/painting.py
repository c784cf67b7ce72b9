# SPDX-License-Identifier: Apache-2.0
"""Draws the elements of phantoms: smooth random fields, and superellipsoids with soft edges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def random_field(
    shape: Sequence[int], spacing: Sequence[float], sigma: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws a band-limited Gaussian random field, mean 0, standard deviation 1, float32.

    Args:
        shape: voxels.
        spacing: voxel size, mm.
        sigma: σ of the low pass, mm.
        rng: source of randomness.
    """
    from scipy.ndimage import gaussian_filter

    widths = [sigma / step for step in spacing]
    noise = rng.standard_normal(tuple(shape), dtype=np.float32)
    low = gaussian_filter(noise, widths, mode="wrap", truncate=3.0)
    # Without its slowest part, the field does not tilt a whole organ.
    low -= gaussian_filter(low, [2.5 * width for width in widths], mode="wrap", truncate=2.0)
    return low / low.std()


def superellipsoid(
    position: Sequence[np.ndarray],
    axes: Sequence[np.ndarray],
    centre: Sequence[float],
    semi_axes: Sequence[float],
    *,
    exponent: float,
    margin: float,
    edge: float,
) -> tuple[tuple[slice, ...], np.ndarray] | None:
    """Returns the share of each voxel that |x/a|^p + |y/b|^p + |z/c|^p < 1 covers, and the part of the grid that the
    shares belong to.

    Args:
        position: x, y and z of each voxel, (i, j, k) each, mm; perhaps deformed.
        axes: x, y and z of the grid's planes, mm, not deformed.
        centre, semi_axes: mm.
        exponent: p; 2 is an ellipsoid.
        margin: how far beyond the semi-axes the deformation may carry the surface, mm.
        edge: width over which the cover fades from 1 to 0, mm.

    Returns:
        The part of the grid, and the cover within, 0 to 1, float32; None if the shape lies outside the grid.
    """
    box = []
    for axis in range(3):
        near = np.flatnonzero(np.abs(axes[axis] - centre[axis]) < semi_axes[axis] + margin)
        if not near.size:
            return None
        box.append(slice(int(near[0]), int(near[-1]) + 1))
    region = tuple(box)
    radius = sum(
        (np.abs(position[axis][region] - centre[axis]) / semi_axes[axis]) ** exponent for axis in range(3)
    ) ** (1.0 / exponent)
    # The distance to the surface is first order, for the thinner half of a long organ.
    width = float(np.sqrt(np.prod(sorted(semi_axes)[:2])))
    return region, np.clip(0.5 + (1.0 - radius) * width / edge, 0.0, 1.0).astype(np.float32)
