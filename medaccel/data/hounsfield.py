# SPDX-License-Identifier: Apache-2.0
"""Judges by their values whether voxels are a CT in Hounsfield units.

In HU air is −1000, fat −100, soft tissue 0 to 100, bone some hundreds; noise is 5 HU or more. So a CT spans hundreds
of HU, has values below −50 wherever air or fat is in view, and neighbouring voxels are seldom equal. What clearly
isn't so is refused; data that may be a CT after all, such as a small crop or one that was clipped to a window, give a
warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: This threshold in HU lies between air and every tissue of a person.
BODY_HU = -500.0
#: HU of 12 bits with the usual offset go from air to this; padding lies below, metal and extended scales above.
AIR_HU, HIGHEST_HU = -1024.0, 3071.0
_SAMPLE = 250_000  # voxels that are judged
_ENOUGH = 1000  # voxels; the distribution of fewer says nothing
_CROP = 20_000  # voxels; fewer may lie within one organ
_PADDING = -1500.0  # scanners fill the corners with −2000, −3024 or less
_LEAST_SPREAD = 15.0  # HU, range of all but a thousandth at either end: noise alone makes more
_BELOW_WATER = -20.0
_EQUAL = 0.5  # share of equal neighbours above which a map is piecewise constant
_FEW, _MANY = 20, 2000  # up to _FEW levels make a label map, and no label map has more than _MANY
_DENSE = 1300.0  # HU; half of a crop may be cortical bone
_ENHANCED = 300.0  # HU; contrast agent in a vessel
OVERRIDE = "check_units: false takes it all the same"
# dataset.json may name other modalities in these words; "CT", "CTA", "LDCT" hold none of them.
_NO_CT = re.compile(
    r"\b(mri?|mra|t[12]\w*|flair|adc|dwi|dti|swi|pd|dixon|pet\w*|pt|suv|spect\w*|nm|us|ultrasound|x-?ray|cr|dx|oct|non-?ct)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Judgement:
    """Says what voxels look like if that isn't a CT, for certain (`refusal`) or perhaps (`doubt`); both are None for
    a CT."""

    refusal: str | None = None
    doubt: str | None = None


def check_hu(values: np.ndarray, path: Path, *, stacklevel: int = 2) -> None:
    """Refuses voxels that are no CT in HU.

    Args:
        values: (i, j, k), finite.
        path: the file that they were read from.
        stacklevel: the warning's, as `warnings.warn` counts.

    Raises:
        ValueError: they clearly aren't a CT; the message says what they look like, and which option reads them all
            the same.

    Warns:
        UserWarning: they may not be a CT.
    """
    found = judge(values)
    if found.refusal is not None:
        raise ValueError(f"{path}: {found.refusal}; expected a CT in HU ({OVERRIDE})")
    if found.doubt is not None:
        warnings.warn(f"{path}: {found.doubt} (is it a CT in HU?)", stacklevel=stacklevel + 1)


class ImageWarning(UserWarning):
    """Tells a property of an image that most scans of some scanner have, such as padding."""


def hu_remarks(values: np.ndarray) -> list[str]:
    """Returns what a user should know of a CT's range, a sentence each: values that no 12-bit CT has, and an offset.

    Args:
        values: (i, j, k), finite.
    """
    sentences = []
    below, above = float((values < AIR_HU).mean()), float((values > HIGHEST_HU).mean())
    if below:
        sentences.append(
            f"{below:.2%} of the voxels are below {AIR_HU:g} HU, down to {values.min():g} (padding beyond the "
            "field of view?)"
        )
    if above:
        sentences.append(
            f"{above:.2%} of the voxels are above {HIGHEST_HU:g} HU, up to {values.max():g} (metal, an extended "
            "scale, or padding?)"
        )
    if (found := judge(values).refusal) is not None:
        sentences.append(f"{found} (is it a CT in HU?)")
    return sentences


def check_modality(content: Mapping[str, Any], path: Path) -> None:
    """Refuses a dataset.json that names another modality than CT.

    The Decathlon's has "modality": {"0": "CT"}, nnU-Net's "channel_names". Names that say nothing about the modality
    pass.

    Raises:
        ValueError: the file names MRI, PET or the like.
    """
    for key in ("modality", "channel_names"):
        given = content.get(key)
        names = list(given.values()) if isinstance(given, Mapping) else given if isinstance(given, list) else [given]
        for name in names:
            if isinstance(name, str) and _NO_CT.search(name.replace("_", " ")):
                raise ValueError(f"{path}: {key} is {given!r}; expected CT ({OVERRIDE})")


def judge(values: np.ndarray) -> Judgement:
    """Judges voxels (i, j, k) from a sample of them."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return Judgement(doubt=f"it is {low:g} everywhere")
    sample = _sampled(values)
    whole = bool((sample == np.round(sample)).all())
    if whole and -1 <= low <= 1 and (found := _label_map(values, sample, low)) is not None:
        return Judgement(refusal=found)
    if low <= _PADDING and bool((sample != low).any()):
        sample = sample[sample != low]
    least, first, median, most = (float(q) for q in np.quantile(sample, (0.001, 0.05, 0.5, 0.999)))
    if most - least < _LEAST_SPREAD:
        return Judgement(refusal=_scaled(sample, low, least, most))
    if values.size < _ENOUGH:
        return Judgement()
    if first < _PADDING:
        return Judgement(refusal=f"its values go down to {least:.0f}, where air has −1000")
    if median > _DENSE:
        return Judgement(
            refusal=f"its median is {median:.0f}, far above bone; its values go from {low:g} to {high:g}"
        )
    if least < _BELOW_WATER:
        return Judgement(doubt=_clipped(sample, low, least))
    return _without_air(sample, low, high, most, whole, values.size)


