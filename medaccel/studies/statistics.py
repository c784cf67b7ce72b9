# SPDX-License-Identifier: Apache-2.0
"""Computes statistics of studies: bootstrap intervals (Efron and Tibshirani, 1993), agreement, and paired
comparisons.

A table's score is the **mean of the studies' scores**, and its interval resamples studies. The other choice, the
ratio of the summed errors, weighs a patient by the square of the uptake: with one hot bladder it is the score of that
patient. `ratio_score` is for one patient, where the ratio of sums over blocks is the score of the whole body.

If two factors are crossed (runs and cases, realisations and blocks), both are resampled, independently of each other:
the pigeonhole bootstrap (Owen, Annals of Applied Statistics 2007), which errs on the wide side.

All intervals are percentile intervals from a seeded generator: the same values give the same interval, and rows of
one table are resampled alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000
LEVEL = 0.95
_LIMITS = 1.96  # standard deviations: 95 % of a normal distribution lie within
_ROUNDING = 1e-12  # share of the values: smaller differences are rounding


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


@dataclass(frozen=True)
class Spread:
    """Holds mean and standard deviation (n − 1) over `runs`; the deviation of one run and both of none are NaN."""

    mean: float
    sd: float
    runs: int


@dataclass(frozen=True)
class Comparison:
    """Holds the difference first less second, over pairs of runs.

    Args:
        difference, sd: mean and standard deviation of the runs' differences.
        t, p: statistic and p-value of the paired t test, two-sided; NaN below two runs, or if all differences are
            equal.
        low, high: 95 % bootstrap interval of the mean difference over runs × cases.
        runs, cases: their numbers.
        won: number of runs in which the first is higher.
    """

    difference: float
    sd: float
    t: float
    p: float
    low: float
    high: float
    runs: int
    cases: int
    won: int


def spread(values: ArrayLike) -> Spread:
    """Summarises one value per run; values that aren't finite are left out."""
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    if not len(array):
        return Spread(math.nan, math.nan, 0)
    sd = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    return Spread(float(array.mean()), sd, len(array))


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

    Both are resampled; with one realisation, the blocks alone. The interval says how certain the score of *this*
    patient is; it says nothing about other patients.

    Args:
        errors, input_errors: (realisations, blocks), summed errors of the restored and of the unrestored image.

    Returns:
        A `Statistic`, whose sd is the standard deviation of the blocks' own scores and whose count is realisations ·
        blocks.

    Raises:
        ValueError: shapes differ or are not 2-D, a value is negative or not finite, or all input errors are 0.
    """
    errors, input_errors = np.asarray(errors, np.float64), np.asarray(input_errors, np.float64)
    _check_level(level)
    if errors.ndim != 2 or errors.shape != input_errors.shape or not errors.size:
        raise ValueError(
            f"errors has shape {errors.shape}, input_errors {input_errors.shape}; "
            "expected the same, (realisations, blocks)"
        )
    for name, array in (("errors", errors), ("input_errors", input_errors)):
        if not (np.isfinite(array).all() and (array >= 0).all()):
            raise ValueError(f"{name} has values that are negative or not finite; expected sums of errors")
    if not input_errors.sum() > 0:
        raise ValueError("input_errors are all 0: the input equals its target, and the score is undefined")
    drawn = _pigeonhole(errors.shape, seed)
    restored, unrestored = _weighted_sums(errors, *drawn), _weighted_sums(input_errors, *drawn)
    value = 100 * (1 - errors.sum() / input_errors.sum())
    if errors.size < 2:
        return Statistic(value, math.nan, math.nan, math.nan, 1)
    defined = unrestored > 0
    low, high = _interval(100 * (1 - restored[defined] / unrestored[defined]), level)
    own = 100 * (1 - errors[input_errors > 0] / input_errors[input_errors > 0])
    sd = float(own.std(ddof=1)) if own.size > 1 else math.nan
    return Statistic(float(value), sd, low, high, errors.size)


def agreement(differences: ArrayLike) -> Agreement:
    """Computes bias and limits of agreement of differences; those that aren't finite are left out."""
    values = np.asarray(differences, dtype=np.float64)
    values = values[np.isfinite(values)]
    bias = float(values.mean()) if len(values) else math.nan
    sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return Agreement(bias, sd, bias - _LIMITS * sd, bias + _LIMITS * sd, len(values))


