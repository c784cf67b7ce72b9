# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals, agreement, and comparisons of runs, against calculations by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from medaccel.studies.statistics import (
    agreement,
    compare,
    interval,
    mean_statistic,
    paired_t_test,
    pool_agreement,
    ratio_score,
    spread,
)


def test_the_interval_is_reproducible_and_depends_on_the_seed():
    values = np.random.default_rng(0).normal(10, 2, 30)
    first, second = mean_statistic(values), mean_statistic(values)
    assert first == second
    assert mean_statistic(values, seed=1) != first


def test_the_interval_of_a_normal_sample_is_the_textbooks():
    values = np.random.default_rng(0).normal(10, 2, 200)
    result = mean_statistic(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert result.mean == pytest.approx(values.mean())
    assert result.low == pytest.approx(values.mean() - half, abs=0.03)
    assert result.high == pytest.approx(values.mean() + half, abs=0.03)


def test_a_95_percent_interval_covers_the_mean_about_95_times_in_100():
    generator = np.random.default_rng(5)
    covered = sum(
        result.low <= 1.0 <= result.high
        for result in (mean_statistic(generator.gamma(2.0, 0.5, 40), seed=n) for n in range(200))
    )
    assert 0.88 < covered / 200 < 0.99


def test_studies_without_a_value_are_left_out():
    result = mean_statistic([1.0, math.nan, 3.0, math.inf])
    assert (result.mean, result.count) == (2.0, 2)


@pytest.mark.parametrize(("values", "mean"), [([], math.nan), ([math.nan], math.nan), ([4.0], 4.0)])
def test_one_study_or_none_has_no_interval(values: list[float], mean: float):
    result = mean_statistic(values)
    assert result.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(result.low)
    assert math.isnan(result.sd)


def test_within_patient_score_is_that_of_the_summed_errors():
    errors, before = np.array([[1.0, 30.0], [2.0, 40.0]]), np.array([[2.0, 60.0], [4.0, 50.0]])
    result = ratio_score(errors, before)
    assert result.mean == pytest.approx(100 * (1 - 73 / 116))
    assert result.low < result.mean < result.high
    assert result == ratio_score(errors, before)


def test_within_patient_interval_of_equal_blocks_has_no_width():
    result = ratio_score(np.full((2, 5), 3.0), np.full((2, 5), 4.0))
    assert (result.low, result.mean, result.high) == pytest.approx((25, 25, 25))


def test_agreement_is_bias_and_1_96_standard_deviations():
    result = agreement([-10.0, 0.0, 4.0, math.nan])
    sd = np.std([-10, 0, 4], ddof=1)
    assert result.bias == pytest.approx(-2)
    assert (result.low, result.high) == pytest.approx((-2 - 1.96 * sd, -2 + 1.96 * sd))
    assert result.count == 3


def test_pooled_agreement_is_that_of_all_lesions_together():
    groups = [[1.0, 5.0, -3.0], [20.0], [], [7.0, 7.5]]
    parts = [(result.count, result.bias, result.sd) for result in map(agreement, groups)]
    pooled, together = pool_agreement(parts), agreement([value for group in groups for value in group])
    assert pooled.count == together.count
    assert (pooled.bias, pooled.sd, pooled.low) == pytest.approx((together.bias, together.sd, together.low))
    assert math.isnan(pool_agreement([]).bias)


@pytest.mark.parametrize(
    ("errors", "before", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), "expected the same"),
        (np.ones(3), np.ones(3), "expected the same"),
        (-np.ones((1, 2)), np.ones((1, 2)), "errors has values that are negative"),
        (np.ones((1, 2)), np.full((1, 2), np.nan), "input_errors has values"),
        (np.ones((1, 2)), np.zeros((1, 2)), "input_errors are all 0"),
    ],
)
def test_bad_errors_are_refused(errors: np.ndarray, before: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        ratio_score(errors, before)


def test_bad_values_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="level is 95; expected above 0 and below 1"):
        mean_statistic([1.0], level=95)
    with pytest.raises(ValueError, match="2 dimensions"):
        mean_statistic([[1.0]])


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


def test_unfit_tables_are_refused():
    with pytest.raises(ValueError, match=r"first has shape \(2, 3\) and second \(2, 2\); expected the same"):
        compare(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="values that are not finite; expected a score for each run and case"):
        compare([[1.0, math.nan]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"values has shape \(3,\); expected \(runs, cases\)"):
        interval([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="level is 1; expected above 0 and below 1"):
        interval([[1.0, 2.0]], level=1.0)


def test_both_pigeonhole_intervals_draw_alike():
    """The interval of a mean is that of the ratio to a table of ones, whose score is 100 · (1 − mean)."""
    table = np.random.default_rng(0).uniform(0.1, 0.9, (5, 7))
    low, high = interval(table, seed=4)
    found = ratio_score(table, np.ones_like(table), seed=4)
    assert (found.low, found.high) == pytest.approx((100 * (1 - high), 100 * (1 - low)))


def test_pairs_that_differ_alike_but_for_rounding_have_no_t():
    base = np.array([0.1, 0.2, 0.7])
    assert math.isnan(paired_t_test(base + 0.3, base)[0])
    assert math.isnan(paired_t_test(base[:1], base[1:2])[1])
    assert paired_t_test(np.array([1.0, 2.0, 4.0]), np.zeros(3)) == pytest.approx(
        (7 / math.sqrt(7), stats.ttest_1samp([1.0, 2.0, 4.0], 0).pvalue)
    )
