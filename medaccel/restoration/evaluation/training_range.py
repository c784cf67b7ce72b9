# SPDX-License-Identifier: Apache-2.0
"""Records the range of images that a method was fitted on, and tells whether another image lies within it.

A restoration works only on images like those it was fitted on: a method fitted at 4 mm and a certain noise blurs or
leaves noise elsewhere. Exposure, voxel size and noise can be measured in one PET alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.data import read_nifti, voxel_spacing
from medaccel.restoration.evaluation.metrics import Array, body_mask, check_spacing

VOXEL_MARGIN = 0.15  # share of the voxel size: 15 % beyond the fitted range give no warning
NOISE_MARGIN = 1.5  # factor of the noise; halving the counts is 1.41
SECONDS_MARGIN = 0.1  # share of the exposure

NOISE_STEP_MM = 8.0  # the noise of a reconstruction does not correlate so far; closer voxels share their noise
_MEAN_FWHM_MM = 10.0
_BODY_SHARE = 0.25  # share of the typical uptake above which a voxel counts as body
_SD_PER_MAD = 1.4826  # standard deviation / median absolute deviation of a normal distribution


@dataclass(frozen=True)
class TrainingRange:
    """Describes the images that a method was fitted on; `plain` and `from_plain` are its JSON.

    Args:
        seconds: exposures, s.
        voxel_min, voxel_max: the least and the greatest voxel size along i, j and k, mm.
        noise_min, noise_max: the least and the greatest `noise_level`.

    Raises:
        ValueError: there is no exposure, sizes or levels are not positive, or a least value is above the greatest.
    """

    seconds: tuple[int, ...]
    voxel_min: tuple[float, float, float]
    voxel_max: tuple[float, float, float]
    noise_min: float
    noise_max: float

    def __post_init__(self) -> None:
        if not self.seconds or min(self.seconds) <= 0:
            raise ValueError(f"seconds is {self.seconds}; expected at least one exposure, in s")
        check_spacing(self.voxel_min)
        check_spacing(self.voxel_max)
        pairs = [*zip(self.voxel_min, self.voxel_max, strict=True), (self.noise_min, self.noise_max)]
        for low, high in pairs:
            if not (0 < low <= high < math.inf):
                raise ValueError(f"a range of {low} to {high}; expected positive numbers, the least one first")

    @classmethod
    def of(cls, studies: Sequence[Path], seconds: Sequence[int]) -> TrainingRange:
        """Measures the range of these study folders (`medaccel.restoration.study`) at these exposures, s.

        One image is in memory at a time.

        Raises:
            ValueError: there are no studies or exposures; an image is damaged or shows no body.
            FileNotFoundError: a study lacks one of the exposures.
        """
        if not studies or not seconds:
            raise ValueError(f"{len(studies)} studies, {len(seconds)} exposures; expected at least one of both")
        spacings, levels = [], []
        for folder in studies:
            for t in seconds:
                image = read_nifti(Path(folder) / f"PET_{t}.nii.gz")
                spacings.append(voxel_spacing(image))
                levels.append(noise_level(np.asanyarray(image.dataobj), spacings[-1]))
        low, high = np.min(spacings, axis=0), np.max(spacings, axis=0)
        return cls(
            tuple(sorted(int(t) for t in seconds)),
            (float(low[0]), float(low[1]), float(low[2])),
            (float(high[0]), float(high[1]), float(high[2])),
            min(levels),
            max(levels),
        )

    def joined(self, other: TrainingRange) -> TrainingRange:
        """Returns the range that holds both."""

        def end(pick: Any, mine: tuple[float, ...], theirs: tuple[float, ...]) -> tuple[float, float, float]:
            i, j, k = map(pick, mine, theirs)
            return i, j, k

        return TrainingRange(
            tuple(sorted({*self.seconds, *other.seconds})),
            end(min, self.voxel_min, other.voxel_min),
            end(max, self.voxel_max, other.voxel_max),
            min(self.noise_min, other.noise_min),
            max(self.noise_max, other.noise_max),
        )

    def plain(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> TrainingRange:
        """Rebuilds a range from the result of `plain`; raises ValueError if the values are no range."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a training range: {error}") from error

    def warnings(self, volume: Array, spacing: Sequence[float], seconds: float) -> list[str]:
        """Returns a sentence for each of exposure, voxel size and noise that is outside the fitted range.

        The margins are 10 % in the exposure, 15 % in the voxel size of each axis, a factor of 1.5 in the noise.

        Args:
            volume: (i, j, k), SUV.
            spacing: voxel size, mm.
            seconds: its exposure.

        Raises:
            ValueError: `noise_level` refuses the volume.
        """
        sentences = []
        if not any(abs(seconds / t - 1) <= SECONDS_MARGIN for t in self.seconds):
            fitted = " or ".join(f"{t} s" for t in self.seconds)
            sentences.append(f"the exposure is {seconds:g} s, but the method was fitted on {fitted}")
        for axis, size, low, high in zip("ijk", spacing, self.voxel_min, self.voxel_max, strict=True):
            if not low * (1 - VOXEL_MARGIN) <= size <= high * (1 + VOXEL_MARGIN):
                sentences.append(
                    f"the voxel size along {axis} is {size:.3g} mm, but the method was fitted on "
                    f"{_range(low, high)} mm"
                )
        level = noise_level(volume, spacing)
        if not self.noise_min / NOISE_MARGIN <= level <= self.noise_max * NOISE_MARGIN:
            sentences.append(
                f"the noise is {100 * level:.2g} % of the local uptake, but the method was fitted on "
                f"{_range(100 * self.noise_min, 100 * self.noise_max)} %"
            )
        return sentences


