# SPDX-License-Identifier: Apache-2.0
"""The noise analysis finds the correlation that was put in."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from medaccel.restoration.evaluation.noise import HISTOGRAM_EDGES, analyse_noise, normalised_noise

SHAPE = (56, 48, 52)
SPACING = (4.0, 5.0, 3.0)
MASK = np.ones(SHAPE, dtype=bool)


def _strength() -> np.ndarray:
    """A noise level that varies ninefold over the volume, as activity does."""
    return np.broadcast_to(np.exp(np.linspace(-1.1, 1.1, SHAPE[0]))[:, None, None], SHAPE)


def test_white_noise_has_no_correlation_at_any_distance():
    noise = np.random.default_rng(0).normal(size=SHAPE) * _strength()
    result = analyse_noise(noise, np.zeros(SHAPE), MASK, SPACING)
    assert result.variance == pytest.approx(1, abs=0.05)
    assert len(result.differences) == 9
    for difference in result.differences:
        assert abs(difference.correlation) < 0.02
        assert difference.variance == pytest.approx(2 * result.variance, rel=0.02)


def test_gaussian_noise_has_the_correlation_of_its_filter():
    # White noise after a Gaussian of σ correlates by exp(−d²/4σ²).
    sigma = (1.2, 0.9, 1.6)
    noise = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=SHAPE), sigma) * _strength()
    result = analyse_noise(noise, np.zeros(SHAPE), MASK, SPACING)
    for axis in range(3):
        for d in (1, 2, 3):
            expected = math.exp(-(d**2) / (4 * sigma[axis] ** 2))
            assert result.correlation(axis, d) == pytest.approx(expected, abs=0.04)


def test_distances_are_given_in_millimetres_too():
    noise = np.random.default_rng(0).normal(size=SHAPE)
    result = analyse_noise(noise, np.zeros(SHAPE), MASK, SPACING, distances=(2,))
    assert [row["distance"] for row in result.rows()] == [8.0, 10.0, 6.0]
    assert [row["axis"] for row in result.rows()] == ["i", "j", "k"]
    assert result.differences[0].pairs == (SHAPE[0] - 2) * SHAPE[1] * SHAPE[2]


def test_only_pairs_with_both_ends_in_the_body_count():
    mask = np.zeros(SHAPE, dtype=bool)
    mask[10, 10, 10:14] = True
    image = np.random.default_rng(2).normal(size=SHAPE)
    image[~mask] = 1e6
    result = analyse_noise(image, np.zeros(SHAPE), mask, SPACING, distances=(1, 4))
    assert [d.pairs for d in result.differences] == [0, 0, 0, 0, 3, 0]
    assert math.isnan(result.correlation(0, 1))
    assert result.differences[0].density.sum() == 0
    noise = normalised_noise(image, mask)
    pairs = np.diff(noise[10, 10, 10:14])
    assert result.differences[4].variance == pytest.approx(pairs.var())


def test_histogram_is_a_density_of_the_known_width():
    noise = np.random.default_rng(0).normal(size=SHAPE)
    density = analyse_noise(noise, np.zeros(SHAPE), MASK, SPACING).differences[0].density
    assert (density * np.diff(HISTOGRAM_EDGES)).sum() == pytest.approx(1, abs=1e-3)  # 5 is 3.5 σ
    assert density.max() == pytest.approx(1 / math.sqrt(2 * math.pi * 2), rel=0.05)


def test_equal_images_have_no_noise_to_analyse():
    with pytest.raises(ValueError, match="no noise to analyse"):
        analyse_noise(np.ones(SHAPE), np.ones(SHAPE), MASK, SPACING)


def test_a_distance_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"distances is \(0,\)"):
        analyse_noise(np.ones(SHAPE), np.zeros(SHAPE), MASK, SPACING, distances=(0,))


def test_a_distance_that_was_not_analysed_is_a_key_error():
    noise = np.random.default_rng(0).normal(size=SHAPE)
    with pytest.raises(KeyError, match="axis 0, 7 voxels"):
        analyse_noise(noise, np.zeros(SHAPE), MASK, SPACING).correlation(0, 7)
