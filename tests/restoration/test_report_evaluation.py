# SPDX-License-Identifier: Apache-2.0
"""Tests that the evaluation blocks state the results, and appear in a report."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from medaccel.report.html import Block, Figure, Interval, Page, Section, Table, render
from medaccel.restoration.evaluation.calibration import CALIBRATED, Calibration, Coverage, coverage, fit_calibration
from medaccel.restoration.evaluation.comparison import compare_methods
from medaccel.restoration.evaluation.noise_effects import (
    NoiseLevel,
    compare_noise,
    remaining_noise,
    share_against_noise,
)
from medaccel.restoration.evaluation.resolution import PointResponse
from medaccel.restoration.report.evaluation import (
    calibration_blocks,
    comparison_blocks,
    noise_change_blocks,
    noise_share_blocks,
    resolution_blocks,
)

SHAPE = (20, 20, 20)
MASK = np.ones(SHAPE, dtype=bool)


def _tables(blocks: Sequence[Block]) -> list[Table]:
    return [block for block in blocks if isinstance(block, Table)]


def _pictures(blocks: Sequence[Block]) -> list[np.ndarray]:
    return [matplotlib.image.imread(io.BytesIO(b.png)) for b in blocks if isinstance(b, Figure)]


def _html(blocks: Sequence[Block]) -> str:
    return render(Page("Evaluation", [], [Section("Evaluation", blocks)]))


def _cell(table: Table, row: str, column: str) -> Any:
    cells = next(r.cells for r in table.rows if r.label == row)
    return cells[[c.header for c in table.columns].index(column)]


def _calibrated(claimed: float, **options) -> tuple[Calibration, Coverage]:
    def item(seed: int):
        generator = np.random.default_rng(seed)
        mean, sd = generator.uniform(0.2, 3.9, SHAPE), generator.uniform(0.05, 0.4, SHAPE)
        return mean + sd * generator.normal(size=SHAPE), mean, claimed * sd, MASK

    calibration = fit_calibration([item(0), item(1)], least_voxels=100, **options)
    return calibration, coverage(calibration, [item(2), item(3)])


@pytest.fixture(scope="module")
def sampled() -> dict[str, tuple[Calibration, Coverage]]:
    return {"diffusion": _calibrated(0.5), "ensemble": _calibrated(1.0)}


def test_coverage_is_told_overall_by_suv_and_in_two_figures(sampled: dict):
    results = {m: result for m, (_, result) in sampled.items()}
    calibrations = {m: calibration for m, (calibration, _) in sampled.items()}
    blocks = calibration_blocks(results, calibrations, labels={"diffusion": "Diffusion"})
    overall, by_suv, _ = _tables(blocks)
    assert [row.label for row in overall.rows] == ["Diffusion", "ensemble"]
    shown = _cell(overall, "Diffusion", "Coverage")
    assert isinstance(shown, Interval)
    assert shown.value == pytest.approx(90, abs=1.5)
    assert shown.low <= shown.value <= shown.high
    assert _cell(overall, "Diffusion", "Uncalibrated coverage") == pytest.approx(59, abs=2)
    assert _cell(overall, "Diffusion", "Interval score") == results["diffusion"].overall.intervals[CALIBRATED].score
    assert [row.label for row in by_suv.rows] == ["below 0.5", "0.5–1", "1–2", "2–4", "4–8", "8 and more"]
    assert _cell(by_suv, "1–2", "Factor") == calibrations["diffusion"].factors[2]
    html = _html(blocks)
    assert "the activity λ, in a simulation the noise-free reconstruction" in html
    assert "1.645" in html
    assert "80 to 97 %" in html
    assert "2/α" in html
    # Each of the two curves of a method is drawn: its colour, pure, is in both pictures.
    for picture in _pictures(blocks):
        for colour in ((0x0B, 0x5C, 0xAD), (0xD1, 0x49, 0x5B)):
            assert np.isclose(picture[..., :3], np.array(colour) / 255, atol=0.01).all(axis=-1).sum() > 200


def test_what_is_covered_is_said_for_the_target_too():
    calibration, result = _calibrated(1.0, covers="target", level=0.8)
    html = _html(calibration_blocks({"a": result}, {"a": calibration}))
    assert "the measured PET<sub>T</sub>, its own noise included" in html
    assert "in 80 % of the body" in html
    assert "1.282" in html


def test_results_that_do_not_belong_together_are_refused(sampled: dict):
    calibration, result = sampled["ensemble"]
    with pytest.raises(ValueError, match="there are no results"):
        calibration_blocks({}, {})
    with pytest.raises(ValueError, match=r"results of \['a'\], calibrations of \['b'\]"):
        calibration_blocks({"a": result}, {"b": calibration})
    other_calibration, other = _calibrated(1.0, covers="target")
    with pytest.raises(ValueError, match="expected one truth, one level and one set of SUV bins"):
        calibration_blocks({"a": result, "b": other}, {"a": calibration, "b": other_calibration})


def test_comparisons_show_differences_in_percent_and_both_tests():
    generator = np.random.default_rng(0)
    base = generator.uniform(0.3, 0.5, 12)
    values = {"gaussian1": base, "net": base + 0.05 + 0.01 * generator.normal(size=12), "identity": np.zeros(12)}
    comparisons = compare_methods(values, "gaussian1")
    (table,) = _tables(comparison_blocks(comparisons, "share of the limit", unit="%", factor=100))
    difference = _cell(table, "net", "Difference")
    assert isinstance(difference, Interval)
    assert difference.value == pytest.approx(100 * np.mean(values["net"] - base))
    assert _cell(table, "net", "Better in") == "12 of 12"
    assert _cell(table, "net", "t-test, Holm") == "< 0.001"
    assert "with Gaussian, 1 layer" in table.caption
    assert "positive is better" in table.caption
    assert [row.reference for row in table.rows] == [False, True]


def test_where_smaller_is_better_the_caption_and_the_count_turn():
    comparisons = compare_methods({"a": [1.0, 2.0, 3.0], "b": [0.5, 1.0, 3.5]}, "a")
    (table,) = _tables(comparison_blocks(comparisons, "MSE", larger_is_better=False, digits=3))
    assert _cell(table, "b", "Better in") == "2 of 3"
    assert "negative is better" in table.caption
    assert table.columns[0].best == "min"
    one = _tables(comparison_blocks(compare_methods({"a": [1.0], "b": [2.0]}, "a"), "MSE"))[0]
    assert one.rows[0].cells[2] == "–"
    with pytest.raises(ValueError, match="expected one method"):
        comparison_blocks([*comparisons, *compare_methods({"a": [1.0], "b": [2.0]}, "b")], "MSE")
    with pytest.raises(ValueError, match="expected one method"):
        comparison_blocks([], "MSE")


def test_share_stands_against_noise_with_its_trend():
    levels = [NoiseLevel(0.1 + 0.02 * n, math.nan) for n in range(8)]
    names = [f"study {n}" for n in range(8)]
    rising = share_against_noise(names, levels, [{"share_of_limit": 0.3 + 0.05 * n} for n in range(8)])
    flat = share_against_noise(names, levels, [{"share_of_limit": 0.4} for n in range(8)])
    blocks = noise_share_blocks({"net": rising, "gaussian1": flat})
    (table,) = _tables(blocks)
    assert _cell(table, "net", "Rank correlation with noise") == pytest.approx(1)
    assert _cell(table, "net", "Trend") == "< 0.001"
    assert _cell(table, "Gaussian, 1 layer", "Trend") == "–"
    assert _cell(table, "Gaussian, 1 layer", "Share of the limit").value == pytest.approx(40)
    assert "sd(PET<sub>t</sub> − PET<sub>T</sub>)" in _html(blocks)
    (liver,) = _tables(noise_share_blocks({"net": rising}, where="liver"))
    assert _cell(liver, "net", "Studies") == 0
    with pytest.raises(ValueError, match="where is 'lung'"):
        noise_share_blocks({"net": rising}, where="lung")
    with pytest.raises(ValueError, match="there are no results"):
        noise_share_blocks({})


def test_noise_before_and_after_stand_in_one_table():
    generator = np.random.default_rng(0)
    target = generator.normal(2, 0.3, SHAPE)
    image = target + generator.normal(0, 0.5, SHAPE)
    halved = target + 0.5 * (image - target)
    noise = remaining_noise({"identity": image, "net": halved}, target, MASK, (4.0, 4.0, 3.0), distances=(1, 2))
    blocks = noise_change_blocks(compare_noise([noise, noise]), target_seconds=90)
    strength, correlation = _tables(blocks)
    assert _cell(strength, "net", "sd(Δ) over the input's").value == pytest.approx(50)
    assert [row.reference for row in strength.rows] == [True, False]
    assert [row.label for row in correlation.rows[3:]] == [
        "net, axis i (4 mm)",
        "net, axis j (4 mm)",
        "net, axis k (3 mm)",
    ]
    before = noise["identity"].analysis
    assert _cell(correlation, "Identity (the input), axis k (3 mm)", "ρ, d = 2") == before.correlation(2, 2)
    html = _html(blocks)
    assert "Δ = image − PET90" in html
    assert "ρ<sub>d</sub> = 1 − Var(D<sub>d</sub>)/(2·Var(Δ))" in html
    with pytest.raises(ValueError, match="there are no results"):
        noise_change_blocks([], target_seconds=90)


def _response(fwhm: float, peak: float, *, added_fwhm: float = 6.0, added: float = 1.0) -> PointResponse:
    return PointResponse((1, 2, 3), 2.0, added, added_fwhm, (fwhm, fwhm + 1, fwhm + 2), peak, 0.9, 0.99)


def test_point_responses_show_their_medians():
    found = {
        "net": [_response(7, 0.8), _response(8, 0.7), _response(10, 0.5)],
        "gaussian1": [
            _response(9, 0.6),
            PointResponse((1, 2, 3), 2.0, 1.0, 6.0, (math.nan,) * 3, 0.0, 0.0, math.nan),
        ],
    }
    blocks = resolution_blocks(found, labels={"net": "Net"})
    (table,) = _tables(blocks)
    assert table.rows[0].cells[:3] == [8, 9, 10]
    assert _cell(table, "Net", "Peak") == pytest.approx(70)
    assert table.rows[1].cells[-1] == "1 of 2"
    assert table.rows[1].cells[0] == 9
    assert _cell(table, "Gaussian, 1 layer", "Explained") == pytest.approx(99)
    assert "6 mm FWHM, 0.5 times the SUV" in table.caption
    assert len(_pictures(blocks)) == 1


def test_responses_to_different_blobs_are_refused():
    with pytest.raises(ValueError, match="expected one kind"):
        resolution_blocks({"a": [_response(7, 0.8)], "b": [_response(7, 0.8, added_fwhm=8.0)]})
    with pytest.raises(ValueError, match="expected one kind"):
        resolution_blocks({"a": [_response(7, 0.8)], "b": [_response(7, 0.8, added=3.0)]})
    with pytest.raises(ValueError, match="got no responses"):
        resolution_blocks({"a": []})
    with pytest.raises(ValueError, match="there are no results"):
        resolution_blocks({})
