# SPDX-License-Identifier: Apache-2.0
"""The noise level of an input, the share of the limit beside it, and the noise that a restoration leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from medaccel.restoration.evaluation.noise_effects import (
    NoiseLevel,
    NoiseShare,
    compare_noise,
    noise_level,
    noise_trend,
    remaining_noise,
    share_against_noise,
)

SHAPE = (40, 36, 38)
SPACING = (4.0, 4.0, 4.0)
MASK = np.zeros(SHAPE, dtype=bool)
MASK[3:-3, 3:-3, 3:-3] = True


def _exposures(seed: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Makes 60 and 90 s of white noise on 2 SUV; `strength` is the deviation of one second."""
    generator = np.random.default_rng(seed)
    parts = [2 + strength / math.sqrt(30) * generator.normal(size=SHAPE) for _ in range(3)]
    return (parts[0] + parts[1]) / 2, sum(parts) / 3


@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_the_noise_level_is_that_of_the_input_not_of_the_difference(strength: float):
    image, target = _exposures(0, strength)
    level = noise_level(image, target, MASK, 60, 90, liver_core=MASK)
    expected = strength / math.sqrt(60) / 2
    assert level.body == pytest.approx(expected, rel=0.02)
    assert level.liver == pytest.approx(expected, rel=0.02)
    assert math.isnan(noise_level(image, target, MASK, 60, 90).liver)


def test_structure_raises_the_livers_level_and_not_the_bodys():
    image, target = _exposures(0, 1.0)
    lumps = np.where(np.arange(SHAPE[0]) % 2, 0.5, -0.5)[:, None, None]
    level = noise_level(image + lumps, target + lumps, MASK, 60, 90, liver_core=MASK)
    assert level.body == pytest.approx(1 / math.sqrt(60) / 2, rel=0.02)
    assert level.liver > 0.24


def test_shares_stand_beside_their_studys_level():
    levels = [NoiseLevel(0.1 * n, math.nan) for n in range(1, 5)]
    rows = [{"share_of_limit": share} for share in (0.4, 0.5, 0.6, 0.9)]
    points = share_against_noise(["a", "b", "c", "d"], levels, rows)
    assert points[2] == NoiseShare("c", levels[2], 0.6)
    assert points[0].flat() == {
        "study": "a",
        "noise_body": 0.1,
        "noise_liver": pytest.approx(math.nan, nan_ok=True),
        "share": 0.4,
    }
    trend = noise_trend(points)
    assert (trend.correlation, trend.count) == (pytest.approx(1), 4)
    assert noise_trend(points[::-1]).correlation == pytest.approx(1)
    missing = noise_trend(points, where="liver")
    assert (missing.count, math.isnan(missing.p)) == (0, True)


def test_a_trend_of_equal_shares_or_of_two_studies_is_not_defined():
    level = [NoiseLevel(0.1, 0.1), NoiseLevel(0.2, 0.2), NoiseLevel(0.3, 0.1)]
    equal = [NoiseShare(str(n), noise, 0.5) for n, noise in enumerate(level)]
    assert math.isnan(noise_trend(equal).correlation)
    two = [NoiseShare("a", level[0], 0.5), NoiseShare("b", level[1], 0.7)]
    assert math.isnan(noise_trend(two).p)
    assert noise_trend([]).count == 0


