# SPDX-License-Identifier: Apache-2.0
"""Lesions are measured, lost and created on volumes made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medaccel.restoration.evaluation import lesions as lesion_metrics
from medaccel.restoration.evaluation.lesions import created_hot_spots, hot_spot_ceiling, is_lost, measure_lesions

SPACING = (4.0, 4.0, 4.0)
SHAPE = (32, 32, 32)
MASK = np.ones(SHAPE, dtype=bool)


def _study() -> tuple[np.ndarray, np.ndarray]:
    """Makes a background of 1 SUV with a lesion of 3³ voxels at 5 (one voxel 8) and one cold lesion of 0.2."""
    image, labels = np.ones(SHAPE), np.zeros(SHAPE, dtype=np.int16)
    labels[8:11, 8:11, 8:11] = 1
    labels[22:25, 22:25, 22:25] = 4
    image[labels == 1], image[labels == 4] = 5.0, 0.2
    image[9, 9, 9] = 8.0
    return image, labels


def test_uptakes_of_a_cube_match_the_hand_calculation():
    image, labels = _study()
    regions = lesion_metrics.lesion_regions(labels, MASK, SPACING)
    assert [region.label for region in regions] == [1, 4]
    assert regions[0].diameter == pytest.approx((6 * 27 * 64 / math.pi) ** (1 / 3))
    hot, cold = measure_lesions(image, regions, SPACING)
    assert hot.mean == pytest.approx((26 * 5 + 8) / 27)
    assert hot.maximum == 8
    assert hot.background == 1
    assert cold.contrast == pytest.approx(-0.8)
    assert lesion_metrics.is_hot(hot)
    assert not lesion_metrics.is_hot(cold)


def test_suvpeak_is_the_highest_sphere_mean_centred_in_the_lesion():
    image, labels = _study()
    hot = measure_lesions(image, lesion_metrics.lesion_regions(labels, MASK, SPACING), SPACING)[0]
    # By brute force: fine sample points within 6.2 mm of each voxel's centre, each with its voxel's value.
    radius = (3000 / (4 * math.pi)) ** (1 / 3)
    steps = np.arange(-radius, radius, 0.25) + 0.125
    offsets = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    offsets = offsets[(offsets**2).sum(1) <= radius**2]
    means = []
    for centre in np.argwhere(labels == 1):
        index = np.rint(centre + offsets / 4.0).astype(int)
        means.append(image[tuple(index.T)].mean())
    assert hot.peak == pytest.approx(max(means), rel=5e-3)


@pytest.mark.parametrize("spacing", [SPACING, (4.7, 4.7, 3.3), (1.0, 2.0, 9.0)])
def test_peak_sphere_has_one_cubic_centimetre(spacing: tuple[float, float, float]):
    weights = lesion_metrics.peak_sphere(spacing)
    assert weights.sum() == pytest.approx(1)
    centre = tuple(n // 2 for n in weights.shape)
    # The central voxel is wholly inside, so its weight is its share of the volume.
    if max(spacing) < 5:
        assert weights[centre] == pytest.approx(math.prod(spacing) / 1000, rel=0.01)
    assert np.array_equal(weights, weights[::-1, ::-1, ::-1])


@pytest.mark.parametrize(("kept", "lost"), [(0.6, False), (0.4, True), (-0.2, True)])
def test_a_lesion_that_keeps_less_than_half_its_contrast_is_lost(kept: float, lost: bool):
    image, labels = _study()
    regions = lesion_metrics.lesion_regions(labels, MASK, SPACING)
    reference = measure_lesions(image, regions, SPACING)[0]
    restored = image.copy()
    restored[labels == 1] = 1 + kept * (image[labels == 1] - 1)
    assert is_lost(measure_lesions(restored, regions, SPACING)[0], reference) is lost


def test_a_lesion_that_never_stood_out_is_not_counted_as_lost():
    image, labels = np.ones(SHAPE), _study()[1]
    image[labels == 1] = 1.2
    regions = lesion_metrics.lesion_regions(labels, MASK, SPACING)
    reference = measure_lesions(image, regions, SPACING)[0]
    assert not is_lost(measure_lesions(np.ones(SHAPE), regions, SPACING)[0], reference)


def test_background_leaves_out_neighbouring_lesions_and_air():
    image, labels = _study()
    labels[8:11, 8:11, 13:16] = 2
    image[labels == 2] = 90.0
    mask = MASK.copy()
    mask[:8] = False
    image[~mask] = 0.0
    regions = lesion_metrics.lesion_regions(labels, mask, SPACING)
    assert [u.background for u in measure_lesions(image, regions, SPACING)] == [1, 1, 1]
    for region in regions:
        assert not (region.surroundings & (labels[region.box] > 0)).any()
        assert not (region.surroundings & ~mask[region.box]).any()


def test_a_hot_spot_that_the_truth_lacks_is_created():
    image, labels = _study()
    ceiling = hot_spot_ceiling(image, MASK, labels, SPACING)
    assert created_hot_spots(image, ceiling, SPACING) == []
    restored = image.copy()
    restored[20:23, 8:11, 8:11] = 1.6
    diameter = (6 * 27 * 64 / math.pi) ** (1 / 3)
    assert created_hot_spots(restored, ceiling, SPACING) == pytest.approx([diameter])
    restored[20:23, 8:11, 8:11] = 1.45  # less than 0.5 SUV above
    assert created_hot_spots(restored, ceiling, SPACING) == []


def test_one_noisy_voxel_is_no_hot_spot_and_two_that_touch_are():
    image, labels = _study()
    ceiling = hot_spot_ceiling(image, MASK, labels, SPACING)
    restored = image.copy()
    restored[20, 8, 8] = 3
    assert created_hot_spots(restored, ceiling, SPACING) == []
    restored[21, 9, 9] = 3
    assert len(created_hot_spots(restored, ceiling, SPACING)) == 1


def test_hot_spots_in_a_lesion_outside_the_body_or_at_a_moved_border_are_not_counted():
    image, labels = _study()
    mask = MASK.copy()
    mask[:, :, 28:] = False
    image[:, :4, :] = 6.0  # an organ
    ceiling = hot_spot_ceiling(image, mask, labels, SPACING)
    restored = image.copy()
    restored[7:12, 7:12, 7:12] = 20.0
    restored[15:20, 15:20, 29:31] = 20.0
    restored[:, 4, :28] = 6.0
    assert created_hot_spots(restored, ceiling, SPACING) == []


def test_liver_variation_is_that_of_the_eroded_organ():
    generator = np.random.default_rng(0)
    organ = np.zeros(SHAPE, dtype=bool)
    organ[:, 4:28, 4:28] = True  # cut by the field of view along i
    image = np.where(organ, generator.normal(2.0, 0.2, SHAPE), 50.0)
    core = image[2:-2, 6:-6, 6:-6]  # 10 mm are 2.5 voxels: the third one's centre is further than that inside
    measured = lesion_metrics.coefficient_of_variation(image, lesion_metrics.organ_core(organ, SPACING))
    assert measured == pytest.approx(core.std(ddof=1) / core.mean())


def test_variation_is_nan_where_erosion_leaves_nothing():
    organ = np.zeros(SHAPE, dtype=bool)
    organ[:3, :3, :3] = True
    core = lesion_metrics.organ_core(organ, SPACING)
    assert not core.any()
    assert math.isnan(lesion_metrics.coefficient_of_variation(np.ones(SHAPE), core))
    with pytest.raises(ValueError, match=r"core has shape \(32, 32, 32\), the image \(2, 2, 2\)"):
        lesion_metrics.coefficient_of_variation(np.ones((2, 2, 2)), core)


def test_lesions_that_are_not_labels_are_refused():
    with pytest.raises(ValueError, match="lesions: float64"):
        lesion_metrics.lesion_regions(np.zeros(SHAPE), MASK, SPACING)
    with pytest.raises(ValueError, match="expected integers of shape"):
        lesion_metrics.lesion_regions(np.zeros((2, 2, 2), dtype=int), MASK, SPACING)
