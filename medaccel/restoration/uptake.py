# SPDX-License-Identifier: Apache-2.0
"""Judges by the body's typical uptake whether a PET is in SUV.

Divided by the dose per gram of body, uptake is about 1 on average if the whole body is in view; the median over the
body of an FDG PET is 0.3 to 1, since excretion and hot organs take their share. Only a brain's is far higher, 3 to 8.
So a factor of five is noticed in most scans, and Bq/mL, counts or a rescaled image for certain. The mean over the
field of view says nothing, because it depends on the amount of air.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medaccel.restoration.evaluation.metrics import Array, check_spacing

# Body medians, SUV: values in the first range give no warning, values outside the second are impossible.
_USUAL = (0.15, 2.2)
_POSSIBLE = (0.03, 20.0)
_MOST = 1e4  # no organ has as much; a hot bladder has some hundreds
_BLOCK_MM = 8.0  # averages over this length have little noise
_BODY_SHARE = 0.15  # share of the typical uptake: fat and lungs have more, air less
_ACTIVITY = (0.5, 0.7, 0.8, 0.9, 0.95)  # shares of the activity that lie above the typical uptake
# least size of a body, in mL and as a share of the field of view: bladders and kidneys are smaller
_LEAST_ML, _LEAST_SHARE = 1000.0, 0.05
_OVERRIDE = "check_units: false takes it all the same"


def body_median(volume: Array, spacing: Sequence[float]) -> float:
    """Returns the body's median uptake, whatever the unit, the air around the body and the hottest organ.

    The uptake above which half of all activity lies is the typical one, since air has next to no activity however
    much of it there is, and the body is the largest connected part above a share of that. A hot bladder may have more
    than half of a pelvis's activity, but not the volume of a body: then a larger share of the activity is taken.

    Args:
        volume: (i, j, k), finite, not negative.
        spacing: mm.

    Raises:
        ValueError: no voxel is above 0, or spacing isn't three positive lengths.
    """
    from scipy import ndimage

    check_spacing((float(spacing[0]), float(spacing[1]), float(spacing[2])))
    blocks = _block_means(volume, spacing)
    ordered = np.sort(blocks[blocks > 0])
    if not ordered.size:
        raise ValueError("the volume is zero everywhere; expected a PET")
    activity = np.cumsum(ordered)
    millilitres = float(np.prod([float(s) for s in spacing])) * volume.size / blocks.size / 1000
    medians = []
    for share in _ACTIVITY:
        typical = float(ordered[np.searchsorted(activity, activity[-1] * (1 - share))])
        labels, _ = ndimage.label(blocks > _BODY_SHARE * typical)
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        medians.append(float(np.median(blocks[labels == int(np.argmax(sizes))])))
        if sizes.max() * millilitres >= _LEAST_ML or sizes.max() >= _LEAST_SHARE * blocks.size:
            return medians[-1]
    return medians[0]


def suv_per_bqml(weight: float, dose: float) -> float:
    """Returns the factor from Bq/mL to SUV (body weight).

    Args:
        weight: kg.
        dose: Bq, decayed to the time that the image is decay-corrected to.

    Raises:
        ValueError: one of them is no plausible number of its unit.
    """
    for name, value, low, high, unit in (("weight", weight, 1, 300, "kg"), ("dose", dose, 1e4, 1e11, "Bq")):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value:g}; expected {low:g} to {high:g} {unit}")
    return 1000 * weight / dose


def check_suv(
    volume: Array, spacing: Sequence[float], path: Path, *, refuse: bool = True, stacklevel: int = 2
) -> None:
    """Refuses a PET that can't be in SUV.

    Args:
        volume: (i, j, k), finite, not negative.
        spacing: mm.
        path: the file that it was read from.
        refuse: if False, a PET that can't be in SUV is warned about instead.
        stacklevel: the warning's, as `warnings.warn` counts.

    Raises:
        ValueError: the body's median is no SUV, or there is no body; the message says which option reads it all the
            same.

    Warns:
        UserWarning: the median is a rare one, or all values are whole numbers.
    """
    try:
        median = body_median(volume, spacing)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    said = f"the body's median is {median:.3g}, where SUV have {_USUAL[0]:g} to {_USUAL[1]:g} as a rule"
    guess = "Bq/mL, kBq/mL, counts or a multiple" if median > 1 else "a fraction, or scaled to 0 … 1"
    if not _POSSIBLE[0] <= median <= _POSSIBLE[1]:
        _refuse(f"{path}: {said}; expected SUV, and these look like {guess}", refuse, stacklevel + 2)
        return
    if volume.max() > _MOST:
        said = f"its maximum is {volume.max():.4g}, where SUV have {_MOST:g} at most"
        _refuse(f"{path}: {said}; expected SUV, and these look like Bq/mL or counts", refuse, stacklevel + 2)
        return
    if not _USUAL[0] <= median <= _USUAL[1]:
        brain = "a brain's is 3 to 8; else is it " if median > 1 else "is it "
        warnings.warn(f"{path}: {said} ({brain}{guess}?)", stacklevel=stacklevel + 1)
    elif bool((volume == np.round(volume)).all()):
        sentence = f"{path}: all values are whole numbers (is it in SUV, or counts or labels?)"
        warnings.warn(sentence, stacklevel=stacklevel + 1)


def _refuse(sentence: str, refuse: bool, stacklevel: int) -> None:
    if refuse:
        raise ValueError(f"{sentence} ({_OVERRIDE})")
    warnings.warn(sentence, stacklevel=stacklevel)


def _block_means(volume: Array, spacing: Sequence[float]) -> Array:
    """Returns means over whole blocks of about 8 mm, float64; incomplete blocks at the far ends are left out."""
    sizes = [min(max(round(_BLOCK_MM / float(s)), 1), n) for s, n in zip(spacing, volume.shape, strict=True)]
    whole = volume[tuple(slice(n // size * size) for n, size in zip(volume.shape, sizes, strict=True))]
    split = [part for n, size in zip(whole.shape, sizes, strict=True) for part in (n // size, size)]
    return np.asarray(whole.reshape(split).mean(axis=(1, 3, 5), dtype=np.float64))
