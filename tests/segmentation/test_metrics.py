# SPDX-License-Identifier: Apache-2.0
"""Measures of a segmentation, on shapes whose scores are known."""

from dataclasses import replace

import numpy as np
import pytest

from medaccel.segmentation.evaluation.metrics import (
    bland_altman,
    component_voxels,
    largest_components,
    score_case,
)
from medaccel.segmentation.evaluation.results import Run
from medaccel.segmentation.protocol import Cell

SPACING = (2.0, 2.0, 2.0)
EMPTY = np.zeros((16, 16, 16), dtype=bool)


def cube(start: int, stop: int) -> np.ndarray:
    mask = EMPTY.copy()
    mask[start:stop, start:stop, start:stop] = True
    return mask


def test_equal_masks_are_perfect():
    scores = score_case(cube(4, 12), cube(4, 12).astype(np.uint8), SPACING)
    assert (scores.dice, scores.hausdorff95_mm, scores.surface_dice) == (1, 0, 1)
    assert (scores.boundary_dice, scores.interior_dice) == (1, 1)
    assert scores.volume_ml == pytest.approx(8**3 * 8 / 1000)
    assert (scores.lesions, scores.lesions_found, scores.false_positives) == (1, 1, 0)


def test_a_shift_by_one_voxel():
    truth = cube(4, 12)
    scores = score_case(np.roll(truth, 1, axis=0), truth, SPACING, tolerance=1.0)
    assert scores.dice == pytest.approx(7 / 8)
    assert scores.hausdorff95_mm == pytest.approx(2.0)
    assert scores.surface_dice < 0.9
    assert scores.volume_error_ml == 0
    assert score_case(np.roll(truth, 1, axis=0), truth, SPACING, tolerance=2.0).surface_dice == 1
    # In spacing of 4 mm along that axis the same shift is twice as far.
    assert score_case(np.roll(truth, 1, axis=0), truth, (4.0, 2.0, 2.0)).hausdorff95_mm == pytest.approx(4.0)


def test_what_empty_masks_give_is_stated():
    both = score_case(EMPTY, EMPTY, SPACING)
    assert (both.dice, both.hausdorff95_mm, both.surface_dice, both.boundary_dice) == (1, 0, 1, 1)
    assert (both.lesions, both.lesions_found, both.false_positives) == (0, 0, 0)
    diagonal = 32 * np.sqrt(3)
    for predicted, truth in ((EMPTY, cube(4, 8)), (cube(4, 8), EMPTY)):
        one = score_case(predicted, truth, SPACING)
        assert (one.dice, one.surface_dice) == (0, 0)
        assert one.hausdorff95_mm == pytest.approx(diagonal)
    assert score_case(cube(4, 8), EMPTY, SPACING).false_positives == 1


def test_boundary_and_interior_tell_faults_apart():
    truth = cube(2, 14)
    holed = truth.copy()
    holed[7:9, 7:9, 7:9] = False
    hole = score_case(holed, truth, SPACING, band=4.0)
    assert hole.boundary_dice == 1
    assert hole.interior_dice < 1
    thin = score_case(cube(3, 13), truth, SPACING, band=4.0)
    assert thin.boundary_dice < 1
    assert thin.interior_dice == 1


def test_the_boundary_of_large_voxels_is_a_voxel_on_either_side():
    truth = cube(4, 12)
    thin = score_case(cube(5, 11), truth, (8.0, 8.0, 8.0), band=6.0)
    assert thin.boundary_dice == 0
    assert thin.interior_dice == 1


def test_lesions_are_counted_one_by_one():
    truth, predicted = EMPTY.copy(), EMPTY.copy()
    truth[1:4, 1:4, 1:4] = truth[8:10, 8:10, 8:10] = truth[13, 13, 13] = True
    predicted[2:5, 1:4, 1:4] = predicted[8, 8, 8] = predicted[1, 14, 14] = predicted[14, 1, 1] = True
    scores = score_case(predicted, truth, SPACING)
    assert (scores.lesions, scores.lesions_found, scores.false_positives) == (3, 2, 2)


def test_components_that_touch_at_a_corner_are_one():
    mask = EMPTY.copy()
    mask[1, 1, 1] = mask[2, 2, 2] = mask[10:13, 10, 10] = True
    assert largest_components(mask).sum() == 3
    assert largest_components(mask, 2).sum() == 5
    assert not largest_components(EMPTY).any()
    with pytest.raises(ValueError, match="count is 0; expected at least 1"):
        largest_components(mask, 0)


def test_agreement_of_volumes():
    found = bland_altman([10, 20, 30], [11, 23, 32])
    assert found["bias_ml"] == pytest.approx(2)
    assert found["upper_ml"] - found["bias_ml"] == pytest.approx(1.96)
    with pytest.raises(ValueError, match="1 true and 1 predicted volumes; expected two or more pairs"):
        bland_altman([1], [1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((EMPTY[:8], EMPTY, SPACING), r"predicted has shape \(8, 16, 16\); expected the truth's"),
        ((EMPTY[0], EMPTY[0], SPACING), r"predicted has shape \(16, 16\); expected three axes"),
        ((2 * EMPTY.astype(int) + 2, EMPTY, SPACING), "predicted holds values beside 0 and 1"),
        ((EMPTY, EMPTY, (2.0, 2.0)), r"spacing is \(2.0, 2.0\); expected three numbers"),
        ((EMPTY, EMPTY, (2.0, 2.0, np.nan)), "spacing is .*nan"),
    ],
)
def test_masks_that_do_not_fit_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        score_case(*arguments)


def test_components_are_counted_by_size():
    mask = cube(4, 8) | cube(10, 15)
    assert component_voxels(mask) == [125, 64]
    assert component_voxels(EMPTY) == []


def test_lesions_are_summed_up_over_cases():
    scores = [
        score_case(cube(4, 8), cube(4, 8) | cube(10, 12), SPACING),
        score_case(cube(4, 8) | cube(10, 12), cube(4, 8), SPACING),
        score_case(cube(1, 3), EMPTY, SPACING),
    ]
    rows = [{"case": str(number), "structure": "tumour", **found.plain()} for number, found in enumerate(scores)]
    run = Run(Cell("lung", "random", 1.0, 0), rows, [], {})
    assert run.sensitivity == pytest.approx(100 * 2 / 3)
    assert run.false_positives == pytest.approx(2 / 3)
    assert np.isnan(replace(run, rows=rows[2:]).sensitivity)
