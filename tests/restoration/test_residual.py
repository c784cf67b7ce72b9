# SPDX-License-Identifier: Apache-2.0
"""Residual shrinkage: noise stays away, lesions that the denoising took come back."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medaccel.restoration.methods.networks.residual import residual_shrinkage

SPACING = (4.0, 4.0, 4.0)
SHAPE = (40, 36, 32)


def _body() -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[4:-4, 4:-4, 2:-2] = True
    return mask


def _scan(lesion: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A PET with a lesion of 14 mm in even activity, the activity, and where the lesion is."""
    index = np.indices(SHAPE) - np.array([20, 18, 16]).reshape(3, 1, 1, 1)
    inside = np.sqrt((index**2).sum(axis=0)) * 4 <= 7
    truth = np.where(_body(), 2.0, 0.0).astype(np.float32)
    truth[inside] += lesion
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), 0.7)
    volume = np.maximum(truth * (1 + 0.25 * noise / noise.std()), 0).astype(np.float32)
    return volume, truth, inside


def test_a_lesion_that_was_smoothed_away_comes_back():
    volume, truth, inside = _scan(lesion=4.0)
    lost = np.where(inside, 2.0, truth).astype(np.float32)
    back = residual_shrinkage(volume, lost, _body(), SPACING, threshold=2.0)
    # A sphere of 14 mm keeps about a third of its height through 10 mm FWHM.
    assert back[inside].mean() > 2.0 + 0.25 * 4.0
    far = _body() & (gaussian_filter(inside.astype(float), 4) < 1e-3)
    assert np.abs(back[far] - 2.0).mean() < 0.01


def test_a_perfect_activity_hardly_changes_and_less_so_the_higher_the_threshold():
    volume, truth, _ = _scan(lesion=4.0)
    changes = [
        float(np.square(residual_shrinkage(volume, truth, _body(), SPACING, threshold) - truth)[_body()].mean())
        for threshold in (0.0, 1.0, 2.0, 4.0)
    ]
    assert changes == sorted(changes, reverse=True)
    assert changes[2] < 0.02 * changes[0]
    assert changes[2] < 2e-4 * float(np.square(volume - truth)[_body()].mean()) * 100


def test_a_hot_spot_that_the_denoising_made_up_goes_away():
    volume, truth, inside = _scan(lesion=0.0)
    invented = np.where(inside, 6.0, truth).astype(np.float32)
    back = residual_shrinkage(volume, invented, _body(), SPACING, threshold=2.0)
    assert back[inside].mean() < 6.0 - 0.2 * 4.0
    assert back.min() >= 0


def test_outside_the_body_and_without_one_nothing_changes():
    volume, truth, _ = _scan(lesion=4.0)
    back = residual_shrinkage(volume, truth * 0.5, _body(), SPACING, threshold=0.0)
    assert np.array_equal(back[~_body()], 0.5 * truth[~_body()])
    nothing = np.zeros(SHAPE, dtype=bool)
    assert np.array_equal(residual_shrinkage(volume, truth, nothing, SPACING, threshold=1.0), truth)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_it_scales_with_the_uptake(factor: float):
    """But for the floor of 0.1 SUV, which tells an empty voxel from a cold one."""
    volume, truth, _ = _scan(lesion=4.0)
    smooth = gaussian_filter(truth, 2)
    once = residual_shrinkage(volume, smooth, _body(), SPACING, threshold=1.5)
    scaled = residual_shrinkage(factor * volume, factor * smooth, _body(), SPACING, threshold=1.5)
    assert np.allclose(scaled / factor, once, atol=0.15)
