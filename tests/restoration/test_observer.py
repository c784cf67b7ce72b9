# SPDX-License-Identifier: Apache-2.0
"""Model observers have the signal-to-noise ratios and areas under the curve that theory gives them."""

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import norm

from medaccel.restoration.evaluation.observer import (
    Observed,
    channel_width,
    eye_filter,
    hotelling_templates,
    laguerre_gauss,
    npwe_template,
)

SHAPE, SPACING = (13, 11, 12), (4.0, 4.0, 5.0)
SIGMA = 0.5
CENTRE = (6, 5, 6)


def blob(width: float = 7.0, amplitude: float = 0.6) -> np.ndarray:
    grid = np.indices(SHAPE)
    squared = sum(((g - c) * s) ** 2 for g, c, s in zip(grid, CENTRE, SPACING, strict=True))
    return amplitude * np.exp(-squared / (2 * width**2))


def realisations(signal: np.ndarray, count: int, seed: int, blur: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Makes (count, i, j, k) images of noise with the signal and without it, on a background of 2."""
    noise = SIGMA * np.random.default_rng(seed).standard_normal((2, count, *SHAPE))
    if blur:
        noise = ndimage.gaussian_filter(noise, (0, 0, blur, blur, blur), mode="wrap")
    return 2 + signal + noise[0], 2 + noise[1]


def look(template: np.ndarray, present: np.ndarray, absent: np.ndarray) -> Observed:
    return Observed(np.tensordot(present, template, template.ndim), np.tensordot(absent, template, template.ndim))


def test_in_white_noise_the_known_signal_has_the_snr_of_its_length_over_sigma():
    signal = blob()
    found = look(npwe_template(signal, SPACING, eye=False), *realisations(signal, 2000, 0))
    expected = np.linalg.norm(signal) / SIGMA
    assert found.snr == pytest.approx(expected, rel=0.05)
    assert found.auc == pytest.approx(norm.cdf(expected / math.sqrt(2)), abs=0.01)


@pytest.mark.parametrize("blur", [0.0, 0.8])
def test_the_eye_filter_costs_what_its_frequencies_say(blur: float):
    signal = blob()
    template = npwe_template(signal, SPACING)
    assert abs(template.sum()) < 1e-9  # no uniform background is seen
    found = look(template, *realisations(signal, 3000, 1, blur))
    # By Parseval's theorem: SNR = Σ|S E|² / √(Σ |S|²|E|⁴ N), N the noise's power.
    gain = np.abs(np.fft.fftn(np.fft.irfftn(eye_filter(SHAPE, SPACING), SHAPE, (0, 1, 2)))) ** 2
    power = np.abs(np.fft.fftn(signal)) ** 2
    delta = np.zeros(SHAPE)
    delta[0, 0, 0] = 1
    response = ndimage.gaussian_filter(delta, blur, mode="wrap") if blur else delta
    noise = SIGMA**2 * np.abs(np.fft.fftn(response)) ** 2 * delta.size
    expected = (power * gain).sum() / math.sqrt((power * gain**2 * noise).sum())
    assert found.snr == pytest.approx(expected, rel=0.06)


def test_channels_are_orthonormal_and_the_first_is_a_gaussian():
    channels = laguerre_gauss(SHAPE, CENTRE, SPACING, 20.0)
    gram = np.tensordot(channels, channels, ((1, 2, 3), (1, 2, 3)))
    np.testing.assert_allclose(gram, np.eye(4), atol=1e-10)
    gaussian = blob(20.0 / math.sqrt(2 * math.pi), 1.0)
    np.testing.assert_allclose(channels[0], gaussian / np.linalg.norm(gaussian), atol=1e-10)
    # On a fine grid theory's own channels are orthogonal already: the second has L_1^(1/2)(x) = 3/2 − x.
    fine = laguerre_gauss((41, 41, 41), (20, 20, 20), (1.0, 1.0, 1.0), 20.0)
    squared = sum((g - 20.0) ** 2 for g in np.indices((41, 41, 41)))
    x = 2 * math.pi * squared / 400
    second = np.exp(-x / 2) * (1.5 - x)
    np.testing.assert_allclose(fine[1], second / np.linalg.norm(second), atol=1e-3)


@pytest.mark.parametrize("blur", [0.0, 0.8])
def test_the_hotelling_observer_is_the_best_with_its_channels(blur: float):
    width = 7.0 * math.sqrt(2 * math.pi)
    channels = laguerre_gauss(SHAPE, CENTRE, SPACING, width)
    signal = blob()
    present, absent = (np.tensordot(g, channels, ((1, 2, 3),) * 2) for g in realisations(signal, 1500, 2, blur))
    delta = np.tensordot(channels, signal, 3)
    residuals = np.concatenate([rows - rows.mean(0) for rows in (present, absent)])
    (template,) = hotelling_templates(delta[None], [residuals])
    found = look(template, present, absent)
    # Theory: SNR² = ΔᵀK⁻¹Δ, with K = C N Cᵀ of the noise's own covariance N.
    blurred = [ndimage.gaussian_filter(c, blur, mode="wrap") if blur else c for c in channels]
    covariance = SIGMA**2 * np.array([[np.sum(a * b) for b in blurred] for a in blurred])
    expected = math.sqrt(delta @ np.linalg.solve(covariance, delta))
    assert found.snr == pytest.approx(expected, rel=0.06)
    if not blur:  # the signal is the first channel, and white noise needs no whitening
        assert expected == pytest.approx(np.linalg.norm(signal) / SIGMA, rel=1e-6)
    matched = look(delta, present, absent)
    assert found.snr > 0.99 * matched.snr


def test_lesions_of_other_noise_share_one_covariance():
    generator = np.random.default_rng(3)
    factor = np.array([[1.0, 0.0], [0.8, 0.6]])
    residuals = [scale * generator.standard_normal((4000, 2)) @ factor.T for scale in (0.1, 5.0)]
    first, second = hotelling_templates(np.array([[1.0, 0.0], [1.0, 0.0]]), residuals)
    expected = np.linalg.solve(factor @ factor.T, [1.0, 0.0])
    np.testing.assert_allclose(first / np.linalg.norm(first), expected / np.linalg.norm(expected), atol=0.03)
    np.testing.assert_allclose(first, second)
    with pytest.raises(ValueError, match="2 residuals for 2 channels"):
        hotelling_templates(np.ones((1, 2)), [np.ones((2, 2))])


@pytest.mark.parametrize(
    ("present", "absent", "auc", "snr"),
    [
        ([3.0, 4.0], [1.0, 2.0], 1.0, 2 / math.sqrt(0.5)),
        ([1.0, 2.0], [3.0, 4.0], 0.0, -2 / math.sqrt(0.5)),
        ([1.0, 2.0], [1.0, 2.0], 0.5, 0.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5, 0.0),
        ([2.0, 2.0], [1.0, 1.0], 1.0, math.inf),
        ([1.0, 1.0], [2.0, 2.0], 0.0, -math.inf),
        ([2.0], [1.0], 1.0, math.nan),
        ([], [1.0], math.nan, math.nan),
    ],
)
def test_auc_and_snr_by_hand(present: list[float], absent: list[float], auc: float, snr: float):
    found = Observed(np.array(present), np.array(absent))
    assert found.auc == pytest.approx(auc, nan_ok=True)
    assert found.snr == pytest.approx(snr, nan_ok=True)


def test_wider_lesions_have_wider_channels_and_impossible_ones_are_refused():
    assert channel_width(0) == pytest.approx(8 / 2.3548 * math.sqrt(2 * math.pi), rel=1e-4)
    assert channel_width(6) < channel_width(10) < channel_width(30)
    with pytest.raises(ValueError, match="width is 0"):
        laguerre_gauss(SHAPE, CENTRE, SPACING, 0)
    with pytest.raises(ValueError, match="has no 4 channels"):
        laguerre_gauss((2, 2, 2), (0.5, 0.5, 0.5), SPACING, 20.0)
