# SPDX-License-Identifier: Apache-2.0
"""Learning curves: their mean over runs, and what the last steps added."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


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


def late_gain(curve: Sequence[tuple[int, float]]) -> float:
    """Returns by how much the last quarter of the steps raised the best Dice; NaN if it wasn't measured before."""
    if not curve:
        return math.nan
    end = curve[-1][0]
    before = [dice for step, dice in curve if step <= 0.75 * end]
    return max(dice for _, dice in curve) - max(before) if before else math.nan
