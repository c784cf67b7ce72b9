# SPDX-License-Identifier: Apache-2.0
"""A strength by the noise in the image: how it is found, what it serves, and BM4D on it without its package."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage

from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.training_range import root_noise
from medaccel.restoration.methods import load_method, make_method
from medaccel.restoration.methods.base import RestorationRequest, RestorationTask
from medaccel.restoration.methods.by_noise import ClassicalByNoise, best_strength, power_law
from medaccel.restoration.methods.classical import NonLocalMeans
from medaccel.restoration.study import load_study, save_study
from tests.restoration.test_classical import SPACING, make_study


class NonLocalMeansByNoise(ClassicalByNoise, NonLocalMeans):
    name = "nlm_noise"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("studies")
    for seed in range(3):
        save_study(folder / f"made_{seed}", make_study(seed))
    return sorted(folder.iterdir())


@pytest.fixture
def fake_bm4d(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Puts a smoother in the place of the package bm4d, which notes the variance of the noise that it is told."""
    told: list[float] = []

    def denoise(volume: np.ndarray, spectrum: np.ndarray, profile: object) -> np.ndarray:
        told.append(float(np.mean(spectrum)) / volume.size)
        return np.asarray(scipy.ndimage.gaussian_filter(volume, min(20 * told[-1], 2.0)))

    package, profiles = types.ModuleType("bm4d"), types.ModuleType("bm4d.profiles")
    package.bm4d = denoise  # type: ignore[attr-defined]
    profiles.BM4DProfile = type("BM4DProfile", (), {"bs_wiener": (4, 4, 4)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bm4d", package)
    monkeypatch.setitem(sys.modules, "bm4d.profiles", profiles)
    return told


@pytest.mark.parametrize("curvature", [-1.0, -30.0])
@pytest.mark.parametrize("vertex", [0.9, 1.0, 1.3])
def test_the_best_strength_of_a_parabola_is_its_vertex(vertex: float, curvature: float):
    strengths = [0.5, 0.8, 1.2, 2.0]
    scores = [curvature * np.log(s / vertex) ** 2 + 7 for s in strengths]
    assert best_strength(strengths, scores) == pytest.approx(vertex)


@pytest.mark.parametrize("scores", [[3, 2, 1], [1, 2, 3], [1, 1, 1]])
def test_at_an_end_the_best_strength_is_the_end(scores: list[float]):
    assert best_strength([0.5, 1.0, 2.0], scores) == [0.5, 1.0, 2.0][int(np.argmax(scores))]


@pytest.mark.parametrize(
    ("noise", "sigma", "expected"),
    [
        ([0.1, 0.2, 0.4], [0.3 * s**0.5 for s in (0.1, 0.2, 0.4)], (0.3, 0.5)),
        ([0.1, 0.2], [0.2, 0.4], (2.0, 1.0)),
        ([0.1, 0.11], [0.1, 0.2], (np.sqrt(1.0 * 0.2 / 0.11), 1.0)),  # too near each other for an exponent
        ([0.1], [0.15], (1.5, 1.0)),
        ([0.1, 0.2], [0.01, 0.16], (4 / np.sqrt(4 / 1), 2.0)),  # steeper than can be trusted
    ],
)
def test_the_power_law_goes_through_its_points(noise: list[float], sigma: list[float], expected: tuple):
    factor, exponent = power_law(noise, sigma)
    assert exponent == pytest.approx(expected[1])
    assert factor == pytest.approx(expected[0])


def test_one_fit_serves_exposures_that_it_has_not_seen(paths: list[Path], tmp_path: Path):
    method = NonLocalMeansByNoise(RestorationTask((60,), 90))
    method.fit(paths[:1], paths[1:2], folder=tmp_path, progress=False)
    assert set(method.fitted.choices) == {"factor", "exponent", "combined"}
    study = load_study(paths[2])
    target = study.exposures[90]
    mask = metrics.body_mask(target, SPACING)
    for seconds in (60, 30):
        image = study.exposures[seconds]
        restored = method.restore(RestorationRequest(image, SPACING, seconds)).volume
        gain = metrics.score(metrics.mse(restored, target, mask), metrics.mse(image, target, mask))
        assert metrics.share_of_limit(gain, seconds, 90) > 0.6
    for seconds in (0, 90):
        with pytest.raises(ValueError, match=r"expected more than 0 and fewer than 90"):
            method.restore(RestorationRequest(study.exposures[60], SPACING, seconds))
        assert method.at(seconds) is None


def test_bm4d_is_told_the_noise_that_is_measured(fake_bm4d: list[float], paths: list[Path], tmp_path: Path):
    method = make_method("bm4d_noise", RestorationTask((60, 30), 90), {"search_slices": 12})
    method.fit(paths[:2], paths[:2], folder=tmp_path, progress=False)
    method.save(tmp_path / "bm4d_noise.pt")
    again = load_method(tmp_path / "bm4d_noise.pt", "bm4d_noise")
    choice = again.fitted.choices
    for seconds in (30, 60, 45):
        image = load_study(paths[2]).exposures[60 if seconds == 45 else seconds]
        before = len(fake_bm4d)
        again.restore(RestorationRequest(image, SPACING, seconds))
        sigma = choice["factor"] * root_noise(image, SPACING) ** choice["exponent"]
        assert fake_bm4d[before:] == pytest.approx([sigma**2], rel=1e-5)


def test_an_image_without_noise_stays_as_it_is(paths: list[Path], tmp_path: Path):
    method = NonLocalMeansByNoise(RestorationTask((60,), 90))
    image = np.ones((16, 16, 16), dtype=np.float32)
    with pytest.raises(ValueError, match="not fitted yet"):
        method.restore(RestorationRequest(image, SPACING, 60))
    method.fitted.choices = {"factor": 1.0, "exponent": 1.0, "combined": True}
    np.testing.assert_array_equal(method.restore(RestorationRequest(image, SPACING, 60)).volume, image)


@pytest.mark.parametrize("name", ["nlm", "gaussian1"])
def test_a_method_of_single_exposures_takes_the_nearest_fitted_one(name: str, paths: list[Path], tmp_path: Path):
    settings = {"epochs": 1} if name == "gaussian1" else {"strengths": [1.0]}
    method = make_method(name, RestorationTask((60, 30), 90), settings)
    assert make_method("nlm", RestorationTask()).at(45) is None  # nothing is fitted
    method.fit(paths[:1], [], folder=tmp_path, progress=False)
    image = load_study(paths[2]).exposures[30]
    for seconds, nearest in ((10, 30), (40, 30), (45, 60), (75, 60)):
        other = method.at(seconds)
        assert other is not None
        found = other.restore(RestorationRequest(image, SPACING, seconds))
        expected = method.restore(RestorationRequest(image, SPACING, nearest))
        if found.activity is None:
            np.testing.assert_array_equal(found.volume, expected.volume)
        else:
            np.testing.assert_array_equal(found.activity, expected.activity)
            assert found.weight == pytest.approx(seconds / 90)
    assert method.at(90) is None
    assert method.seconds(30) == 30
    with pytest.raises(ValueError, match="expected one of 60, 30"):
        method.seconds(45)
