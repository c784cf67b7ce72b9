# SPDX-License-Identifier: Apache-2.0
"""A small, very hot lesion is measured as kept, flattened or clipped; and lesions are checked against the input's."""

import math

import numpy as np
import pytest
from scipy import ndimage

from medaccel.restoration.evaluation.hot_lesion import hot_lesion_kept
from medaccel.restoration.evaluation.study_scores import SummaryRow, lesion_checks
from medaccel.restoration.report.evaluation import hot_lesion_table
from medaccel.studies.statistics import Agreement

SPACING = (4.0, 4.0, 4.0)
FLAT = np.ones((30, 30, 30), dtype=np.float32)
MASK = np.ones(FLAT.shape, dtype=bool)


def test_what_is_returned_as_it_came_is_kept_and_a_share_is_that_share():
    for share in (1.0, 0.9):
        kept = hot_lesion_kept(lambda x, share=share: share * x, FLAT, MASK, SPACING)
        assert kept
        assert kept == pytest.approx([share] * len(kept))


def test_a_clipped_peak_and_a_flattened_one_are_told():
    peaks: list[float] = []

    def clip(x: np.ndarray) -> np.ndarray:
        peaks.append(float(x.max()))
        return np.minimum(x, 5.0)

    kept = hot_lesion_kept(clip, FLAT, MASK, SPACING)
    # A sphere of radius R, blurred by σ, keeps erf(x) − (2/√π)·x·exp(−x²) of its contrast at the centre, where
    # x = R/(σ·√2); the voxels blur a little too.
    x = 5 / math.sqrt(2 * ((8 / 2.3548) ** 2 + 4**2 / 12))
    recovery = math.erf(x) - 2 / math.sqrt(math.pi) * x * math.exp(-(x**2))
    assert peaks[1] - 1 == pytest.approx(29 * recovery, rel=0.08)
    assert kept == pytest.approx([4.0 / (peaks[1] - 1)] * len(kept), rel=1e-4)
    flattened = hot_lesion_kept(lambda x: ndimage.gaussian_filter(x, 1.0), FLAT, MASK, SPACING)
    assert max(flattened) < 0.8


def test_the_table_says_whether_all_are_within_five_percent():
    table = hot_lesion_table({"nlm": [0.96, 1.04], "tv": [0.94, 1.0]})
    assert [row.cells[3] for row in table.rows] == ["yes", "no"]
    assert table.rows[1].cells[:3] == pytest.approx([97, 94, 100])


def _row(method: str, bias: float, sd: float, lost: float = 0, created: float = 0, count: int = 9) -> SummaryRow:
    limits = Agreement(bias, sd, bias - 1.96 * sd, bias + 1.96 * sd, count)
    agreement = {(g, m): limits for g in ("large", "small") for m in ("suvmean", "suvmax", "suvpeak")}
    totals = {f"lesion_{g}_lost_anew": lost for g in ("large", "small")}
    return SummaryRow(method, 3, {}, agreement, totals | {f"hot_spots_{g}": created for g in ("large", "small")})


@pytest.mark.parametrize(
    ("row", "failed"),
    [
        (_row("unet", 1.9, 3.0), []),
        (_row("unet", -1.9, 4.0), []),
        (_row("unet", 2.0, 3.0), ["unbiased"]),
        (_row("unet", -3.0, 4.1), ["unbiased", "no_wider"]),
        (_row("unet", 0.0, 3.0, lost=1), ["none_lost"]),
        (_row("unet", 0.0, 3.0, created=2), ["none_created"]),
    ],
)
def test_each_lesion_check_fails_alone(row: SummaryRow, failed: list[str]):
    found = lesion_checks(row, _row("identity", 0.5, 4.0), "large")
    assert [key for key in ("unbiased", "no_wider", "none_lost", "none_created") if not found[key]] == failed
    assert found["passed"] == (not failed)
    assert found["width_suvmax"] == pytest.approx(row.agreement["large", "suvmax"].sd / 4)


def test_without_lesions_nothing_is_said():
    nothing = _row("unet", math.nan, math.nan, math.nan, math.nan, 0)
    found = lesion_checks(nothing, nothing, "small")
    assert found["passed"] is None
    assert math.isnan(found["width_suvmean"])
