# SPDX-License-Identifier: Apache-2.0
"""Tests a method's row on a study, and the table over studies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from scipy import ndimage

from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.study_scores import StudyEvaluator, summarize

SHAPE = (30, 28, 32)


@dataclass(frozen=True)
class SimulatedStudy:
    name: str = "phantom"
    spacing: tuple[float, float, float] = (4.0, 4.0, 4.0)
    exposures: dict[int, np.ndarray] = field(default_factory=dict)
    noise_free: np.ndarray | None = None
    lesions: np.ndarray | None = None
    organs: np.ndarray | None = None
    organ_names: dict[str, int] | None = None


def evaluate(restored: np.ndarray, study: SimulatedStudy, *seconds: int) -> dict[str, float]:
    return StudyEvaluator(study, *seconds).evaluate(restored)


@pytest.fixture(scope="module")
def study() -> SimulatedStudy:
    """Makes a linear model: a truth with a liver and three lesions, and nested increments of Gaussian noise."""
    generator = np.random.default_rng(7)
    truth = np.zeros(SHAPE)
    truth[3:-3, 3:-3] = 1.0
    organs = np.zeros(SHAPE, dtype=np.uint8)
    organs[4:16, 4:24, 16:30] = 5
    truth[organs == 5] = 2.0
    labels = np.zeros(SHAPE, dtype=np.int16)
    labels[20:23, 8:11, 6:9], labels[20:22, 20, 24], labels[21:24, 20:23, 8:11] = 1, 2, 3
    truth[labels == 1], truth[labels == 2], truth[labels == 3] = 6.0, 8.0, 0.1
    seconds = [ndimage.gaussian_filter(generator.normal(0, 4.0, SHAPE), 0.7) for _ in range(3)]
    exposures = {30 * (n + 1): truth + sum(seconds[: n + 1]) / (n + 1) / math.sqrt(30) for n in range(3)}
    return SimulatedStudy("phantom", (4.0, 4.0, 4.0), exposures, truth, labels, organs, {"liver": 5})


@pytest.fixture(scope="module")
def evaluator(study: SimulatedStudy) -> StudyEvaluator:
    return StudyEvaluator(study, 60, 90)


def test_the_input_itself_scores_zero_on_every_distance(study: SimulatedStudy, evaluator: StudyEvaluator):
    row = evaluator.evaluate(study.exposures[60])
    scores = {key: value for key, value in row.items() if key.startswith(("score_", "truth_score"))}
    assert len(scores) == 6
    assert all(value == 0 for value in scores.values())
    assert row["equivalent_seconds"] == 60
    assert row["implied_truth_score"] == pytest.approx(0)


@pytest.mark.parametrize(("seconds", "limit"), [(60, 33.3), (30, 66.7)])
def test_the_oracle_scores_the_limit(study: SimulatedStudy, seconds: int, limit: float):
    evaluator = StudyEvaluator(study, seconds, 90)
    best = metrics.oracle(study.exposures[seconds], study.noise_free, seconds, 90)
    row = evaluator.evaluate(best)
    assert row["score_mse"] == pytest.approx(limit, abs=3)
    assert row["share_of_limit"] == pytest.approx(row["score_mse"] / 100 / metrics.mse_limit(seconds, 90))
    assert row["implied_truth_score"] == pytest.approx(100)
    assert row["ceiling_score_ssim"] >= row["score_ssim"] - 0.01


def test_the_truth_scores_badly_against_the_noisy_target_and_perfectly_against_itself(
    study: SimulatedStudy, evaluator: StudyEvaluator
):
    row = evaluator.evaluate(study.noise_free)
    assert row["score_mse"] == pytest.approx(-100, abs=12)
    assert row["score_ssim"] < row["score_mse"]
    assert (row["truth_mse"], row["truth_score_mse"], row["truth_psnr"]) == (0, 100, math.inf)
    assert row["truth_ssim_distance"] == pytest.approx(0, abs=1e-12)
    for measure in ("suvmean", "suvmax", "suvpeak"):
        assert row[f"lesion_large_{measure}_bias"] == 0
    assert row["lesion_large_lost"] == row["lesion_small_lost"] == row["hot_spots_small"] == 0


def test_lesions_are_grouped_by_size_and_sign(study: SimulatedStudy, evaluator: StudyEvaluator):
    halved = np.where(study.lesions > 0, 0.5 * study.noise_free, study.noise_free)
    row = evaluator.evaluate(halved)
    assert [row[f"lesion_{group}_count"] for group in ("large", "small", "cold")] == [1, 1, 1]
    assert row["lesion_large_suvmean_bias"] == pytest.approx(-50)
    assert row["lesion_small_suvmax_bias"] == pytest.approx(-50)
    assert row["lesion_cold_suvmean_bias"] == pytest.approx(-50)
    assert (row["lesion_large_lost"], row["lesion_small_lost"]) == (1, 1)  # 6 → 3 and 8 → 4, over 1


def test_a_created_hot_spot_is_counted_by_size(study: SimulatedStudy, evaluator: StudyEvaluator):
    restored = study.noise_free.copy()
    restored[8:11, 14:17, 4:7] = 4.0
    restored[20:22, 14, 18] = 4.0
    row = evaluator.evaluate(restored)
    assert (row["hot_spots_large"], row["hot_spots_small"]) == (1, 1)


def test_the_livers_variation_falls_with_smoothing(study: SimulatedStudy, evaluator: StudyEvaluator):
    noisy = evaluator.evaluate(study.exposures[60])["liver_cov"]
    smooth = evaluator.evaluate(ndimage.gaussian_filter(study.exposures[60], 1.0))["liver_cov"]
    assert 0 < smooth < 0.7 * noisy


def test_the_row_of_one_call_is_that_of_the_evaluator(study: SimulatedStudy, evaluator: StudyEvaluator):
    restored = ndimage.gaussian_filter(study.exposures[60], 0.5)
    assert evaluate(restored, study, 60, 90) == evaluator.evaluate(restored)


def test_a_real_study_has_nan_where_only_a_simulation_knows(study: SimulatedStudy):
    real = SimulatedStudy("real", study.spacing, study.exposures)
    row = evaluate(study.exposures[60], real, 60, 90)
    assert row["score_mse"] == 0
    unknown = ("truth_mse", "implied_truth_score", "ceiling_score_ssim", "lesion_large_count", "liver_cov")
    assert all(math.isnan(row[key]) for key in (*unknown, "hot_spots_large", "lesion_small_suvmax_bias"))
    assert row.keys() == evaluate(study.exposures[60], study, 60, 90).keys()


def test_a_simulation_without_lesions_still_counts_hot_spots(study: SimulatedStudy):
    row = evaluate(study.exposures[60], replace(study, lesions=None, organ_names={"spleen": 1}), 60, 90)
    assert row["hot_spots_large"] >= 0
    assert math.isnan(row["lesion_large_lost"])
    assert math.isnan(row["liver_cov"])


def test_a_missing_exposure_is_named(study: SimulatedStudy):
    with pytest.raises(ValueError, match=r"study phantom has no 45 s exposure \(it has \[30, 60, 90\]\)"):
        StudyEvaluator(study, 45, 90)


def test_a_restored_volume_of_another_shape_or_with_nan_is_refused(evaluator: StudyEvaluator):
    with pytest.raises(ValueError, match=r"restored has shape \(2, 2, 2\)"):
        evaluator.evaluate(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluator.evaluate(np.full(SHAPE, np.nan))


def test_a_study_without_a_body_is_refused():
    empty = SimulatedStudy("empty", exposures={60: np.zeros(SHAPE), 90: np.zeros(SHAPE)})
    with pytest.raises(ValueError, match="study empty: no body was found in the 90 s image"):
        StudyEvaluator(empty, 60, 90)


def test_summary_is_the_mean_over_studies_with_lesions_pooled(study: SimulatedStudy, evaluator: StudyEvaluator):
    first = evaluator.evaluate(study.exposures[60])
    second = first | {
        "score_mse": 10.0, "lesion_large_count": 2, "lesion_large_suvmax_bias": -30.0,
        "lesion_large_suvmax_sd": 4.0, "lesion_large_lost": 2,
    }  # fmt: skip
    rows = summarize({"identity": [first, second], "other": [second, second]})
    assert [row.method for row in rows] == ["identity", "other"]
    assert rows[0].studies == 2
    assert rows[0].metrics["score_mse"].mean == 5.0
    assert rows[0].metrics["score_mse"].low <= 5.0 <= rows[0].metrics["score_mse"].high
    assert rows[1].metrics["score_mse"].sd == 0
    pooled = rows[0].agreement["large", "suvmax"]
    assert pooled.count == 3
    assert pooled.bias == pytest.approx((first["lesion_large_suvmax_bias"] - 60) / 3)
    assert rows[0].totals["lesion_large_lost"] == first["lesion_large_lost"] + 2
    flat = rows[0].flat()
    assert flat["score_mse"] == 5.0
    assert flat["lesion_large_suvmax_bias_low"] == pooled.low


def test_methods_with_another_number_of_studies_are_refused():
    with pytest.raises(ValueError, match=r"\{'a': 1, 'b': 2\}"):
        summarize({"a": [{}], "b": [{}, {}]})
    with pytest.raises(ValueError, match="studies a method"):
        summarize({})
