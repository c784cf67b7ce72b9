# SPDX-License-Identifier: Apache-2.0
"""Tells whether two scorings put methods into the same order: Kendall's (1938) τ, and which methods change places."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RankAgreement:
    """Compares the order of methods in two scorings.

    Attributes:
        first, second: names of the scorings.
        methods: number of methods that both have.
        tau: Kendall's τ-b: 1 for the same order, −1 for the reverse; NaN if one scoring has the same value for all.
        same_order: no two methods change places.
        same_best: both have the same best method.
        swapped: the pairs that change places, the one that is better in the first scoring before the other.
    """

    first: str
    second: str
    methods: int
    tau: float
    same_order: bool
    same_best: bool
    swapped: tuple[tuple[str, str], ...]

    def flat(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self) | {"swapped": [list(pair) for pair in self.swapped]}


def compare_rankings(
    first: str, values: Mapping[str, float], second: str, others: Mapping[str, float]
) -> RankAgreement:
    """Compares the order of the methods that both scorings have; larger values are better.

    Args:
        first, second: names of the scorings.
        values, others: a finite value for each method in the first and in the second scoring.

    Raises:
        ValueError: fewer than two methods are in both.
    """
    from scipy.stats import kendalltau

    common = sorted((name for name in values if name in others), key=lambda name: -values[name])
    if len(common) < 2:
        raise ValueError(f"{first} and {second} have {len(common)} methods in common; expected at least two")
    swapped = tuple(
        (a, b) for a, b in itertools.combinations(common, 2) if (values[a] - values[b]) * (others[a] - others[b]) < 0
    )
    tau = float(kendalltau([values[name] for name in common], [others[name] for name in common]).statistic)
    best = max(common, key=lambda name: others[name])
    return RankAgreement(first, second, len(common), tau, not swapped, values[best] == values[common[0]], swapped)
