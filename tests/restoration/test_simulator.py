# SPDX-License-Identifier: Apache-2.0
"""The simulator: nested Poisson counts, unbiased reconstructions, and the frozen difficulty."""

import dataclasses

import numpy as np
import pytest
import scipy.ndimage
import torch

from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.lesions import coefficient_of_variation, organ_core
from medaccel.restoration.evaluation.noise import analyse_noise
from medaccel.restoration.methods.gaussian import fit
from medaccel.restoration.simulation.activity import denoise_activity
from medaccel.restoration.simulation.generate import phantom_study, write_studies
from medaccel.restoration.simulation.simulator import SimulatorConfig, draw_counts, expected_projections, simulate
from medaccel.restoration.study import PETStudy, load_study

SPACING = (6.0, 6.0, 6.0)
FAST = SimulatorConfig(n_angles=24, n_subsets=6, iterations=1)


def cylinder(slices: int = 6) -> np.ndarray:
    """Makes an elliptic cylinder of SUV 2 with a hot rod."""
    x, y = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 36), indexing="ij")
    disc = 2.0 * (x**2 / 0.6 + y**2 / 0.4 < 1) + 6.0 * ((x - 0.2) ** 2 + y**2 < 0.02)
    return np.repeat(disc[..., None], slices, axis=2).astype(np.float32)


@pytest.fixture(scope="module")
def studies() -> list[PETStudy]:
    """Makes phantoms of the standard generator, with the frozen defaults."""
    return [phantom_study(seed) for seed in range(3)]


# --- counts -------------------------------------------------------------------------------------------------------
def test_exposures_nest_and_their_increments_are_poisson():
    projections = expected_projections(cylinder(), None, SPACING, FAST)
    rate = projections.trues.astype(np.float64) + projections.background
    counts = draw_counts(projections, (30, 60, 90), seed=0)
    for shorter, longer in ((30, 60), (60, 90)):
        increment = counts[longer].astype(np.int64) - counts[shorter]
        assert increment.min() >= 0
        z = (increment - 30 * rate) / np.sqrt(30 * rate)
        assert abs(z.mean()) < 0.02
        assert z.var() == pytest.approx(1, abs=0.03)
    first, second = counts[30] - 30 * rate, counts[60] - counts[30].astype(np.float64) - 30 * rate
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02


def test_dose_scales_trues_and_the_square_scales_randoms():
    full = expected_projections(cylinder(), None, SPACING, dataclasses.replace(FAST, scatter_fraction=0.0))
    half = expected_projections(
        cylinder(), None, SPACING, dataclasses.replace(FAST, scatter_fraction=0.0, dose_fraction=0.5)
    )
    np.testing.assert_allclose(half.trues, 0.5 * full.trues, rtol=1e-5)
    np.testing.assert_allclose(half.background, 0.25 * full.background, rtol=1e-4)


def test_scatter_and_randoms_have_the_stated_share():
    only_scatter = expected_projections(cylinder(), None, SPACING, dataclasses.replace(FAST, randoms_fraction=0.0))
    trues, scatter = (float(a.sum(dtype=np.float64)) for a in (only_scatter.trues, only_scatter.background))
    assert scatter / (scatter + trues) == pytest.approx(FAST.scatter_fraction, rel=1e-3)
    only_randoms = expected_projections(cylinder(), None, SPACING, dataclasses.replace(FAST, scatter_fraction=0.0))
    assert float(only_randoms.background.sum(dtype=np.float64)) / trues == pytest.approx(0.5, rel=1e-3)


# --- reconstruction -----------------------------------------------------------------------------------------------
def test_same_seed_same_bits_whatever_the_threads_and_another_seed_differs():
    results = []
    before = torch.get_num_threads()
    try:
        for threads, seed in ((1, 4), (2, 4), (2, 5)):
            torch.set_num_threads(threads)
            results.append(simulate(cylinder(), None, SPACING, FAST, seed=seed))
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(results[0].exposures[t], results[1].exposures[t]) for t in (30, 60, 90))
    assert np.array_equal(results[0].noise_free, results[2].noise_free)
    assert not np.array_equal(results[0].exposures[60], results[2].exposures[60])


def test_realisations_average_to_the_noise_free_image_and_variance_falls_with_time():
    runs = [simulate(cylinder(), None, SPACING, FAST, seed=seed) for seed in range(12)]
    core = scipy.ndimage.binary_erosion(cylinder() > 0, np.ones((3, 3, 1)), iterations=2)
    noise_free = runs[0].noise_free[core]
    variance = {}
    for seconds in (30, 60, 90):
        images = np.array([run.exposures[seconds][core] for run in runs])
        assert images.mean() == pytest.approx(noise_free.mean(), rel=0.02)
        variance[seconds] = images.var(axis=0, ddof=1).mean()
    assert variance[30] / variance[90] == pytest.approx(3, rel=0.25)
    assert variance[60] / variance[90] == pytest.approx(1.5, rel=0.25)


