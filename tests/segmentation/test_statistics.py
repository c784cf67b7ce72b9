# SPDX-License-Identifier: Apache-2.0
"""Statistics over runs and cases, against calculations by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from medaccel.segmentation.statistics import compare, interval, mean_curve, spread


def test_the_deviation_over_runs_is_that_of_a_sample():
    found = spread([80.0, 82.0, 87.0])
    assert found.mean == pytest.approx(83)
    assert found.sd == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert found.runs == 3


def test_runs_without_a_value_are_left_out_and_one_run_has_no_deviation():
    assert spread([1.0, math.nan, 3.0]).runs == 2
    assert spread([5.0]).mean == 5
    assert math.isnan(spread([5.0]).sd)
    assert math.isnan(spread([]).mean)


def test_the_paired_t_is_of_the_runs_means():
    generator = np.random.default_rng(0)
    first, second = generator.normal(80, 5, (6, 20)), generator.normal(77, 5, (6, 20))
    found = compare(first, second)
    difference = (first - second).mean(axis=1)
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(6))
    assert found.t == pytest.approx(t)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 5))
    assert found.difference == pytest.approx(difference.mean())
    assert found.sd == pytest.approx(difference.std(ddof=1))
    assert (found.runs, found.cases, found.won) == (6, 20, int((difference > 0).sum()))


def test_where_all_runs_differ_alike_there_is_no_t():
    found = compare([[81.0, 83.0], [82.0, 84.0]], [[80.0, 82.0], [81.0, 83.0]])
    assert found.difference == pytest.approx(1)
    assert math.isnan(found.t)
    assert math.isnan(found.p)
    assert math.isnan(compare([[1.0, 2.0]], [[0.0, 0.5]]).p)


@pytest.mark.parametrize(("axis", "count"), [(0, 12), (1, 40)])
def test_the_interval_holds_what_varies_between_runs_and_what_between_cases(axis: int, count: int):
    """Differences that vary along one axis alone: the interval is that axis's bootstrap interval."""
    generator = np.random.default_rng(1)
    values = generator.normal(2, 1, count)
    table = np.broadcast_to(values[:, None], (count, 8)) if axis == 0 else np.broadcast_to(values, (6, count))
    low, high = interval(table)
    error = values.std() / math.sqrt(count)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_the_interval_is_the_same_every_time_and_wider_than_one_over_runs_alone():
    generator = np.random.default_rng(2)
    table = generator.normal(0, 1, (6, 1)) + generator.normal(0, 2, (1, 20)) + generator.normal(0, 1, (6, 20))
    both = interval(table, seed=3)
    assert both == interval(table, seed=3)
    assert both != interval(table, seed=4)
    runs = interval(np.broadcast_to(table.mean(axis=1, keepdims=True), table.shape), seed=3)
    assert both[1] - both[0] > 1.2 * (runs[1] - runs[0])


def test_learning_curves_are_averaged_where_all_runs_were_validated():
    steps, means, deviations = mean_curve([[(10, 0.2), (20, 0.4)], [(10, 0.4), (20, 0.8), (30, 0.9)]])
    assert steps == [10, 20]
    assert means == pytest.approx([0.3, 0.6])
    assert deviations == pytest.approx([0.1 * math.sqrt(2), 0.2 * math.sqrt(2)])
    assert mean_curve([[(5, 0.5)]]) == ([5], [0.5], [0.0])
    assert mean_curve([]) == ([], [], [])


def test_unfit_tables_are_refused():
    with pytest.raises(ValueError, match=r"first has shape \(2, 3\) and second \(2, 2\); expected the same"):
        compare(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="values that are not finite; expected a score for each run and case"):
        compare([[1.0, math.nan]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"values has shape \(3,\); expected \(runs, cases\)"):
        interval([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="level is 1; expected above 0 and below 1"):
        interval([[1.0, 2.0]], level=1.0)
