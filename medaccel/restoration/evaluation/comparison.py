# SPDX-License-Identifier: Apache-2.0
"""Compares methods in pairs over the same studies: is one better than another, or was it luck with the studies?

Studies differ far more than methods do, so the difference is taken within each study first. The bootstrap interval
says how large it is; the paired t-test and Wilcoxon's (1945) signed-rank test, which does not assume normal
differences, say whether it can be chance. Among many comparisons one looks significant by chance: Holm's (1979)
correction holds the chance of any false claim at the level of each test. If all test studies are of one patient, the
p-values say nothing about other patients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medaccel.studies.statistics import LEVEL, Statistic, holm, mean_statistic, paired_t_test


@dataclass(frozen=True)
class PairedComparison:
    """Compares a method with another over the studies that have a value for both.

    Attributes:
        method, against: the two.
        difference: method − against, in the values' unit: mean, deviation and bootstrap interval over studies.
        larger, smaller: number of studies in which the method's value is larger, or smaller.
        t_p: two-sided p-value of the paired t-test. NaN below two studies; 1 if all differences are 0, and 0 if all
            are the same other value, t being infinite.
        wilcoxon_p: two-sided p-value of the signed-rank test. NaN without a study, 1 if all differences are 0.
        t_holm, wilcoxon_holm: the same, corrected for the number of methods compared.
    """

    method: str
    against: str
    difference: Statistic
    larger: int
    smaller: int
    t_p: float
    wilcoxon_p: float
    t_holm: float
    wilcoxon_holm: float

    def flat(self) -> dict[str, Any]:
        """Returns a flat row for CSV and JSON: `difference`, `difference_sd`, `difference_low`, `difference_high`,
        `studies`, …"""
        row = asdict(self)
        found = row.pop("difference")
        row |= {"difference": found.pop("mean"), "studies": found.pop("count")}
        return row | {f"difference_{key}": value for key, value in found.items()}


def compare_methods(
    values: Mapping[str, Sequence[float]], against: str, *, level: float = LEVEL, seed: int = 0
) -> list[PairedComparison]:
    """Compares each method with the named one, in the order given.

    Args:
        values: one value per study for each method, such as the share of the limit, studies in the same order for
            all; if either value is not finite, the study is left out of the comparison.
        against: the method that the others are compared with.
        level: level of the bootstrap interval.
        seed: seed of the bootstrap.

    Raises:
        ValueError: `against` is not among the methods, there is no other, a method has another number of studies
            than the first or none, or `level` is not within (0, 1).
    """
    if against not in values:
        raise ValueError(f"against={against!r} is not among the methods; expected one of {', '.join(values)}")
    counts = {method: len(row) for method, row in values.items()}
    if len(counts) < 2 or len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(
            f"studies a method: {counts}; expected two methods or more, with as many studies each, at least one"
        )
    base = np.asarray(values[against], dtype=np.float64)
    differences = {}
    for method, row in values.items():
        difference = np.asarray(row, dtype=np.float64) - base
        if method != against:
            differences[method] = difference[np.isfinite(difference)]
    t_p = [_t_test(difference) for difference in differences.values()]
    wilcoxon_p = [_wilcoxon(difference) for difference in differences.values()]
    t_holm, wilcoxon_holm = holm(t_p), holm(wilcoxon_p)
    return [
        PairedComparison(
            method=method,
            against=against,
            difference=mean_statistic(difference, level=level, seed=seed),
            larger=int(np.count_nonzero(difference > 0)),
            smaller=int(np.count_nonzero(difference < 0)),
            t_p=t_p[n],
            wilcoxon_p=wilcoxon_p[n],
            t_holm=t_holm[n],
            wilcoxon_holm=wilcoxon_holm[n],
        )
        for n, (method, difference) in enumerate(differences.items())
    ]


def _t_test(difference: NDArray[np.float64]) -> float:
    if len(difference) < 2:
        return math.nan
    p = paired_t_test(difference, np.zeros_like(difference))[1]
    # Values that are equal but for rounding differ certainly, or not at all.
    return p if math.isfinite(p) else (0.0 if difference.any() else 1.0)


def _wilcoxon(difference: NDArray[np.float64]) -> float:
    from scipy.stats import wilcoxon

    if not len(difference):
        return math.nan
    if not difference.any():
        return 1.0
    return float(wilcoxon(difference).pvalue)
