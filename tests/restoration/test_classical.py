# SPDX-License-Identifier: Apache-2.0
"""The classical peers: what they take away and keep, how they are searched, stored and refused."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch

from medaccel.restoration.evaluation import metrics
from medaccel.restoration.methods.base import Method, RestorationRequest, RestorationTask
from medaccel.restoration.methods.bm4d import BM4D, autocorrelation, power_spectrum
from medaccel.restoration.methods.classical import Classical, NonLocalMeans, TotalVariation, noise_level
from medaccel.restoration.study import PETStudy, load_study, save_study

SPACING = (4.0, 4.0, 4.0)
TASK = RestorationTask((60, 30), 90)
METHODS = [NonLocalMeans, TotalVariation]


def make_truth() -> np.ndarray:
    """Makes a warm cylinder with a hot ball in it, SUV."""
    i, j, k = np.indices((24, 24, 16))
    truth = np.where((i - 12) ** 2 + (j - 12) ** 2 < 81, 1.0, 0.02)
    truth[(i - 12) ** 2 + (j - 12) ** 2 + (k - 8) ** 2 < 10] = 8.0
    return truth.astype(np.float32)


def make_study(seed: int) -> PETStudy:
    """Nested Poisson exposures, so the noise grows with the activity."""
    rng = np.random.default_rng(seed)
    truth = make_truth()
    third = [rng.poisson(truth * 12) / 12 for _ in range(3)]
    exposures = {30 * (n + 1): np.mean(third[: n + 1], axis=0).astype(np.float32) for n in range(3)}
    return PETStudy(f"made_{seed}", SPACING, np.diag([*SPACING, 1.0]), exposures, noise_free=truth)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("studies")
    for seed in range(3):
        save_study(folder / f"made_{seed}", make_study(seed))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def fits(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Classical]:
    fitted = {}
    for kind in METHODS:
        method = kind(TASK)
        method.fit(paths[:1], paths[1:2], folder=tmp_path_factory.mktemp("fit"), progress=False)
        fitted[kind.name] = method
    return fitted


@pytest.mark.parametrize("name", [kind.name for kind in METHODS])
@pytest.mark.parametrize("seconds", TASK.input_seconds)
def test_a_fitted_method_takes_most_of_the_noise_of_another_study(
    fits: dict[str, Classical], paths: list[Path], name: str, seconds: int
):
    study = load_study(paths[2])
    image, target = study.exposures[seconds], study.exposures[90]
    mask = metrics.body_mask(target, SPACING)
    restored = fits[name].restore(RestorationRequest(image, SPACING, seconds=seconds)).volume
    gain = metrics.score(metrics.mse(restored, target, mask), metrics.mse(image, target, mask))
    assert restored.dtype == np.float32
    assert metrics.share_of_limit(gain, seconds, 90) > 0.6


@pytest.mark.parametrize("name", [kind.name for kind in METHODS])
def test_a_hot_lesion_keeps_its_uptake(fits: dict[str, Classical], paths: list[Path], name: str):
    image = load_study(paths[2]).exposures[60]
    restored = fits[name].restore(RestorationRequest(image, SPACING)).volume
    hot = scipy.ndimage.binary_erosion(make_truth() == 8)
    assert restored[hot].mean() == pytest.approx(image[hot].mean(), rel=0.1)


@pytest.mark.parametrize("name", [kind.name for kind in METHODS])
def test_the_choice_is_the_best_of_the_scores(fits: dict[str, Classical], name: str):
    fitted = fits[name].fitted
    assert set(fitted.choices) == {"60", "30"}
    for seconds, choice in fitted.choices.items():
        scores = {label: row for label, row in fitted.scores.items() if label.startswith(f"{seconds} s")}
        kind = "combined" if choice["combined"] else "direct"
        assert max(scores, key=lambda label: scores[label][0]) == (
            f"{seconds} s, strength {choice['strength']:.3g}, {kind}"
        )
        assert len(scores) >= 2 * (len(fits[name].settings["strengths"]) + 1)


def test_the_search_is_on_validation_studies_and_on_training_ones_without_any(paths: list[Path], tmp_path: Path):
    def scores(studies: list[Path], validation: list[Path]) -> dict:
        method = TotalVariation(RestorationTask(), {"strengths": [1.0], "iterations": 20})
        method.fit(studies, validation, folder=tmp_path, progress=False)
        return method.fitted.scores

    on_second = scores(paths[:1], paths[1:2])
    assert on_second == scores(paths[1:2], [])
    assert on_second != scores(paths[:1], [])


def test_a_best_strength_beyond_the_grid_is_found(paths: list[Path], tmp_path: Path):
    method = TotalVariation(RestorationTask(), {"strengths": [0.4, 0.6]})
    method.fit(paths[:1], paths[1:2], folder=tmp_path, progress=False)
    assert method.fitted.choices["60"]["strength"] > 0.7


def test_a_combined_restoration_tells_the_activity_it_rests_on(fits: dict[str, Classical], paths: list[Path]):
    method = NonLocalMeans(TASK)
    method.load_state({"choices": {"60": {"strength": 1.0, "combined": True}}})
    image = load_study(paths[2]).exposures[60]
    result = method.restore(RestorationRequest(image, SPACING, seconds=60))
    assert result.activity is not None
    np.testing.assert_allclose(result.volume, (60 * image + 30 * result.activity) / 90, rtol=1e-5)
    method.load_state({"choices": {"60": {"strength": 1.0, "combined": False}}})
    direct = method.restore(RestorationRequest(image, SPACING, seconds=60))
    assert direct.activity is None
    np.testing.assert_array_equal(direct.volume, result.activity)


@pytest.mark.parametrize("stabiliser", ["sqrt", "asinh"])
def test_the_largest_value_is_not_clipped(stabiliser: str):
    volume = np.full((12, 12, 12), 0.5, np.float32) + np.random.default_rng(0).random((12, 12, 12), np.float32) / 10
    volume[4:9, 4:9, 4:9] += 900
    method = NonLocalMeans(RestorationTask(), {"stabiliser": stabiliser})
    method.load_state({"choices": {"60": {"strength": 0.5, "combined": False}}})
    assert method.restore(RestorationRequest(volume, SPACING)).volume[6, 6, 6] == pytest.approx(900.5, rel=0.01)


def test_a_volume_without_noise_comes_back_as_it_is():
    volume = np.ones((8, 8, 8), np.float32)
    method = TotalVariation(RestorationTask())
    method.load_state({"choices": {"60": {"strength": 1.0, "combined": True}}})
    np.testing.assert_array_equal(method.restore(RestorationRequest(volume, SPACING)).volume, volume)


@pytest.mark.parametrize("name", [kind.name for kind in METHODS])
def test_a_stored_method_restores_the_same_bits(
    fits: dict[str, Classical], paths: list[Path], name: str, tmp_path: Path
):
    method = fits[name]
    method.save(tmp_path / "method.pt")
    content = torch.load(tmp_path / "method.pt", weights_only=True)
    again = type(method)(TASK, content["settings"])
    again.load_state(content["state"])
    image = load_study(paths[0]).exposures[30]
    np.testing.assert_array_equal(
        again.restore(RestorationRequest(image, SPACING, seconds=30)).volume,
        method.restore(RestorationRequest(image, SPACING, seconds=30)).volume,
    )


def test_the_noise_level_is_that_of_white_noise_on_smooth_anatomy():
    rng = np.random.default_rng(0)
    anatomy = 3 * scipy.ndimage.gaussian_filter(make_truth(), 3.0)
    noisy = anatomy + 0.3 * rng.standard_normal(anatomy.shape)
    assert noise_level(noisy, np.ones(noisy.shape, bool)) == pytest.approx(0.3, rel=0.05)
    with pytest.raises(ValueError, match="at least three slices"):
        noise_level(noisy[:, :, :2], np.ones((24, 24, 2), bool))


def test_the_autocorrelation_of_filtered_noise_is_its_kernels_own():
    rng = np.random.default_rng(0)
    noise = scipy.ndimage.uniform_filter1d(rng.standard_normal((60, 50, 40)), 2, axis=0, mode="wrap")
    mask = np.zeros(noise.shape, bool)
    mask[5:55, 5:45, 4:36] = True
    found = autocorrelation(np.where(mask, noise, 0), mask, lags=2)
    expected = np.zeros((5, 5, 5))
    expected[1:4, 2, 2] = 0.5, 1.0, 0.5
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_the_power_spectrum_is_the_variance_and_no_frequency_is_negative():
    correlation = np.zeros((5, 5, 5))
    correlation[2, 2, 2] = 1
    correlation[1, 2, 2] = correlation[3, 2, 2] = 0.6  # as much as no noise can have: tapering mends it
    for shape in ((16, 12, 10), (4, 12, 3)):
        spectrum = power_spectrum(correlation, shape)
        assert spectrum.shape == shape
        assert spectrum.min() > 0
        assert spectrum.mean() == pytest.approx(math.prod(shape))
    spectrum = power_spectrum(correlation, (16, 12, 10))
    assert spectrum[0, 0, 0] > 10 * spectrum[8, 0, 0]  # close voxels share noise: low frequencies hold it


def test_bm4d_says_why_it_is_not_available(monkeypatch: pytest.MonkeyPatch, paths: list[Path], tmp_path: Path):
    monkeypatch.setitem(sys.modules, "bm4d", None)  # what Python takes for a package that isn't there
    reason = BM4D.unavailable()
    assert reason is not None
    assert "bm4d" in reason
    with pytest.raises(ValueError, match="can't be imported"):
        BM4D(RestorationTask()).fit(paths, [], folder=tmp_path, progress=False)
    assert NonLocalMeans.unavailable() is None


@pytest.mark.skipif(BM4D.unavailable() is not None, reason=str(BM4D.unavailable()))
def test_bm4d_takes_correlated_noise_away_and_is_stored_with_its_correlation(paths: list[Path], tmp_path: Path):
    method = BM4D(RestorationTask(), {"strengths": [1.5], "search_slices": 10})
    method.fit(paths[:1], paths[1:2], folder=tmp_path, progress=False)
    assert max(mse for mse, _ in method.fitted.scores.values()) > 15
    again = BM4D(RestorationTask())
    again.load_state(method.state())
    image = load_study(paths[2]).exposures[60]
    np.testing.assert_array_equal(
        again.restore(RestorationRequest(image, SPACING)).volume,
        method.restore(RestorationRequest(image, SPACING)).volume,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stabiliser": "log"}, "nlm: stabiliser is 'log'; expected one of sqrt, asinh"),
        ({"strengths": [1.0, 0.5]}, "expected increasing positive numbers"),
        ({"strengths": []}, "expected increasing positive numbers"),
        ({"search_studies": 0}, "search_studies is 0"),
        ({"search_slices": 2}, "search_slices is 2"),
        ({"h": 1.0}, r"settings \['h'\] are unknown"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        NonLocalMeans(RestorationTask(), settings)


def test_what_can_not_be_fitted_or_restored_is_refused(tmp_path: Path):
    method: Method = NonLocalMeans(RestorationTask())
    with pytest.raises(ValueError, match="no training studies"):
        method.fit([], [], folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="not fitted to 60 s yet"):
        method.restore(RestorationRequest(np.ones((8, 8, 8), np.float32), SPACING))
    study = make_study(0)
    study.exposures[60] = study.exposures[90]
    save_study(tmp_path / "same", study)
    with pytest.raises(ValueError, match="input and target do not differ"):
        method.fit([tmp_path / "same"], [], folder=tmp_path, progress=False)
