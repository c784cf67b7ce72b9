# SPDX-License-Identifier: Apache-2.0
"""Tests learning curves against calculations by hand."""

import math

import pytest

from medaccel.segmentation.evaluation.curves import mean_curve


def test_learning_curves_are_averaged_where_all_runs_were_validated():
    steps, means, deviations = mean_curve([[(10, 0.2), (20, 0.4)], [(10, 0.4), (20, 0.8), (30, 0.9)]])
    assert steps == [10, 20]
    assert means == pytest.approx([0.3, 0.6])
    assert deviations == pytest.approx([0.1 * math.sqrt(2), 0.2 * math.sqrt(2)])
    assert mean_curve([[(5, 0.5)]]) == ([5], [0.5], [0.0])
    assert mean_curve([]) == ([], [], [])
