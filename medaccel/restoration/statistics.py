# SPDX-License-Identifier: Apache-2.0
"""Computes bootstrap intervals, over studies and within one patient (Efron and Tibshirani, 1993), and agreement.

A table's score is the **mean of the studies' scores**, and its interval resamples studies. The other choice,
the ratio of the summed errors, weighs a patient by the square of the uptake: with one hot bladder it is the
score of that patient. `ratio_score` is for one patient, where the ratio of sums over blocks is the score of the whole
body.

All intervals are percentile intervals from a seeded generator: the same values give the same interval, and
rows of one table are resampled alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medaccel.restoration.evaluation.metrics import Array, Mask, check_spacing, check_volumes, ssim_map

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Statistic:
    """Holds a mean with its standard deviation (n − 1) and bootstrap interval, over `count` finite values.

    Undefined values are NaN: everything without a value, deviation and interval with one.
    """

    mean: float
    sd: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Agreement:
    """Holds Bland and Altman's (1986) bias and 95 % limits of agreement, bias ± 1.96·sd, over `count` pairs.

    sd and the limits are NaN below two pairs, the bias below one.
    """

    bias: float
    sd: float
    low: float
    high: float
    count: int


def mean_statistic(values: ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Statistic:
    """Computes mean, standard deviation and bootstrap interval of one value per study; values that aren't finite are
    left out.

    Raises:
        ValueError: `values` is not one-dimensional, or `level` is not within (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"values has {array.ndim} dimensions; expected 1: one value per study")
    _check_level(level)
    array = array[np.isfinite(array)]
    count = len(array)
    if count < 2:
        mean = float(array[0]) if count else math.nan
        return Statistic(mean, math.nan, math.nan, math.nan, count)
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    low, high = _interval(array[drawn].mean(axis=1), level)
    return Statistic(float(array.mean()), float(array.std(ddof=1)), low, high, count)


