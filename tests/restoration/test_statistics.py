# SPDX-License-Identifier: Apache-2.0
"""Tests bootstrap intervals and agreement."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medaccel.restoration import statistics
from medaccel.restoration.statistics import agreement, mean_statistic, pool_agreement, ratio_score


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


def test_within_patient_sums_squared_errors_by_block_inside_the_mask():
    generator = np.random.default_rng(0)
    shape, spacing = (6, 5, 30), (4.0, 4.0, 5.0)
    mask = np.zeros(shape, dtype=bool)
    mask[1:5, 1:4] = True
    target = generator.normal(size=shape)
    image = target + generator.normal(size=shape)
    restored = target + 0.5 * (image - target)
    restored[~mask] = 99.0
    result = statistics.within_patient([restored], [image], [target], mask, spacing)
    assert result.mean == pytest.approx(75)
    assert result.count == 3  # 150 mm in blocks of 50


def test_within_patient_on_ssim_is_zero_for_the_input():
    generator = np.random.default_rng(0)
    target = generator.normal(2, 1, (8, 8, 24))
    image = target + generator.normal(size=target.shape)
    mask = np.ones(target.shape, dtype=bool)
    result = statistics.within_patient([image], [image], [target], mask, (5.0, 5.0, 5.0), distance="ssim")
    assert (result.mean, result.low, result.high) == (0, 0, 0)


def test_blocks_cover_all_slices_and_none_is_shorter_than_asked():
    starts = statistics.block_starts(47, (1.0, 1.0, 5.0), 50.0)
    lengths = np.diff([*starts, 47])
    assert starts[0] == 0
    assert lengths.sum() == 47
    assert lengths.min() >= 10
    assert list(statistics.block_starts(3, (1.0, 1.0, 5.0), 50.0)) == [0]


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


def test_bad_arguments_are_refused_in_a_sentence():
    volume, mask = np.zeros((2, 2, 2)), np.ones((2, 2, 2), dtype=bool)
    with pytest.raises(ValueError, match="distance is 'mae'"):
        statistics.within_patient([volume], [volume], [volume], mask, (1.0, 1.0, 1.0), distance="mae")
    with pytest.raises(ValueError, match="1 restored, 2 input and 1 target"):
        statistics.within_patient([volume], [volume] * 2, [volume], mask, (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="level is 95"):
        mean_statistic([1.0], level=95)
    with pytest.raises(ValueError, match="2 dimensions"):
        mean_statistic([[1.0]])
    with pytest.raises(ValueError, match="block_length is 0"):
        statistics.block_starts(3, (1.0, 1.0, 1.0), 0.0)
