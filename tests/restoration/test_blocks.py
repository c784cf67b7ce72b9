# SPDX-License-Identifier: Apache-2.0
"""Tests errors by axial block, and a patient's own score from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medaccel.restoration.evaluation.blocks import block_errors, block_starts
from medaccel.studies.statistics import Statistic, ratio_score


def within_patient(restored: np.ndarray, image: np.ndarray, *rest: Any, **options: Any) -> Statistic:
    """The score of one realisation."""
    return ratio_score(*(block_errors(volume, *rest, **options)[None] for volume in (restored, image)))


def test_within_patient_sums_squared_errors_by_block_inside_the_mask():
    generator = np.random.default_rng(0)
    shape, spacing = (6, 5, 30), (4.0, 4.0, 5.0)
    mask = np.zeros(shape, dtype=bool)
    mask[1:5, 1:4] = True
    target = generator.normal(size=shape)
    image = target + generator.normal(size=shape)
    restored = target + 0.5 * (image - target)
    restored[~mask] = 99.0
    result = within_patient(restored, image, target, mask, spacing)
    assert result.mean == pytest.approx(75)
    assert result.count == 3  # 150 mm in blocks of 50


def test_within_patient_on_ssim_is_zero_for_the_input():
    generator = np.random.default_rng(0)
    target = generator.normal(2, 1, (8, 8, 24))
    image = target + generator.normal(size=target.shape)
    mask = np.ones(target.shape, dtype=bool)
    result = within_patient(image, image, target, mask, (5.0, 5.0, 5.0), distance="ssim")
    assert (result.mean, result.low, result.high) == (0, 0, 0)


def test_blocks_cover_all_slices_and_none_is_shorter_than_asked():
    starts = block_starts(47, (1.0, 1.0, 5.0), 50.0)
    lengths = np.diff([*starts, 47])
    assert starts[0] == 0
    assert lengths.sum() == 47
    assert lengths.min() >= 10
    assert list(block_starts(3, (1.0, 1.0, 5.0), 50.0)) == [0]


def test_bad_arguments_are_refused_in_a_sentence():
    volume, mask = np.zeros((2, 2, 2)), np.ones((2, 2, 2), dtype=bool)
    with pytest.raises(ValueError, match="distance is 'mae'; expected 'mse' or 'ssim'"):
        block_errors(volume, volume, mask, (1.0, 1.0, 1.0), distance="mae")
    with pytest.raises(ValueError, match="block_length is 0"):
        block_starts(3, (1.0, 1.0, 1.0), 0.0)