def ratio_score(errors: ArrayLike, input_errors: ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Statistic:
    """Computes the within-patient score, 100·(1 − Σ errors / Σ input_errors), over noise realisations × axial blocks.

    Realisations and blocks are crossed, so both are resampled, independently (the pigeonhole bootstrap, Owen
    2007, which errs on the wide side). With one realisation, only blocks are. The interval says how certain the score
    of *this* patient is; it says nothing about other patients.

    Args:
        errors, input_errors: (realisations, blocks), summed errors of the restored and of the unrestored
            image.

    Returns:
        A `Statistic`, whose sd is the standard deviation of the blocks' own scores and whose count is realisations ·
        blocks.

    Raises:
        ValueError: shapes differ or are not 2-D, a value is negative or not finite, or all input errors are
            0.
    """
    errors, input_errors = np.asarray(errors, np.float64), np.asarray(input_errors, np.float64)
    _check_level(level)
    if errors.ndim != 2 or errors.shape != input_errors.shape or not errors.size:
        raise ValueError(
            f"errors has shape {errors.shape}, input_errors {input_errors.shape} "
            "(expected the same, (realisations, blocks))"
        )
    for name, array in (("errors", errors), ("input_errors", input_errors)):
        if not (np.isfinite(array).all() and (array >= 0).all()):
            raise ValueError(f"{name} has values that are negative or not finite; expected sums of errors")
    if not input_errors.sum() > 0:
        raise ValueError("input_errors are all 0: the input equals its target, and the score is undefined")
    realisations, blocks = errors.shape
    generator = np.random.default_rng(seed)
    drawn_rows = _multiplicities(generator, realisations)  # (RESAMPLES, realisations)
    drawn_blocks = _multiplicities(generator, blocks)  # (RESAMPLES, blocks)
    restored = np.einsum("nr,rb,nb->n", drawn_rows, errors, drawn_blocks, optimize=True)
    unrestored = np.einsum("nr,rb,nb->n", drawn_rows, input_errors, drawn_blocks, optimize=True)
    value = 100 * (1 - errors.sum() / input_errors.sum())
    if errors.size < 2:
        return Statistic(value, math.nan, math.nan, math.nan, 1)
    defined = unrestored > 0
    low, high = _interval(100 * (1 - restored[defined] / unrestored[defined]), level)
    own = 100 * (1 - errors[input_errors > 0] / input_errors[input_errors > 0])
    sd = float(own.std(ddof=1)) if own.size > 1 else math.nan
    return Statistic(float(value), sd, low, high, errors.size)


def within_patient(
    restored: Sequence[Array],
    inputs: Sequence[Array],
    targets: Sequence[Array],
    mask: Mask,
    spacing: tuple[float, float, float],
    *,
    distance: str = "mse",
    block_length: float = 50.0,
    seed: int = 0,
) -> Statistic:
    """Returns the score of one patient with its within-patient interval; see `ratio_score`.

    Args:
        restored, inputs, targets: one (i, j, k) volume in SUV per noise realisation.
        distance: "mse", or "ssim" for 1 − SSIM (primary convention).
        block_length: length of the axial blocks, in mm: several times the range over which PET noise correlates.

    Raises:
        ValueError: `distance` is unknown; the sequences' lengths or the volumes' shapes differ.
    """
    if not len(restored) == len(inputs) == len(targets) or not len(targets):
        raise ValueError(
            f"{len(restored)} restored, {len(inputs)} input and {len(targets)} target volumes "
            "(expected the same number, one a realisation)"
        )
    errors, input_errors = (
        [
            block_errors(volume, target, mask, spacing, distance=distance, block_length=block_length)
            for volume, target in zip(volumes, targets, strict=True)
        ]
        for volumes in (restored, inputs)
    )
    return ratio_score(np.array(errors), np.array(input_errors), seed=seed)


def block_errors(
    image: Array,
    target: Array,
    mask: Mask,
    spacing: tuple[float, float, float],
    *,
    distance: str = "mse",
    block_length: float = 50.0,
) -> NDArray[np.float64]:
    """Sums errors over the body in each axial block: (blocks,), as `ratio_score` needs them.

    Args:
        image, target: (i, j, k), SUV.
        distance, block_length: those of `within_patient`.

    Raises:
        ValueError: `distance` is unknown; the volumes' shapes differ.
    """
    if distance not in ("mse", "ssim"):
        raise ValueError(f"distance is {distance!r}; expected 'mse' or 'ssim'")
    check_volumes(mask, image=image, target=target)
    if distance == "mse":
        error = (image.astype(np.float64) - target) ** 2
    else:
        error = np.maximum(1 - ssim_map(image, target), 0)
    by_slice = np.where(mask, error, 0).sum(axis=(0, 1), dtype=np.float64)
    return np.asarray(np.add.reduceat(by_slice, block_starts(mask.shape[2], spacing, block_length)))


def block_starts(slices: int, spacing: tuple[float, float, float], block_length: float) -> NDArray[np.int64]:
    """Returns the first slices of axial blocks of `block_length` mm or more; one block if the volume is shorter."""
    check_spacing(spacing)
    if not block_length > 0:
        raise ValueError(f"block_length is {block_length}; expected a positive length in mm")
    blocks = max(int(slices * spacing[2] // block_length), 1)
    return np.unique(np.linspace(0, slices, blocks, endpoint=False).astype(np.int64))


def agreement(differences: ArrayLike) -> Agreement:
    """Computes bias and limits of agreement of differences; those that aren't finite are left out."""
    values = np.asarray(differences, dtype=np.float64)
    values = values[np.isfinite(values)]
    bias = float(values.mean()) if len(values) else math.nan
    sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return Agreement(bias, sd, bias - 1.96 * sd, bias + 1.96 * sd, len(values))


def pool_agreement(parts: Sequence[tuple[float, float, float]]) -> Agreement:
    """Computes the agreement over the lesions of all studies, from each study's (count, bias, sd)."""
    groups = [(int(n), bias, 0.0 if n < 2 else sd) for n, bias, sd in parts if n > 0 and math.isfinite(bias)]
    count = sum(n for n, _, _ in groups)
    if not count:
        return agreement([])
    bias = sum(n * b for n, b, _ in groups) / count
    squares = sum((n - 1) * sd**2 + n * (b - bias) ** 2 for n, b, sd in groups)
    sd = math.sqrt(squares / (count - 1)) if count > 1 else math.nan
    return Agreement(bias, sd, bias - 1.96 * sd, bias + 1.96 * sd, count)


def _multiplicities(generator: np.random.Generator, size: int) -> NDArray[Any]:
    """Draws how often each of `size` items occurs in every resample: (RESAMPLES, size)."""
    return generator.multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(np.float64)


def _interval(resampled: NDArray[Any], level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a fraction between 0 and 1, such as 0.95")