def _sampled(values: np.ndarray) -> np.ndarray:
    """Returns the values on a coarser grid, float64, 1-D."""
    step = max(int(np.ceil((values.size / _SAMPLE) ** (1 / values.ndim))), 1)
    sample = values[(slice(None, None, step),) * values.ndim].astype(np.float64).ravel()
    # A small structure may lie between the grid's points.
    return sample if sample.min() < sample.max() else values.astype(np.float64).ravel()


def _equal_neighbours(values: np.ndarray, low: float) -> float:
    """Returns the share of equal neighbours, without pairs that are both `low`, along the axis that has most of
    them."""
    step = max(int(np.ceil((values.size / _SAMPLE) ** (1 / values.ndim))), 1)
    grid = (slice(None, None, step),) * values.ndim
    shares = []
    for axis in range(values.ndim):
        along = np.moveaxis(values, axis, 0)
        here, there = along[:-1][grid], along[1:][grid]
        structure = (here != low) | (there != low)
        shares.append(float((here == there)[structure].mean()) if bool(structure.any()) else 1.0)
    return max(shares)


def _label_map(values: np.ndarray, sample: np.ndarray, low: float) -> str | None:
    count = len(np.unique(sample))
    few = count <= _FEW and count <= sample.size // 8
    if not few and (count > _MANY or _equal_neighbours(values, low) < _EQUAL):
        return None
    levels = np.unique(values)
    return f"looks like a label map: {len(levels)} integer values from {levels[0]:g} to {levels[-1]:g}"


def _scaled(sample: np.ndarray, low: float, least: float, most: float) -> str:
    """Returns the sentence on values that span next to nothing."""
    span = f"its values span {least:.3g} to {most:.3g}"
    mean, deviation = float(sample.mean()), float(sample.std())
    if abs(mean) < 0.1 and 0.8 < deviation < 1.25:
        return f"looks like z-scores: {span}, mean {mean:.2g}, standard deviation {deviation:.2g}"
    if low >= -0.01 and most <= 1.01:
        return f"looks like intensities scaled to 0 … 1: {span}"
    if low >= -1.001 and 0.999 < most <= 1.001:
        return f"looks like intensities scaled to −1 … 1: {span}"
    if low >= -0.5 and least >= -0.01:
        return f"looks like a PET in SUV: {span}"
    if least >= -1.3:
        return f"looks like HU divided by 1000: {span}"
    if -10.5 <= least <= -9:
        return f"looks like HU divided by 100: {span}"
    return f"looks scaled, as z-scores are: {span}, less than the noise of a CT"


def _clipped(sample: np.ndarray, low: float, least: float) -> str | None:
    if len(np.unique(sample)) <= 2:
        return f"it holds two values alone, {sample.min():g} and {sample.max():g}"
    if low > -900 and (share := float((sample == low).mean())) > 0.05:
        return f"its values end at {low:g}, which {share:.0%} of the voxels have: clipped to a window"
    if least >= -110 and float((sample < -85).mean()) > 0.1 and float(np.quantile(sample, 0.9)) < 40:
        return "looks like HU divided by 10"
    return None


def _without_air(sample: np.ndarray, low: float, high: float, most: float, whole: bool, size: int) -> Judgement:
    """Judges voxels with next to nothing below water: either a crop within the body, or no HU at all."""
    soft, gap = (float(((sample >= a) & (sample < b)).mean()) for a, b in ((850, 1200), (450, 800)))
    span = f"its values go from {low:g} to {high:g}"
    if soft > 0.15 and soft > 3 * gap:
        return Judgement(
            refusal=f"looks like a CT with an offset of 1000 or 1024: {span}, and {soft:.0%} of the voxels are where "
            "soft tissue would be then"
        )
    bottom = float(sample.min())
    floor = float((sample <= bottom + 0.05 * (most - bottom)).mean())
    if 0 <= low <= 1 and 100 < high <= 255.5 and (high >= 254.5 or floor > 0.02):
        return Judgement(refusal=f"looks like 8-bit grey values: {span}")
    # Air is black in such images: a large part is near 0, where a ramp or a crop of one tissue has little.
    if bottom <= 0.05 * most and floor > 0.1:
        kinds = (
            "HU divided by 100" if low <= -9 else "a PET in SUV, or grey values",
            "MR, a PET's counts or grey values" if whole else "a PET in Bq/mL, or MR",
        )
        sentence = (
            f"looks like {kinds[most > 300]}: {span}, and none is as low as air and fat but {floor:.0%} of the "
            "voxels are at the low end"
        )
        # A crop within a bone has the same distribution, but no zeros.
        clear = floor > 0.2 and (size >= _CROP or float((sample == low).mean()) > 0.05)
        return Judgement(refusal=sentence) if clear else Judgement(doubt=sentence)
    median = float(np.median(sample))
    if median > _ENHANCED:
        return Judgement(doubt=f"nothing in it is as low as air and fat, and its median is {median:.0f}")
    return Judgement()