def test_smoothing_leaves_less_noise_and_a_correlated_one():
    studies = []
    sigma = 1.0
    for seed in range(3):
        image, _ = _exposures(seed, 2.0)
        # With the target's noise away, what a filter leaves is filtered noise: ρ = exp(−d²/4σ²).
        smooth = ndimage.gaussian_filter(image, sigma)
        images = {"identity": image, "smooth": smooth}
        studies.append(remaining_noise(images, np.full(SHAPE, 2.0), MASK, SPACING, distances=(1, 2)))
    before, after = compare_noise(studies)
    assert (before.method, after.method) == ("identity", "smooth")
    assert before.ratio.mean == 1
    # A 3-D Gaussian leaves 1/(2σ√π)³ of the variance of white noise.
    assert after.ratio.mean == pytest.approx((2 * sigma * math.sqrt(math.pi)) ** -1.5, rel=0.05)
    assert after.sd.mean == pytest.approx(after.ratio.mean * before.sd.mean, rel=1e-3)
    assert after.sd.count == 3
    for axis in range(3):
        assert abs(before.correlation[axis, 1].mean) < 0.02
        for d in (1, 2):
            assert after.correlation[axis, d].mean == pytest.approx(math.exp(-(d**2) / 4), abs=0.04)
            assert after.distance[axis, d] == 4 * d
    row = after.flat()
    assert row["rho_k2"] == after.correlation[2, 2].mean
    assert row["variance_i1"] == after.variance[0, 1].mean


def test_the_bias_is_that_inside_the_mask():
    image, target = _exposures(0, 1.0)
    shifted = np.where(MASK, image + 0.3, 1e6)
    noise = remaining_noise({"identity": shifted}, target, MASK, SPACING)["identity"]
    assert noise.bias == pytest.approx(0.3, abs=0.01)
    assert noise.sd == pytest.approx((image - target)[MASK].std())


def test_bad_input_is_refused_in_a_sentence():
    image, target = _exposures(0, 1.0)
    with pytest.raises(ValueError, match="image has shape"):
        noise_level(image[1:], target, MASK, 60, 90)
    broken = target.copy()
    broken[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="target has 1 voxels that are NaN"):
        noise_level(image, broken, MASK, 60, 90)
    with pytest.raises(ValueError, match="mask is empty"):
        noise_level(image, target, np.zeros_like(MASK), 60, 90)
    with pytest.raises(ValueError, match="expected 0 < input < target"):
        noise_level(image, target, MASK, 90, 60)
    with pytest.raises(ValueError, match="target has a mean of 0 SUV"):
        noise_level(image, np.zeros(SHAPE), MASK, 60, 90)
    with pytest.raises(ValueError, match="2 studies, 1 noise levels and 0 rows"):
        share_against_noise(["a", "b"], [NoiseLevel(0.1, 0.1)], [])
    with pytest.raises(ValueError, match="0 studies"):
        share_against_noise([], [], [])
    with pytest.raises(ValueError, match="where is 'lung'"):
        noise_trend([NoiseShare("a", NoiseLevel(0.1, 0.1), 0.5)], where="lung")
    with pytest.raises(ValueError, match="got no images"):
        remaining_noise({}, target, MASK, SPACING)
    with pytest.raises(ValueError, match="no noise to analyse"):
        remaining_noise({"identity": target}, target, MASK, SPACING)


def test_studies_that_do_not_belong_together_are_refused():
    image, target = _exposures(0, 1.0)
    one = remaining_noise({"identity": image}, target, MASK, SPACING, distances=(1,))
    two = remaining_noise({"identity": image}, target, MASK, SPACING, distances=(2,))
    other = remaining_noise({"identity": image, "x": image}, target, MASK, SPACING, distances=(1,))
    with pytest.raises(ValueError, match="different methods or distances"):
        compare_noise([one, two])
    with pytest.raises(ValueError, match="different methods or distances"):
        compare_noise([one, other])
    with pytest.raises(ValueError, match="with 'input' in each"):
        compare_noise([one], before="input")
    with pytest.raises(ValueError, match="expected at least one"):
        compare_noise([])


def test_the_oracle_leaves_the_root_of_t_over_T_of_the_inputs_noise():
    image, target = _exposures(0, 2.0)
    best = (2 * image + 2.0) / 3  # λ is 2 everywhere
    change = compare_noise([remaining_noise({"identity": image, "oracle": best}, target, MASK, SPACING)])[1]
    assert change.ratio.mean == pytest.approx(math.sqrt(60 / 90), rel=0.02)
