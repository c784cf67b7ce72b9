# SPDX-License-Identifier: Apache-2.0
"""Measures what a restoration does to lesions, against the noise-free reconstruction in the same voxels.

Sizes are diameters of the sphere of the lesion's volume. "Large" lesions have at least 10 mm, "small" ones
less; the generator's smallest has 6 mm, though on coarse voxels a mask of it can come out smaller.

**Lost**: a hot lesion that stands out in the noise-free image (contrast of at least 25 % of its background)
and keeps less than half of that contrast. Contrast: the lesion's mean minus the median of its surroundings, 6
to 15 mm from its surface, inside the body and at least 6 mm from other lesions.

**Created**: a connected group of voxels (26 neighbours), of at least a 6 mm sphere's volume, in the body and
at least 6 mm from any lesion, that lies 50 % and 0.5 SUV above the noise-free image's maximum within 6 mm.
The limit is that maximum, not the voxel itself, so that a blurred or sharpened organ border is no hot spot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medaccel.restoration.evaluation.metrics import Array, Mask, check_spacing, check_volumes

LARGE = 10.0  # mm
GAP = 6.0  # mm: about the resolution of a PET, so that the lesion's own spill-out is not its background
SHELL = 15.0  # mm
VISIBLE_CONTRAST = 0.25  # share of the background
KEPT_CONTRAST = 0.5  # share of the noise-free contrast
CREATED_EXCESS = 0.5  # share of the noise-free image's local maximum
CREATED_SUV = 0.5
CREATED_DIAMETER = 6.0  # mm


@dataclass(frozen=True)
class LesionRegion:
    """Holds a lesion's voxels and surroundings in a box around it.

    Attributes:
        label: its value in the label volume.
        diameter: diameter of the sphere of its volume, mm.
        box: three slices of the volume.
        voxels, surroundings: boolean arrays of the box's shape.
    """

    label: int
    diameter: float
    box: tuple[slice, slice, slice]
    voxels: Mask
    surroundings: Mask


@dataclass(frozen=True)
class LesionUptake:
    """Holds the SUV of one lesion in one image. `background` is the surroundings' median, NaN if there are none."""

    mean: float
    maximum: float
    peak: float
    background: float

    @property
    def contrast(self) -> float:
        """Returns mean minus background, SUV."""
        return self.mean - self.background


def lesion_regions(lesions: NDArray[Any], mask: Mask, spacing: tuple[float, float, float]) -> list[LesionRegion]:
    """Returns the lesions of an instance label volume (0 is background), in the order of their labels.

    Raises:
        ValueError: the label volume's shape is not the mask's, or it isn't of integers.
    """
    from scipy import ndimage

    check_spacing(spacing)
    if lesions.shape != mask.shape or not np.issubdtype(lesions.dtype, np.integer):
        raise ValueError(
            f"lesions: {lesions.dtype} of shape {lesions.shape}; expected integers of shape {mask.shape}"
        )
    reach = [math.ceil((SHELL + GAP) / s) for s in spacing]  # a lesion further away clears none of the shell
    regions = []
    for label, found in enumerate(ndimage.find_objects(lesions), start=1):
        if found is None:
            continue
        box = tuple(slice(max(s.start - r, 0), s.stop + r) for s, r in zip(found, reach, strict=True))
        voxels = lesions[box] == label
        distance = ndimage.distance_transform_edt(~voxels, sampling=spacing)
        clear = ndimage.distance_transform_edt(lesions[box] == 0, sampling=spacing) > GAP
        surroundings = mask[box] & clear & (distance <= SHELL)
        volume = int(voxels.sum()) * math.prod(spacing)
        regions.append(LesionRegion(label, _diameter(volume), (box[0], box[1], box[2]), voxels, surroundings))
    return regions


def measure_lesions(
    image: Array, regions: list[LesionRegion], spacing: tuple[float, float, float]
) -> list[LesionUptake]:
    """Measures SUVmean, SUVmax, SUVpeak and background of each lesion.

    SUVpeak is the highest mean over a 1 cm³ sphere whose centre is a voxel of the lesion (PERCIST, Wahl et
    al. 2009); voxels at the sphere's surface count with the part that is inside.
    """
    from scipy import ndimage

    sphere = peak_sphere(spacing)
    uptakes = []
    for region in regions:
        values = image[region.box].astype(np.float64)
        inside = values[region.voxels]
        around = values[region.surroundings]
        # The box reaches past the sphere on every side; only the volume's own border can cut it.
        means = ndimage.correlate(values, sphere, mode="nearest")
        background = float(np.median(around)) if around.size else math.nan
        uptakes.append(
            LesionUptake(float(inside.mean()), float(inside.max()), float(means[region.voxels].max()), background)
        )
    return uptakes


