# SPDX-License-Identifier: Apache-2.0
"""Checks that a restoration keeps a small, very hot lesion: nothing may clip or flatten it.

Such lesions are rare in phantoms, and a network that has hardly seen one may take it for noise or cut it off. A
sphere of 10 mm and SUV 30, as the scanner's blur shows it, is added to a PET at several places, and the restored
change at its peak is compared with what was added.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from medaccel.restoration.evaluation.lesions import peak_sphere
from medaccel.restoration.evaluation.metrics import Array, Mask, check_volumes
from medaccel.restoration.evaluation.resolution import FWHM_PER_SIGMA, blob_positions

SUV, DIAMETER = 30.0, 10.0  # mm
KEPT_WITHIN = 0.05  # share of the added peak
_WINDOW = 12.0  # mm around the lesion's centre, where its peak is looked for


def hot_lesion_kept(
    restore: Callable[[Array], Array],
    volume: Array,
    mask: Mask,
    spacing: tuple[float, float, float],
    *,
    suv: float = SUV,
    diameter: float = DIAMETER,
    blur: float = 8.0,
    count: int = 4,
    seed: int = 1,
) -> list[float]:
    """Returns the share of the added peak that is kept, for each lesion; 1 is all of it.

    Args:
        restore: (i, j, k) SUV, float32, to the restored volume; it is called twice, and gives the same for the same
            input.
        volume: the PET to be restored, SUV.
        mask: the body.
        spacing: voxel size, mm.
        suv, diameter: the lesion's uptake, and its diameter in mm.
        blur: FWHM of the reconstruction's blur, mm.
        count, seed: number and seed of the places, which `blob_positions` draws.

    Raises:
        ValueError: `metrics` would refuse shapes, mask or values, or the body has no place for a lesion.
    """
    check_volumes(mask, volume=volume)
    image = np.asarray(volume, dtype=np.float32)
    ball = peak_sphere(spacing, volume=math.pi / 6 * diameter**3)
    cover = ball * (math.pi / 6 * diameter**3 / math.prod(spacing))  # the share of each voxel that it fills
    places = blob_positions(image, mask, spacing, fwhm_mm=blur, count=count, seed=seed)
    added = np.zeros_like(image)
    for place in places:
        box = tuple(slice(max(p - n // 2, 0), p + n // 2 + 1) for p, n in zip(place, cover.shape, strict=True))
        inner = tuple(
            slice(b.start - p + n // 2, b.start - p + n // 2 + min(b.stop, size) - b.start)
            for b, p, n, size in zip(box, place, cover.shape, image.shape, strict=True)
        )
        added[box] += (suv - float(image[place])) * cover[inner]
    added = ndimage.gaussian_filter(added, [blur / FWHM_PER_SIGMA / s for s in spacing])
    before = np.array(restore(image.copy()), dtype=np.float64)
    change = np.array(restore(image + added), dtype=np.float64) - before
    kept = []
    for place in places:
        window = tuple(
            slice(max(p - round(_WINDOW / s), 0), p + round(_WINDOW / s) + 1)
            for p, s in zip(place, spacing, strict=True)
        )
        kept.append(float(change[window].max()) / float(added[window].max()))
    return kept