def noise_level(volume: Array, spacing: Sequence[float]) -> float:
    """Estimates the standard deviation of the noise relative to the local mean, from one PET alone.

    The mixed difference δ_i δ_j δ_k over about 8 mm (whole voxels) has eight terms of the noise, hence its
    variance eight times over, while flat parts, gradients and edges along the axes drop out of it. It is divided by
    the local mean (a Gaussian of 10 mm), and taking the median of its absolute value over the body gives remains of
    the anatomy little weight. In phantoms, exposures of 30, 60 and 90 s give 0.16, 0.12 and 0.10, persons differ by
    ±15 %, and the noise-free image gives 0.01. The unit of `volume` makes no difference.

    Args:
        volume: (i, j, k), SUV or another unit of activity.
        spacing: mm.

    Raises:
        ValueError: the volume isn't 3-D with at least two voxels per axis, isn't finite or shows no body; or spacing
            isn't three positive lengths.
    """
    from scipy import ndimage

    steps_mm = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    check_spacing(steps_mm)
    if volume.ndim != 3 or min(volume.shape) < 2 or not np.isfinite(volume).all():
        raise ValueError(f"volume has shape {volume.shape}; expected three axes of at least two voxels, all finite")
    values = volume.astype(np.float32, copy=False)
    above = values[values > values.mean(dtype=np.float64)]
    # The scale is half of the activity above the mean: the typical uptake, whatever the unit and however hot the
    # bladder.
    scale = float(np.median(above)) if above.size else 0.0
    mask = body_mask(values, steps_mm, threshold=_BODY_SHARE * scale)
    mean = ndimage.gaussian_filter(values, [_MEAN_FWHM_MM / 2.3548 / s for s in steps_mm])
    difference = values
    for there, here in _neighbours(volume.shape, steps_mm):
        difference = difference[there] - difference[here]
        mask = mask[there] & mask[here]  # all eight voxels lie in the body
        mean = (mean[there] + mean[here]) / 2
    if not mask.any():
        raise ValueError("volume has no body in it to tell the noise from; expected a PET of a patient")
    return _deviation(difference[mask] / mean[mask])


def root_noise(volume: Array, spacing: Sequence[float]) -> float:
    """Estimates the standard deviation of the noise of √volume in the patient, from one image alone.

    The mixed difference δ_i δ_j δ_k over about 8 mm has the noise's variance eight times over, while flat parts,
    gradients and edges along the axes drop out of it. The median makes what is left of the anatomy count for little.

    Args:
        volume: (i, j, k), SUV or another unit, >= 0.
        spacing: mm.

    Raises:
        ValueError: no voxel differs from its neighbours, or spacing isn't three positive lengths.
    """
    steps = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    check_spacing(steps)
    root = np.sqrt(np.maximum(volume, 0.0), dtype=np.float32)
    total = float(root.sum(dtype=np.float64))
    # The mean weighted with itself: air around the patient, however much, makes no difference.
    typical = float(np.square(root, dtype=np.float64).sum()) / total if total > 0 else 0.0
    inside = root > 0.4 * typical
    difference = root
    for there, here in _neighbours(volume.shape, steps):
        difference = difference[there] - difference[here]
        inside = inside[there] & inside[here]
    found = _deviation(difference[inside] if inside.any() else difference)
    if not found > 0:
        raise ValueError("volume has no noise that could be measured; expected the PET of a patient")
    return found


def _neighbours(
    shape: Sequence[int], spacing: Sequence[float]
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yields, for each axis, the slices of the voxels about 8 mm ahead and of those that they are compared with."""
    for axis, (side, step) in enumerate(zip(shape, spacing, strict=True)):
        ahead = min(max(round(NOISE_STEP_MM / step), 1), side - 1)
        there, here = [slice(None)] * 3, [slice(None)] * 3
        there[axis], here[axis] = slice(ahead, None), slice(None, -ahead)
        yield tuple(there), tuple(here)


def _deviation(mixed: Array) -> float:
    """Returns the standard deviation of one of the eight terms of mixed differences."""
    return float(_SD_PER_MAD * np.median(np.abs(mixed)) / math.sqrt(8))


def _range(low: float, high: float) -> str:
    return f"{low:.3g}" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.3g} to {high:.3g}"