def pool_agreement(parts: Sequence[tuple[float, float, float]]) -> Agreement:
    """Computes the agreement over the lesions of all studies, from each study's (count, bias, sd)."""
    groups = [(int(n), bias, 0.0 if n < 2 else sd) for n, bias, sd in parts if n > 0 and math.isfinite(bias)]
    count = sum(n for n, _, _ in groups)
    if not count:
        return agreement([])
    bias = sum(n * b for n, b, _ in groups) / count
    squares = sum((n - 1) * sd**2 + n * (b - bias) ** 2 for n, b, sd in groups)
    sd = math.sqrt(squares / (count - 1)) if count > 1 else math.nan
    return Agreement(bias, sd, bias - _LIMITS * sd, bias + _LIMITS * sd, count)


def compare(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Comparison:
    """Compares the scores of two groups of runs, in pairs of runs.

    Args:
        first, second: (runs, cases), scores of the same cases by runs of the same seeds.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the arrays don't have two axes, differ in shape, are empty, or hold values that aren't finite.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise ValueError(f"first has shape {a.shape} and second {b.shape}; expected the same, (runs, cases)")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("first or second holds values that are not finite; expected a score for each run and case")
    differences = a - b
    per_run = differences.mean(axis=1)
    t, p = paired_t_test(a.mean(axis=1), b.mean(axis=1))
    low, high = interval(differences, seed=seed)
    found = spread(per_run)
    runs, cases = differences.shape
    return Comparison(found.mean, found.sd, t, p, low, high, runs, cases, int((per_run > 0).sum()))


def interval(values: ArrayLike, *, seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """Returns the bootstrap interval of the mean of (runs, cases).

    Both are resampled. The interval of a single value is NaN.

    Raises:
        ValueError: the values don't have two axes or are empty, or `level` is outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"values has shape {array.shape}; expected (runs, cases)")
    _check_level(level)
    if array.size < 2:
        return math.nan, math.nan
    drawn = _pigeonhole(array.shape, seed)
    runs, cases = (counts / size for counts, size in zip(drawn, array.shape, strict=True))
    return _interval(_weighted_sums(array, runs, cases), level)


def paired_t_test(first: NDArray[Any], second: NDArray[Any]) -> tuple[float, float]:
    """Returns the statistic and the two-sided p value of Student's paired t test.

    Both are NaN below two pairs, or if all differences are equal but for rounding: SciPy would divide by a deviation
    of 0, or by rounding errors.
    """
    from scipy.stats import ttest_rel

    scale = max(float(np.abs(values).max(initial=0.0)) for values in (first, second))
    if len(first) < 2 or np.ptp(first - second) <= _ROUNDING * scale:
        return math.nan, math.nan
    tested = ttest_rel(first, second)
    return float(tested.statistic), float(tested.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Applies Holm's (1979) step-down correction: the k-th smallest of m times m − k + 1, never decreasing, at most
    1.

    NaN stand for no test: they stay, and don't count.

    Raises:
        ValueError: a value is outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    tests = np.flatnonzero(np.isfinite(p))
    if ((p < 0) | (p > 1)).any() or np.isinf(p).any():
        raise ValueError(f"p_values is {list(p_values)}; expected values of 0 to 1, or NaN")
    order = tests[np.argsort(p[tests], kind="stable")]
    corrected = p.copy()
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return [float(value) for value in corrected]


def _pigeonhole(shape: tuple[int, ...], seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Draws how often each row and each column of a table occurs: (RESAMPLES, rows) and (RESAMPLES, columns)."""
    generator = np.random.default_rng(seed)
    rows, columns = (
        generator.multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(np.float64) for size in shape
    )
    return rows, columns


def _weighted_sums(table: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[Any]:
    """Sums a table's elements, (n,), weighted by the n-th weights of its rows and of its columns."""
    sums: NDArray[Any] = np.einsum("nr,rc,nc->n", rows, table, columns, optimize=True)
    return sums


def _interval(resampled: NDArray[Any], level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level:g}; expected above 0 and below 1")