def peak_sphere(spacing: tuple[float, float, float], *, volume: float = 1000.0) -> NDArray[np.float64]:
    """Returns weights, summing to 1, for a sphere of `volume` mm³; voxels at its surface count by their part
    inside."""
    check_spacing(spacing)
    radius = (3 * volume / (4 * math.pi)) ** (1 / 3)  # 6.2 mm for 1 cm³
    fine = 11  # sample points per voxel and axis
    squares = []
    for s in spacing:
        half = math.ceil(radius / s)
        points = (np.arange((2 * half + 1) * fine) - ((2 * half + 1) * fine - 1) / 2) * s / fine
        squares.append(points**2)
    inside = squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :] <= radius**2
    sizes = [n // fine for n in inside.shape]
    weights = inside.reshape(sizes[0], fine, sizes[1], fine, sizes[2], fine).mean(axis=(1, 3, 5))
    return np.asarray(weights / weights.sum())


def is_hot(reference: LesionUptake) -> bool:
    """Tells whether a lesion takes up more than its surroundings; one without surroundings counts as hot."""
    return not reference.contrast < 0


def is_lost(restored: LesionUptake, reference: LesionUptake) -> bool:
    """Tells whether a hot lesion is lost, as this module's docstring defines it; a lesion that never stood out is
    not."""
    visible = reference.contrast > 0 and reference.contrast >= VISIBLE_CONTRAST * reference.background
    return bool(visible and restored.contrast < KEPT_CONTRAST * reference.contrast)


def hot_spot_ceiling(
    noise_free: Array, mask: Mask, lesions: NDArray[Any] | None, spacing: tuple[float, float, float]
) -> NDArray[np.float64]:
    """Returns the SUV above which a voxel belongs to a created hot spot: (i, j, k), infinite where no hot spot can
    be.

    It depends on the study alone, so one ceiling serves every method.
    """
    from scipy import ndimage

    check_volumes(mask, noise_free=noise_free)
    half = [int(GAP // s) for s in spacing]
    steps = np.ogrid[tuple(slice(-h, h + 1) for h in half)]
    ball = sum((step * s) ** 2 for step, s in zip(steps, spacing, strict=True)) <= GAP**2
    local = ndimage.maximum_filter(noise_free.astype(np.float64), footprint=ball, mode="nearest")
    ceiling = np.maximum(local * (1 + CREATED_EXCESS), local + CREATED_SUV)
    allowed = mask.copy()
    if lesions is not None and lesions.any():
        allowed &= ndimage.distance_transform_edt(lesions == 0, sampling=spacing) > GAP
    return np.where(allowed, ceiling, np.inf)


def created_hot_spots(restored: Array, ceiling: Array, spacing: tuple[float, float, float]) -> list[float]:
    """Returns the diameters, in mm, of the hot spots that `restored` has above `hot_spot_ceiling`, largest first."""
    from scipy import ndimage

    labels, count = ndimage.label(restored > ceiling, structure=np.ones((3, 3, 3)))
    if not count:
        return []
    volumes = np.bincount(labels.ravel())[1:] * math.prod(spacing)
    diameters = sorted((_diameter(float(v)) for v in volumes), reverse=True)
    return [d for d in diameters if d >= CREATED_DIAMETER]


def organ_core(organ: Mask, spacing: tuple[float, float, float], *, margin: float = 10.0) -> Mask:
    """Returns an organ without its outer `margin` mm, where activity spills over from its neighbours."""
    from scipy import ndimage

    check_spacing(spacing)
    # The organ is padded: one that the field of view cuts has a border there too.
    depth = ndimage.distance_transform_edt(np.pad(organ, 1), sampling=spacing)
    return np.asarray(depth[1:-1, 1:-1, 1:-1] > margin)


def coefficient_of_variation(image: Array, core: Mask) -> float:
    """Returns standard deviation / mean over `organ_core`; NaN if it has fewer than two voxels or a mean of 0.

    Lumpy uptake counts too: compare with the noise-free image's own value.
    """
    if core.shape != image.shape:
        raise ValueError(f"core has shape {core.shape}, the image {image.shape}; expected the same")
    values = image[core].astype(np.float64)
    if values.size < 2 or values.mean() == 0:
        return math.nan
    return float(values.std(ddof=1) / values.mean())


def _diameter(volume: float) -> float:
    """Returns the diameter in mm of the sphere with a volume in mm³."""
    return float((6 * volume / math.pi) ** (1 / 3))
