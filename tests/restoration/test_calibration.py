# SPDX-License-Identifier: Apache-2.0
"""Calibrated intervals cover what they say, and their score is the published one."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from medaccel.restoration.evaluation.calibration import (
    BY_SUV,
    CALIBRATED,
    CONSTANT,
    KINDS,
    UNCALIBRATED,
    Calibration,
    Item,
    coverage,
    fit_calibration,
    interval_score,
)

SHAPE = (40, 30, 30)
MASK = np.ones(SHAPE, dtype=bool)


def _item(seed: int, *, claimed: float = 1.0, mask: np.ndarray = MASK) -> Item:
    """Normal errors whose deviation varies ninefold, at SUV of 0.2 to 12; the predicted one is `claimed` times it."""
    generator = np.random.default_rng(seed)
    mean = np.exp(generator.uniform(math.log(0.2), math.log(12), SHAPE))
    sd = np.exp(generator.uniform(-3, -0.8, SHAPE))
    return mean + sd * generator.normal(size=SHAPE), mean, claimed * sd, mask


def test_normal_errors_with_the_true_deviation_need_no_calibration():
    calibration = fit_calibration(_item(seed) for seed in range(4))
    assert calibration.pooled == pytest.approx(1.645, abs=0.01)
    assert calibration.factors == pytest.approx([1.645] * 6, abs=0.06)
    assert calibration.studies == 4
    assert sum(calibration.voxels) == 4 * MASK.sum()
    result = coverage(calibration, [_item(10)])
    assert result.overall.intervals[CALIBRATED].coverage == pytest.approx(0.9, abs=0.006)
    assert result.overall.intervals[UNCALIBRATED].coverage == pytest.approx(0.9, abs=0.006)


@pytest.mark.parametrize("claimed", [0.5, 2.0])
def test_a_deviation_that_is_wrong_by_two_is_mended_by_the_factor(claimed: float):
    calibration = fit_calibration([_item(seed, claimed=claimed) for seed in range(4)])
    assert calibration.pooled == pytest.approx(1.645 / claimed, rel=0.01)
    row = coverage(calibration, [_item(10, claimed=claimed)]).overall
    assert row.intervals[CALIBRATED].coverage == pytest.approx(0.9, abs=0.006)
    # P(|z| < 0.8224) and P(|z| < 3.29).
    expected = {0.5: 0.5892, 2.0: 0.9990}[claimed]
    assert row.intervals[UNCALIBRATED].coverage == pytest.approx(expected, abs=0.008)
    assert row.intervals[CALIBRATED].score < row.intervals[UNCALIBRATED].score


def test_eight_perfect_samples_need_twice_their_deviation():
    # Student's t with 7 degrees of freedom, and the mean's own error: 1.895·√(1 + 1/8).
    generator = np.random.default_rng(0)
    draws = generator.normal(size=(9, *SHAPE))
    truth, samples = draws[0], draws[1:]
    calibration = fit_calibration([(truth, samples.mean(axis=0), samples.std(axis=0, ddof=1), MASK)], edges=())
    assert calibration.pooled == pytest.approx(2.01, abs=0.04)


def test_each_suv_bin_gets_its_own_factor():
    truth, mean, sd, mask = _item(0)
    hot = mean >= 4
    claimed = np.where(hot, sd / 3, sd)
    calibration = fit_calibration([(truth, mean, claimed, mask)])
    assert calibration.factors[:4] == pytest.approx([1.645] * 4, abs=0.1)
    assert calibration.factors[4:] == pytest.approx([3 * 1.645] * 2, abs=0.3)
    rows = coverage(calibration, [(truth, mean, claimed, mask)]).group("suv")
    assert [row.label for row in rows] == ["below 0.5", "0.5–1", "1–2", "2–4", "4–8", "8 and more"]
    assert [row.voxels for row in rows] == list(calibration.voxels)
    assert [row.intervals[CALIBRATED].coverage for row in rows] == pytest.approx([0.9] * 6, abs=1e-3)


def test_on_its_own_voxels_the_quantile_covers_exactly_the_conformal_rank():
    item = _item(3)
    calibration = fit_calibration([item], edges=())
    row = coverage(calibration, [item]).overall
    rank = math.ceil((MASK.sum() + 1) * 0.9)
    assert row.intervals[CALIBRATED].coverage * row.voxels == pytest.approx(rank)
    assert row.intervals[CONSTANT].coverage * row.voxels == pytest.approx(rank)


def test_bins_with_few_voxels_borrow_the_pooled_factor():
    calibration = fit_calibration([_item(0)], edges=(1.0, 11.9), least_voxels=1000)
    assert 0 < calibration.voxels[2] < 1000
    assert calibration.factors[2] == calibration.pooled != calibration.factors[0]
    assert calibration.constants[2] == calibration.constant != calibration.constants[0]
    empty = fit_calibration([_item(0)], edges=(100.0,))
    assert (empty.voxels[1], empty.factors[1]) == (0, empty.pooled)
    row = coverage(empty, [_item(1)]).group("suv")[1]
    assert row.voxels == 0
    assert math.isnan(row.intervals[CALIBRATED].coverage)


def test_rows_by_deviation_are_tenths_of_the_voxels_in_its_order():
    calibration = fit_calibration([_item(0)])
    result = coverage(calibration, [_item(1), _item(2)])
    rows = result.group("deviation")
    assert [row.label for row in rows] == [str(n) for n in range(1, 11)]
    total = 2 * MASK.sum()
    assert sum(row.voxels for row in rows) == total
    assert all(row.voxels == pytest.approx(total / 10, rel=0.06) for row in rows)
    assert np.all(np.diff([row.deviation for row in rows]) > 0)
    # A constant width is too wide where little error is expected and too narrow where much is.
    constant = [row.intervals[CONSTANT].coverage for row in rows]
    assert constant[0] == 1.0
    assert constant[-1] < 0.75
    assert all(row.intervals[CALIBRATED].coverage == pytest.approx(0.9, abs=0.02) for row in rows)


def test_an_informative_deviation_has_the_best_score_and_the_rows_add_up():
    result = coverage(fit_calibration([_item(0)]), [_item(1)])
    scores = {kind: result.overall.intervals[kind].score for kind in KINDS}
    assert scores[CALIBRATED] < 0.8 * min(scores[CONSTANT], scores[BY_SUV])
    rows = result.group("suv")
    for kind in KINDS:
        mean = sum(row.voxels * row.intervals[kind].width for row in rows) / result.overall.voxels
        assert result.overall.intervals[kind].width == pytest.approx(mean)


def test_rows_are_means_over_the_mask_alone():
    mask = np.zeros(SHAPE, dtype=bool)
    mask[5:30, 4:20, 3:25] = True
    truth, mean, sd, _ = _item(0)
    bad = np.where(mask, truth, 1e6)
    calibration = fit_calibration([(bad, mean, sd, mask)])
    row = coverage(calibration, [(bad, mean, sd, mask)]).overall
    half = calibration.half_width(mean, sd)[mask]
    inside = np.abs(truth - mean)[mask] <= half
    outside = np.maximum(np.abs(truth - mean)[mask] - half, 0)
    assert row.voxels == mask.sum()
    assert row.mean == pytest.approx(mean[mask].mean())
    assert row.deviation == pytest.approx(sd[mask].mean())
    quality = row.intervals[CALIBRATED]
    assert quality.coverage == pytest.approx(inside.mean())
    assert quality.width == pytest.approx(2 * half.mean())
    assert quality.score == pytest.approx((2 * half + 20 * outside).mean())


def test_interval_score_by_hand():
    # 90 %: the width, and 20 times what the truth is outside by.
    scores = interval_score([2.0, 0.5, 3.25, 1.0], [1.0] * 4, [3.0] * 4, 0.9)
    assert scores == pytest.approx([2.0, 2.0 + 20 * 0.5, 2.0 + 20 * 0.25, 2.0])
    assert interval_score(0.0, 1.0, 1.5, 0.5) == pytest.approx(0.5 + 4 * 1.0)


def test_coverage_of_each_study_gives_an_interval_over_studies():
    calibration = fit_calibration([_item(0)])
    wide, narrow = _item(1, claimed=2.0), _item(2, claimed=0.5)
    result = coverage(calibration, [wide, narrow, _item(3)])
    assert result.studies == pytest.approx([0.999, 0.589, 0.9], abs=0.01)
    statistic = result.statistic()
    assert statistic.mean == pytest.approx(np.mean(result.studies))
    assert statistic.low < statistic.mean < statistic.high
    assert result.overall.intervals[CALIBRATED].coverage == pytest.approx(statistic.mean)  # studies of one size


def test_samples_that_agree_are_defined_by_the_floor():
    zero = np.zeros(SHAPE)
    calibration = fit_calibration([(zero, zero, zero, MASK)])
    assert calibration.pooled == pytest.approx(0, abs=1e-40)
    shifted = fit_calibration([(zero + 0.05, zero, zero, MASK)], floor=0.01)
    assert shifted.pooled == pytest.approx(5)
    result = coverage(shifted, [(zero + 0.05, zero, zero, MASK)])
    assert result.overall.intervals[CALIBRATED].coverage == 1
    assert result.overall.intervals[UNCALIBRATED].coverage == 0
    assert sum(row.voxels for row in result.group("deviation")) == MASK.sum()


def test_it_says_what_is_covered_and_survives_json():
    calibration = fit_calibration([_item(0)], 0.8, covers="target", edges=(1, 2))
    assert coverage(calibration, [_item(1)]).covers == "target"
    text = calibration.to_json()
    assert Calibration.from_json(text) == calibration
    assert json.loads(text)["covers"] == "target"
    row = coverage(calibration, [_item(1)]).overall.flat()
    assert row["coverage_calibrated"] == pytest.approx(0.8, abs=0.01)
    assert {type(value) for value in row.values()} == {str, int, float}


@pytest.mark.parametrize("level", [0, 1, 90, -0.1, math.nan])
def test_a_level_outside_0_and_1_is_refused(level: float):
    with pytest.raises(ValueError, match="level is "):
        fit_calibration([_item(0)], level)
    with pytest.raises(ValueError, match="level is "):
        interval_score(1, 0, 2, level)


def test_bad_items_are_refused_in_a_sentence():
    truth, mean, sd, mask = _item(0)
    calibration = fit_calibration([_item(0)])
    broken = mean.copy()
    broken[3, 3, 3] = math.nan
    bad: list[tuple[Item, str]] = [
        ((truth[1:], mean, sd, mask), "item 1: truth has shape"),
        ((truth, broken, sd, mask), "item 1: mean has 1 voxels that are NaN"),
        ((truth, mean, sd, np.zeros_like(mask)), "item 1: mask is empty"),
        ((truth, mean, -sd, mask), "item 1: std has a least value of -"),
    ]
    for item, message in bad:
        with pytest.raises(ValueError, match=message):
            fit_calibration([_item(0), item])
        with pytest.raises(ValueError, match=message):
            coverage(calibration, [_item(0), item])
    with pytest.raises(ValueError, match="fit_calibration got no items"):
        fit_calibration([])
    with pytest.raises(ValueError, match="coverage got no items"):
        coverage(calibration, [])
    tiny = np.zeros_like(mask)
    tiny[0, 0, :8] = True
    with pytest.raises(ValueError, match=r"8 voxels in all; expected at least 9 for level=0.9"):
        fit_calibration([(truth, mean, sd, tiny)])
    with pytest.raises(ValueError, match="mean has shape"):
        calibration.half_width(mean, sd[1:])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"covers": "lambda"}, "covers is 'lambda'"),
        ({"edges": (2.0, 1.0)}, "expected increasing SUV"),
        ({"floor": 0.0}, "floor is 0.0"),
        ({"least_voxels": 0}, "least_voxels is 0"),
    ],
)
def test_bad_options_are_refused(option: dict, message: str):
    with pytest.raises(ValueError, match=message):
        fit_calibration([_item(0)], **option)


def test_a_calibration_that_does_not_fit_together_is_refused():
    calibration = fit_calibration([_item(0)])
    with pytest.raises(ValueError, match="expected one value per bin"):
        dataclasses.replace(calibration, factors=(1.0,))
    with pytest.raises(ValueError, match="expected finite"):
        dataclasses.replace(calibration, pooled=math.nan)
    for text in ("[]", "{}", "no json", '{"level": "x"}'):
        with pytest.raises(ValueError, match="not the JSON of a calibration"):
            Calibration.from_json(text)
