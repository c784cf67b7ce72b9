# SPDX-License-Identifier: Apache-2.0
"""Compares runs with runs: mean ± standard deviation, paired t, and an interval over runs and cases together.

A run is one seed: one split, one order of the training data, one of the pretrained weights. Runs of two
initializations are compared in pairs, seed by seed. Six runs say how much training varies; the interval resamples the
test cases too, and so covers other patients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 4000
LEVEL = 0.95


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


def compare(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Comparison:
    """Compares two initializations.

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
    t = p = math.nan
    if len(per_run) > 1 and np.ptp(per_run) > 1e-12:
        from scipy.stats import ttest_rel

        tested = ttest_rel(a.mean(axis=1), b.mean(axis=1))
        t, p = float(tested.statistic), float(tested.pvalue)
    low, high = interval(differences, seed=seed)
    found = spread(per_run)
    runs, cases = differences.shape
    return Comparison(found.mean, found.sd, t, p, low, high, runs, cases, int((per_run > 0).sum()))


def interval(values: ArrayLike, *, seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """Returns the bootstrap interval of the mean of (runs, cases).

    Runs and cases are crossed, so both are resampled, independently of each other (the pigeonhole bootstrap, Owen,
    Annals of Applied Statistics 2007, which errs on the wide side). The interval of a single value is NaN.

    Raises:
        ValueError: the values don't have two axes or are empty, or `level` is outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"values has shape {array.shape}; expected (runs, cases)")
    if not 0 < level < 1:
        raise ValueError(f"level is {level:g}; expected above 0 and below 1")
    if array.size < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    runs, cases = (_shares(generator, count) for count in array.shape)
    means = np.einsum("nr,rc,nc->n", runs, array, cases, optimize=True)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _shares(generator: np.random.Generator, count: int) -> np.ndarray:
    """Returns (RESAMPLES, count): how often each is drawn, as a share of all draws."""
    return generator.multinomial(count, [1 / count] * count, size=RESAMPLES) / count


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float], list[float]]:
    """Returns the steps that all runs were validated at, and the mean and standard deviation of their values there.

    The deviation is 0 for one run.
    """
    if not curves:
        return [], [], []
    found = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(values) for values in found)))
    table = np.array([[values[step] for step in steps] for values in found], dtype=np.float64).reshape(len(found), -1)
    deviation = table.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(len(steps))
    return steps, table.mean(axis=0).tolist(), deviation.tolist()