def test_the_noise_free_image_has_the_true_suv_inside_large_regions():
    config = dataclasses.replace(FAST, iterations=3)
    simulation = simulate(cylinder(), None, SPACING, config)
    core = scipy.ndimage.binary_erosion(cylinder() == 2.0, np.ones((3, 3, 1)), iterations=4)
    assert core.sum() > 20
    assert simulation.noise_free[core].mean() == pytest.approx(2.0, rel=0.05)


def test_any_list_of_durations_is_simulated():
    simulation = simulate(cylinder(2), None, SPACING, dataclasses.replace(FAST, durations=(10, 45)), seed=1)
    assert list(simulation.exposures) == [10, 45]


# --- the frozen difficulty ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_liver_noise_is_10_to_13_percent_at_90_seconds(studies: list[PETStudy]):
    values = []
    for study in studies:
        liver = (study.organs == study.organ_names["liver"]) & (study.lesions == 0)
        values.append(coefficient_of_variation(study.exposures[90], organ_core(liver, study.spacing)))
    assert 0.10 <= np.mean(values) <= 0.13
    assert max(values) < 0.15


@pytest.mark.slow
def test_one_fitted_gaussian_scores_9_to_15_percent_at_60_seconds(studies: list[PETStudy]):
    _, fitted = fit("gaussian1", studies, 60, 90, epochs=4, progress=False)
    assert 9 <= 100 * (1 - fitted.losses[-1]) <= 15


@pytest.mark.parametrize(("seconds", "limit"), [(60, 33.3), (30, 66.7)])
def test_the_oracle_reaches_the_physical_limit(studies: list[PETStudy], seconds: int, limit: float):
    scores = []
    for study in studies:
        image, target = study.exposures[seconds], study.exposures[90]
        mask = metrics.body_mask(target, study.spacing)
        best = metrics.oracle(image, study.noise_free, seconds, 90)
        scores.append(metrics.score(metrics.mse(best, target, mask), metrics.mse(image, target, mask)))
    assert np.mean(scores) == pytest.approx(limit, abs=2)


def test_noise_correlates_along_every_axis_as_in_a_reconstruction(studies: list[PETStudy]):
    study = studies[0]
    mask = metrics.body_mask(study.exposures[90], study.spacing)
    analysis = analyse_noise(study.exposures[60], study.exposures[90], mask, study.spacing)
    for axis in range(3):
        assert 0.15 < analysis.correlation(axis, 1) < 0.8  # 4 mm voxels; on a PET's 3.3 mm slices 0.4
        assert analysis.correlation(axis, 3) < 0.2


def test_denoising_a_real_volume_lowers_its_noise_and_keeps_its_uptake():
    rng = np.random.default_rng(0)
    truth = scipy.ndimage.gaussian_filter(cylinder(12), 1.0)
    noisy = (truth * (1 + 0.15 * scipy.ndimage.gaussian_filter(rng.standard_normal(truth.shape), 0.7) / 0.3)).clip(0)
    cleaned = denoise_activity(noisy.astype(np.float32), SPACING, "nlm")
    assert np.square(cleaned - truth).mean() < 0.7 * np.square(noisy - truth).mean()
    assert cleaned.sum() == pytest.approx(noisy.sum(), rel=0.03)
    with pytest.raises(ValueError, match="denoise is 'median'"):
        denoise_activity(noisy, SPACING, "median")


# --- writing and refusing -----------------------------------------------------------------------------------------
def test_written_studies_are_resumed_and_other_parameters_refused(tmp_path):
    paths = write_studies(tmp_path, [3], config=FAST)
    written = (paths[0] / "PET_60.nii.gz").stat().st_mtime_ns
    assert write_studies(tmp_path, [3], config=FAST) == paths
    assert (paths[0] / "PET_60.nii.gz").stat().st_mtime_ns == written
    study = load_study(paths[0])
    assert study.parameters["scanner"]["dose_fraction"] == 1.0
    with pytest.raises(ValueError, match="dose_fraction"):
        write_studies(tmp_path, [3], config=dataclasses.replace(FAST, dose_fraction=0.5))


BAD = {
    "negative": (lambda: simulate(-cylinder(), None, SPACING, FAST), "activity has values that are negative"),
    "nan": (lambda: simulate(cylinder() * np.nan, None, SPACING, FAST), "negative or not finite"),
    "zero": (lambda: simulate(0 * cylinder(), None, SPACING, FAST), "activity is zero everywhere"),
    "one slice": (lambda: simulate(cylinder(1), None, SPACING, FAST), "expected three axes of at least 2"),
    "grid": (lambda: simulate(cylinder(), cylinder(4), SPACING, FAST), "expected one grid"),
    "spacing": (lambda: simulate(cylinder(), None, (1.0, 0.0, 1.0), FAST), "spacing"),
    "durations": (lambda: SimulatorConfig(durations=(60, 30)), "expected increasing durations"),
    "subsets": (lambda: SimulatorConfig(n_angles=10, n_subsets=4), "does not divide"),
    "scatter": (lambda: SimulatorConfig(scatter_fraction=1.0), r"scatter_fraction is 1.0"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(what: str):
    call, sentence = BAD[what]
    with pytest.raises(ValueError, match=sentence):
        call()
