# SPDX-License-Identifier: Apache-2.0
"""The point response of filters whose width is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from medaccel.restoration.evaluation.resolution import (
    FWHM_PER_SIGMA,
    blob_positions,
    point_response,
    summarize_responses,
)

SHAPE = (64, 60, 66)
SPACING = (2.0, 2.5, 2.0)
MASK = np.zeros(SHAPE, dtype=bool)
MASK[4:-4, 4:-4, 4:-4] = True
VOLUME = np.where(MASK, 2.0 + ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 1), 0)
VOLUME = VOLUME.astype(np.float32).clip(0)
CENTRE = (32, 30, 33)


def _filtered(fwhm_mm: float):
    sigma = [fwhm_mm / FWHM_PER_SIGMA / s for s in SPACING]
    return lambda volume: ndimage.gaussian_filter(volume, sigma, truncate=6)


def test_the_identity_keeps_the_blob_as_it_is():
    responses = point_response(lambda v: v, VOLUME, MASK, SPACING, amplitude=0.5, fwhm_mm=6.0, count=4)
    assert len(responses) == 4
    for response in responses:
        assert response.fwhm == pytest.approx((6, 6, 6), rel=1e-3)
        assert (response.peak, response.total, response.explained) == pytest.approx((1, 1, 1), abs=1e-4)
        assert response.added == pytest.approx(0.5 * response.background)
        assert response.background == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("width", [4.5, 8.0])
def test_the_width_after_a_gaussian_filter_is_the_root_of_the_squares(width: float):
    responses = point_response(_filtered(width), VOLUME, MASK, SPACING, amplitude=1, fwhm_mm=6.0, positions=[CENTRE])
    expected = math.hypot(6.0, width)
    assert responses[0].fwhm == pytest.approx((expected,) * 3, rel=0.01)
    assert responses[0].peak == pytest.approx((6 / expected) ** 3, rel=0.02)
    assert responses[0].total == pytest.approx(1, abs=0.01)
    assert responses[0].explained > 0.999


def test_widths_differ_along_axes_as_the_filter_does():
    sigma = (3.0 / 2.0, 0.0, 2.0 / 2.0)
    response = point_response(
        lambda v: ndimage.gaussian_filter(v, sigma), VOLUME, MASK, SPACING, amplitude=1, fwhm_mm=6, positions=[CENTRE]
    )[0]
    expected = (math.hypot(6, 3 * FWHM_PER_SIGMA), 6, math.hypot(6, 2 * FWHM_PER_SIGMA))
    assert response.fwhm == pytest.approx(expected, rel=0.01)


def test_a_nonlinear_restoration_answers_according_to_the_amplitude():
    # Smoothed unless it stands out by 2 SUV.
    def cleaned(volume: np.ndarray) -> np.ndarray:
        smooth = _filtered(12.0)(volume)
        return np.where(volume > smooth + 2.0, volume, smooth)

    faint, strong = (
        point_response(cleaned, np.full(SHAPE, 2.0), MASK, SPACING, amplitude=a, fwhm_mm=6.0, positions=[CENTRE])[0]
        for a in (0.25, 4.0)
    )
    assert faint.fwhm[0] == pytest.approx(math.hypot(6, 12), rel=0.03)
    assert faint.peak < 0.15
    assert strong.peak == pytest.approx(1, abs=1e-3)
    assert strong.fwhm[0] < 8


def test_a_restoration_that_ignores_the_blob_has_no_width():
    response = point_response(
        lambda v: np.ones_like(v), VOLUME, MASK, SPACING, amplitude=1.0, fwhm_mm=6.0, positions=[CENTRE]
    )[0]
    assert all(math.isnan(width) for width in response.fwhm)
    assert (response.peak, response.total) == (0, 0)
    summary = summarize_responses([response])
    assert (summary.count, summary.fitted) == (1, 0)
    assert math.isnan(summary.fwhm[0])


def test_blobs_together_in_one_volume_answer_as_alone_and_take_two_calls():
    calls = []

    def restore(volume: np.ndarray) -> np.ndarray:
        calls.append(volume.dtype)
        return _filtered(4.0)(volume)

    small = {"amplitude": 1.0, "fwhm_mm": 3.0, "count": 4}
    together = point_response(restore, VOLUME, MASK, SPACING, **small, together=True)
    assert calls == [np.float32] * 2
    alone = point_response(restore, VOLUME, MASK, SPACING, **small)
    assert len(together) == len(alone) == 4
    for one, other in zip(together, alone, strict=True):
        assert one.position == other.position
        assert one.fwhm == pytest.approx(other.fwhm, rel=1e-3)
        assert one.total == pytest.approx(other.total, abs=1e-3)


def test_a_method_that_hands_out_its_own_buffer_is_measured_too():
    buffer = np.zeros(SHAPE, dtype=np.float32)

    def restore(volume: np.ndarray) -> np.ndarray:
        buffer[...] = volume
        return buffer

    response = point_response(restore, VOLUME, MASK, SPACING, amplitude=1, fwhm_mm=6, positions=[CENTRE])[0]
    assert response.peak == pytest.approx(1, abs=1e-4)


def test_positions_are_reproducible_inside_the_body_and_apart():
    positions = blob_positions(VOLUME, MASK, SPACING, fwhm_mm=4.0, count=6, seed=1)
    assert positions == blob_positions(VOLUME, MASK, SPACING, fwhm_mm=4.0, count=6, seed=1)
    assert positions != blob_positions(VOLUME, MASK, SPACING, fwhm_mm=4.0, count=6, seed=2)
    for position in positions:
        assert all(3 < p < n - 4 for p, n in zip(position, SHAPE, strict=True))
    points = np.array(positions) * SPACING
    gaps = [np.abs(a - b).max() for n, a in enumerate(points) for b in points[:n]]
    assert min(gaps) >= 8 * 4.0
    # The body has room for few wide blobs.
    assert 1 <= len(blob_positions(VOLUME, MASK, SPACING, fwhm_mm=12.0, count=50)) < 10


def test_the_summary_is_the_median_of_those_that_fitted():
    kept = [
        point_response(_filtered(w), VOLUME, MASK, SPACING, amplitude=1.5, fwhm_mm=6.0, positions=[CENTRE])[0]
        for w in (3.0, 4.0, 8.0)
    ]
    lost = point_response(
        lambda v: np.ones_like(v), VOLUME, MASK, SPACING, amplitude=1.5, fwhm_mm=6.0, positions=[CENTRE]
    )
    summary = summarize_responses([*kept, *lost])
    assert (summary.count, summary.fitted) == (4, 3)
    assert summary.fwhm == kept[1].fwhm
    assert summary.amplitude == pytest.approx(1.5)
    assert summary.peak == pytest.approx((kept[1].peak + kept[2].peak) / 2)
    row = summary.flat()
    assert row["fwhm_k"] == kept[1].fwhm[2]
    assert "fwhm" not in row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volume": VOLUME[1:]}, "volume has shape"),
        ({"volume": np.where(VOLUME > 2.5, np.nan, VOLUME)}, "NaN or infinite"),
        ({"mask": np.zeros_like(MASK)}, "mask is empty"),
        ({"spacing": (2.0, 0.0, 2.0)}, "spacing is "),
        ({"amplitude": 0.0}, "amplitude is 0.0"),
        ({"fwhm_mm": math.nan}, "fwhm_mm is nan"),
        ({"fwhm_mm": 60.0}, "no voxel with uptake"),
        ({"count": 0}, "count is 0"),
        ({"positions": []}, "positions is empty"),
        ({"positions": [(0, 0, 0)]}, r"position \(0, 0, 0\) is not inside the mask"),
        ({"positions": [(-1, 30, 30)]}, r"position \(-1, 30, 30\) is not inside the mask"),
        ({"volume": np.zeros(SHAPE), "positions": [CENTRE]}, "background of 0 SUV"),
        ({"positions": [CENTRE, (32, 30, 43)], "together": True}, "positions are 20 mm apart"),
        ({"restore": lambda v: v[1:]}, "restore returned shape"),
        ({"restore": lambda v: v * np.nan}, "voxels NaN or infinite"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change: dict, message: str):
    arguments = {
        "restore": lambda v: v, "volume": VOLUME, "mask": MASK, "spacing": SPACING, "amplitude": 1.0, "fwhm_mm": 4.0
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        point_response(**(arguments | change))


def test_a_summary_needs_responses_of_one_width():
    with pytest.raises(ValueError, match="no responses"):
        summarize_responses([])
    two = [
        point_response(lambda v: v, VOLUME, MASK, SPACING, amplitude=1.0, fwhm_mm=w, positions=[CENTRE])[0]
        for w in (4.0, 6.0)
    ]
    with pytest.raises(ValueError, match=r"\[4.0, 6.0\] mm FWHM"):
        summarize_responses(two)
