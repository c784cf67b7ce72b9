# SPDX-License-Identifier: Apache-2.0
"""Distances, the score, its limit and the oracle, each against a calculation by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from medaccel.restoration.evaluation import metrics

SPACING = (4.0, 4.0, 4.0)


def _pair(shape: tuple[int, int, int] = (14, 13, 15)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    reference = generator.gamma(2.0, 1.0, shape)
    mask = np.zeros(shape, dtype=bool)
    mask[2:-2, 3:-3, 1:-4] = True
    return reference + generator.normal(0, 0.3, shape), reference, mask


def test_mse_is_the_mean_square_over_the_mask_only():
    restored = np.array([1.0, 2.0, 100.0]).reshape(3, 1, 1)
    reference = np.array([0.0, 4.0, 0.0]).reshape(3, 1, 1)
    mask = np.array([True, True, False]).reshape(3, 1, 1)
    assert metrics.mse(restored, reference, mask) == (1 + 4) / 2


def test_psnr_of_an_error_of_one_suv_at_a_range_of_ten_is_20_db():
    reference = np.ones((3, 3, 3))
    mask = np.ones((3, 3, 3), dtype=bool)
    assert metrics.psnr(reference + 1, reference, mask) == pytest.approx(20.0)
    assert metrics.psnr(reference, reference, mask) == math.inf


def test_primary_ssim_is_scikit_images_map_averaged_over_the_mask():
    restored, reference, mask = _pair((20, 18, 24))
    _, full = structural_similarity(
        restored, reference, data_range=10.0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    assert metrics.ssim_distance(restored, reference, mask) == pytest.approx(1 - full[mask].mean(), rel=1e-12)


def test_axial_ssim_is_the_two_dimensional_one_slice_by_slice():
    restored, reference, mask = _pair((16, 17, 9))
    values = []
    for k in range(9):
        _, full = structural_similarity(
            restored[..., k], reference[..., k], data_range=10.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, full=True,
        )  # fmt: skip
        values.append(full[mask[..., k]])
    expected = 1 - np.concatenate(values).mean()
    assert metrics.ssim_distance(restored, reference, mask, axial=True) == pytest.approx(expected, rel=1e-12)


def test_ssim_of_one_voxel_of_a_constant_shift_follows_the_formula():
    # Constant images: no variance, so SSIM = (2ab + C1) / (a² + b² + C1) with C1 = (0.01 · 10)².
    first, second = np.full((4, 4, 4), 2.0), np.full((4, 4, 4), 3.0)
    expected = 1 - (2 * 2 * 3 + 0.01) / (4 + 9 + 0.01)
    assert metrics.ssim_distance(first, second, np.ones((4, 4, 4), dtype=bool)) == pytest.approx(expected)


def test_a_hot_voxel_changes_the_study_range_and_with_it_that_ssim_only():
    restored, reference, mask = _pair()
    hot = reference.copy()
    hot[5, 5, 5] = 60.0
    assert metrics.study_range(hot, mask) == pytest.approx(60 - reference[mask].min())
    by_range = metrics.ssim_distance(restored, reference, mask, data_range=60.0)
    assert by_range < metrics.ssim_distance(restored, reference, mask)


def test_score_is_zero_for_the_input_and_negative_for_harm():
    assert metrics.score(0.2, 0.2) == 0
    assert metrics.score(0.15, 0.2) == pytest.approx(25)
    assert metrics.score(0.4, 0.2) == -100
    assert math.isnan(metrics.score(0.1, 0.0))


@pytest.mark.parametrize(("seconds", "limit"), [(60, 1 / 3), (30, 2 / 3)])
def test_oracle_meets_the_limit_on_nested_poisson_counts(seconds: int, limit: float):
    generator = np.random.default_rng(1)
    rate = generator.uniform(0.5, 4.0, (48, 48, 48))  # counts a second
    early = generator.poisson(rate * seconds)
    late = generator.poisson(rate * (90 - seconds))
    image, target = early / seconds, (early + late) / 90
    mask = np.ones(rate.shape, dtype=bool)
    before = metrics.mse(image, target, mask)
    assert metrics.mse_limit(seconds, 90) == pytest.approx(limit)

    best = metrics.score(metrics.mse(metrics.oracle(image, rate, seconds, 90), target, mask), before)
    assert best == pytest.approx(100 * limit, abs=1.0)
    assert metrics.share_of_limit(best, seconds, 90) == pytest.approx(1, abs=0.03)
    # The truth itself scores worse than doing nothing at 60 s, and only half the limit is left at 30 s.
    truth = metrics.score(metrics.mse(rate, target, mask), before)
    assert truth == pytest.approx(100 * (1 - (1 / 90) / (1 / seconds - 1 / 90)), abs=2.0)


def test_share_of_the_limit_is_the_error_that_is_gone_in_the_implied_truth():
    generator = np.random.default_rng(2)
    truth = np.full((40, 40, 40), 5.0)
    early, late = (
        generator.normal(0, 1 / math.sqrt(60), truth.shape),
        generator.normal(0, 1 / math.sqrt(30), truth.shape),
    )
    image, target = truth + early, truth + (60 * early + 30 * late) / 90
    estimate = truth + 0.5 * early  # an estimate of the truth without 75 % of the input's squared error
    restored = metrics.oracle(image, estimate, 60, 90)
    assert np.allclose(metrics.implied_truth(restored, image, 60, 90), estimate)

    mask = np.ones(truth.shape, dtype=bool)
    score = metrics.score(metrics.mse(restored, target, mask), metrics.mse(image, target, mask))
    assert metrics.share_of_limit(score, 60, 90) == pytest.approx(0.75, abs=0.02)
    assert metrics.equivalent_seconds(0.75, 60) == pytest.approx(240)
    assert metrics.equivalent_seconds(0.9, 60) == pytest.approx(600)
    assert metrics.equivalent_seconds(1.0, 60) == math.inf


def test_ssim_ceiling_is_no_worse_than_any_blend_on_a_grid():
    generator = np.random.default_rng(4)
    truth = np.cumsum(generator.normal(0, 0.3, (20, 20, 20)), axis=0) + 3
    early, late = generator.normal(0, 0.5, truth.shape), generator.normal(0, 0.7, truth.shape)
    image, target = truth + early, truth + (2 * early + late) / 3
    mask = np.ones(truth.shape, dtype=bool)
    least, weight = metrics.ssim_ceiling(image, truth, target, mask)
    grid = [metrics.ssim_distance(w * image + (1 - w) * truth, target, mask) for w in np.linspace(0, 1, 21)]
    assert least <= min(grid) + 1e-5
    assert 0 < weight < 1
    assert least < metrics.ssim_distance(image, target, mask)


def test_body_mask_is_the_largest_part_with_its_holes():
    suv = np.zeros((40, 40, 20))
    suv[8:32, 8:32, :] = 0.6
    suv[14:20, 14:20, 0:12] = 0.0  # an airway, open at the lower end of the field of view
    suv[2:4, 36:38, 4:6] = 3.0  # a marker beside the patient
    mask = metrics.body_mask(suv, SPACING)
    assert mask[17, 17, 0]
    assert mask[17, 17, 6]
    assert not mask[2:4, 36:38].any()
    assert mask.sum() == pytest.approx(24 * 24 * 20, rel=0.1)


def test_body_mask_ignores_noise_in_the_air():
    generator = np.random.default_rng(0)
    suv = np.abs(generator.normal(0, 0.1, (40, 40, 20)))
    suv[10:30, 10:30, 5:15] += 1.0
    mask = metrics.body_mask(suv, SPACING)
    assert not mask[:7].any()
    assert mask[10:30, 10:30, 5:15].all()


def test_body_mask_of_zeros_is_empty_and_the_metrics_say_so():
    zeros = np.zeros((6, 6, 6))
    mask = metrics.body_mask(zeros, SPACING)
    assert mask.dtype == np.bool_
    assert not mask.any()
    with pytest.raises(ValueError, match="mask is empty"):
        metrics.mse(zeros, zeros, mask)


def test_body_mask_of_the_real_patient_has_a_plausible_volume(data_dir):
    import nibabel

    image = nibabel.load(data_dir / "pet" / "sts_001_pet_suv_crop.nii.gz")
    spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
    suv = image.get_fdata()
    mask = metrics.body_mask(suv, spacing)
    assert 0.2 < mask.mean() < 0.95
    assert suv[~mask].mean() < 0.1


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3)])
def test_other_shapes_are_refused_with_both_shapes(shape: tuple[int, ...]):
    mask = np.ones((3, 3, 3), dtype=bool)
    with pytest.raises(ValueError, match=r"reference has shape .* the mask \(3, 3, 3\)"):
        metrics.mse(np.zeros((3, 3, 3)), np.zeros(shape), mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_counted_in_the_error(bad: float):
    volume = np.zeros((3, 3, 3))
    volume[0, 0, :2] = bad
    with pytest.raises(ValueError, match="restored has 2 voxels that are NaN or infinite"):
        metrics.ssim_distance(volume, np.zeros((3, 3, 3)), np.ones((3, 3, 3), dtype=bool))


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match="mask is a 3-D array of float64"):
        metrics.mse(np.zeros((3, 3, 3)), np.zeros((3, 3, 3)), np.ones((3, 3, 3)))


@pytest.mark.parametrize(("t", "total"), [(90, 60), (60, 60), (0, 90)])
def test_exposures_in_the_wrong_order_are_refused(t: int, total: int):
    with pytest.raises(ValueError, match=f"input_seconds={t}, target_seconds={total}"):
        metrics.mse_limit(t, total)


def test_a_spacing_of_two_is_refused():
    with pytest.raises(ValueError, match="expected three positive lengths"):
        metrics.body_mask(np.zeros((3, 3, 3)), (1.0, 1.0))  # type: ignore[arg-type]


def test_a_range_of_zero_is_refused():
    with pytest.raises(ValueError, match="data_range is 0"):
        metrics.ssim_map(np.zeros((3, 3, 3)), np.zeros((3, 3, 3)), data_range=0)
