# SPDX-License-Identifier: Apache-2.0
"""Computes how well model observers tell images with a lesion from images without it, the lesion being known.

A task-based figure of merit (Barrett et al., PNAS 1993): scores of error reward smoothness, whereas a lesion has to
be found. Each observer takes an image's neighbourhood of the lesion, weighs it with a template, and calls the sum
high or low. Two observers stand for readers:

- **NPWE**, non-prewhitening with an eye filter (Burgess, Journal of the Optical Society of America A 1994): the
  template is the expected lesion, and both pass a filter like the eye's contrast sensitivity. It can't undo noise
  that correlates.
- **CHO**, channelized Hotelling (Barrett et al. 1993; Abbey and Barrett, Journal of the Optical Society of America
  A 2001): the neighbourhood is reduced to a few Laguerre-Gauss channels, and the template is K⁻¹Δ, the channels'
  inverse covariance times the expected lesion. It is the best that can be done with these channels.

The signal-to-noise ratio is that of the sums: mean difference / √(mean of both variances), and the AUC is the share
of pairs (with, without) in which the sum with the lesion is the higher one, ties counting half: the percentage
correct of a reader who is shown both. For normal sums AUC = Φ(SNR/√2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medaccel.restoration.evaluation.metrics import Array, check_spacing

CHANNELS = 4
# The eye is most sensitive at 4 cycles a degree. A patient of 40 cm, 20 cm tall on a screen that is 50 cm away, has
# 17.5 mm a degree.
_PEAK_CYCLES_PER_MM = 4 / 17.5
_EYE_POWER = 1.3
# The width of a lesion's channels counts the reconstruction's own blur, FWHM.
_BLUR_MM = 8.0
_FWHM_PER_SIGMA = 2.3548


@dataclass(frozen=True)
class Observed:
    """Holds an observer's sums over realisations, for one lesion: with it and without it."""

    present: NDArray[np.float64]
    absent: NDArray[np.float64]

    @property
    def snr(self) -> float:
        """Returns the signal-to-noise ratio of the sums; NaN below two realisations, 0 if all sums are the same."""
        if min(len(self.present), len(self.absent)) < 2:
            return math.nan
        variance = (self.present.var(ddof=1) + self.absent.var(ddof=1)) / 2
        difference = float(self.present.mean() - self.absent.mean())
        if not variance > 0:  # images without any noise: nothing is seen, or the ratio has no limit
            return math.copysign(math.inf, difference) if difference else 0.0
        return difference / math.sqrt(float(variance))

    @property
    def auc(self) -> float:
        """Returns the share of pairs in which the sum with the lesion is higher; NaN without a pair."""
        if not len(self.present) or not len(self.absent):
            return math.nan
        difference = self.present[:, None] - self.absent[None, :]
        return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def npwe_template(signal: Array, spacing: Sequence[float], *, eye: bool = True) -> NDArray[np.float64]:
    """Returns the template of the non-prewhitening observer for an expected lesion.

    Args:
        signal: the lesion's expected image minus the one without it, (i, j, k).
        spacing: mm.
        eye: filter lesion and image by the eye's contrast sensitivity; False: the lesion itself is the template.
    """
    if not eye:
        return np.asarray(signal, dtype=np.float64)
    # Both are filtered: (E s)·(E g) = (E² s)·g, E being symmetric.
    gain = eye_filter(signal.shape, spacing) ** 2
    return np.asarray(np.fft.irfftn(np.fft.rfftn(signal) * gain, signal.shape, (0, 1, 2)))


def eye_filter(shape: Sequence[int], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Returns the eye's contrast sensitivity f^1.3·exp(−c·f²) on the frequencies of `numpy.fft.rfftn`, 1 at its
    peak."""
    steps = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    check_spacing(steps)
    i, j = (np.fft.fftfreq(n, s) for n, s in zip(shape[:2], steps[:2], strict=True))
    k = np.fft.rfftfreq(shape[2], steps[2])
    squared = i[:, None, None] ** 2 + j[None, :, None] ** 2 + k[None, None, :] ** 2  # (cycles/mm)²
    relative = squared / _PEAK_CYCLES_PER_MM**2
    return np.asarray(relative ** (_EYE_POWER / 2) * np.exp(_EYE_POWER / 2 * (1 - relative)))


def laguerre_gauss(
    shape: Sequence[int], centre: Sequence[float], spacing: Sequence[float], width: float, count: int = CHANNELS
) -> NDArray[np.float64]:
    """Returns rotationally symmetric Laguerre-Gauss channels in 3-D, orthonormal: (count, i, j, k).

    Channel p is exp(−π·r²/width²)·L_p^(1/2)(2π·r²/width²), r being the distance from `centre`; the upper index 1/2
    makes them orthogonal in three dimensions, as 0 does in two. They are orthonormal on the grid too, by Gram and
    Schmidt, since a coarse grid samples them badly.

    Args:
        shape: voxels.
        centre: indices, fractions allowed.
        spacing, width: mm.
        count: number of channels.

    Raises:
        ValueError: `width` or `count` is not positive, or the grid has too few voxels for so many channels.
    """
    from scipy.special import eval_genlaguerre

    steps = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    check_spacing(steps)
    if not width > 0 or count < 1:
        raise ValueError(f"width is {width} mm and count {count}; expected both above 0")
    axes = [(np.arange(n) - c) * s for n, c, s in zip(shape, centre, steps, strict=True)]
    squared = axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2
    argument = 2 * math.pi * squared / width**2
    raw = np.stack([np.exp(-argument / 2) * eval_genlaguerre(p, 0.5, argument) for p in range(count)])
    q, r = np.linalg.qr(raw.reshape(count, -1).T)
    if np.abs(np.diag(r)).min() < 1e-6 * np.abs(np.diag(r)).max():
        raise ValueError(f"a grid of {tuple(shape)} voxels has no {count} channels of {width:.3g} mm; expected fewer")
    return np.asarray((q * np.sign(np.diag(r))).T.reshape(count, *shape))


def channel_width(diameter: float) -> float:
    """Returns the width (mm) of the channels for a lesion: the first one has the shape of a blurred sphere of that
    diameter."""
    # A sphere's variance along an axis is d²/20.
    sigma = math.sqrt(diameter**2 / 20 + (_BLUR_MM / _FWHM_PER_SIGMA) ** 2)
    return math.sqrt(2 * math.pi) * sigma


def hotelling_templates(
    signals: NDArray[np.float64], residuals: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Returns each lesion's Hotelling template over its channels, K⁻¹Δ.

    The covariance K is estimated from all lesions together, each scaled to the same variance, for a lesion of its own
    has too few realisations.

    Args:
        signals: (lesions, channels), the expected lesions in their channels.
        residuals: an array (realisations, channels) for each lesion: outputs minus their mean over the realisations
            of one kind (with the lesion, without).

    Raises:
        ValueError: there are no more residuals than channels.
    """
    count = signals.shape[1]
    if sum(len(rows) for rows in residuals) <= count:
        raise ValueError(f"{sum(len(rows) for rows in residuals)} residuals for {count} channels; expected more")
    scales = [float(np.mean(rows**2)) for rows in residuals]
    total = sum(rows.T @ rows / scale for rows, scale in zip(residuals, scales, strict=True) if scale > 0)
    covariance = np.asarray(total) / sum(len(rows) for rows in residuals)
    # A method that leaves some channel without any noise must not divide by it.
    covariance = covariance + 1e-6 * np.trace(covariance) / count * np.eye(count)
    return np.asarray(np.linalg.solve(covariance, signals.T).T)
