# SPDX-License-Identifier: Apache-2.0
"""Writes the words of the segmentation report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medaccel.segmentation.evaluation.curves import mean_curve
from medaccel.segmentation.evaluation.metrics import BAND_MM, TOLERANCE_MM
from medaccel.studies.statistics import Comparison, Spread
from medaccel.studies.tables import nan_for_null

STATISTICS = (
    "The t test is paired over the runs, seed by seed, and asks whether another run would show the same on these "
    "test cases. The bootstrap interval resamples runs and test cases together, and so asks about other patients "
    "too. Runs of one initialization that start from the same pretrained weights are not wholly independent of each "
    "other."
)
UNADJUSTED = (
    "Only the primary comparison was named before the study was run. The other p values are not adjusted for how "
    "many there are: each describes, none decides."
)
MEASURES = (
    f"Surface Dice forgives {TOLERANCE_MM:g} mm. Boundary Dice is of the voxels within {BAND_MM:g} mm of the true "
    "surface (spatial sensitivity), interior Dice of all others (smoothness, islands and holes). Volume error is the "
    "mean size of predicted less true. Where both masks are empty, overlaps are 1 and distances 0; where one is, "
    "overlaps are 0 and the distance is the scan's diagonal. Lesions are connected components; one is found if the "
    "prediction touches it."
)
PLATEAU = (
    "All initializations of a task have the same settings, steps, crops and order. What the last quarter of the "
    "steps added to the best validation Dice says whether random initialization had reached its plateau: there, "
    "gains of pretraining are not those of a mere head start."
)


def primary_title(wanted: Mapping[str, Any]) -> str:
    return (
        f"Primary comparison, named before the study was run ({wanted['task']}, {100 * wanted['fraction']:g} % of "
        f"the labels, {wanted['init']} against {wanted['against']})"
    )


def primary_sentence(wanted: Mapping[str, Any], first: Spread, second: Spread, found: Comparison) -> str:
    """States the result, and how it compares with the expected one."""
    if math.isfinite(found.p):
        test = f"paired t({found.runs - 1}) = {_signed(found.t, 2)}, p = {found.p:.3g}"
    else:
        test = "no t test: one run, or equal differences"
    if found.difference <= 0:
        verdict = "there is no gain"
    elif not (math.isfinite(found.p) and found.p < 0.05):
        verdict = "a gain is not shown (p is not below 0.05)"
    else:
        verdict = "there is a gain"
    expected = float(wanted["expected"])
    met = "was met" if found.difference >= expected else "was not met"
    return (
        f"{primary_title(wanted)}: {verdict}. Dice {mean_sd(first)} points against {mean_sd(second)} over "
        f"{found.runs} runs and {found.cases} test cases; difference {_signed(found.difference)} points ({test}; 95 "
        f"% interval over runs × cases {_signed(found.low)} to {_signed(found.high)}); higher in {found.won} of "
        f"{found.runs} runs. Expected was {_signed(expected)} or more, which {met}."
    )


def simulated(tasks: Sequence[str]) -> str:
    return (
        f"The scans of {' and '.join(tasks)} are simulated (phantoms): they exercise the study and compare "
        "initializations under equal conditions, but say nothing about patients."
    )


def incomplete(finished: int, planned: int) -> str:
    return f"{finished} of {planned} cells have ended; tables and figures are of those."


def mean_sd(value: Spread, digits: int = 1) -> str:
    """Formats mean and deviation, such as 83.1 ± 1.2; without a deviation for one run."""
    if not math.isfinite(value.mean):
        return "–"
    deviation = f" ± {value.sd:.{digits}f}" if math.isfinite(value.sd) else ""
    return f"{value.mean:.{digits}f}{deviation}"


def head_start(first: Sequence[Sequence[tuple[int, float]]], second: Sequence[Sequence[tuple[int, float]]]) -> str:
    """Says in a sentence how two initializations differ on the validation cases at the first and at the last step."""
    steps, means, _ = mean_curve(first)
    others = dict(zip(*mean_curve(second)[:2], strict=True))
    shared = [(step, 100 * (mean - others[step])) for step, mean in zip(steps, means, strict=True) if step in others]
    if not shared:
        return ""
    (start, early), (end, late) = shared[0], shared[-1]
    return (
        f"While training, the mean Dice on the validation cases differed by {_signed(early)} points at step {start} "
        f"and by {_signed(late)} at the last, {end}: a difference that is there early and gone late is a head start, "
        "which random initialization makes up for."
    )


# Each pretraining task is measured by this figure, in this unit.
_MEASURED = {
    "accuracy": "accuracy",
    "error_hu": "mean error, HU (asked: the harmonic fill's)",
    "top1": "top-1 of the view pairs",
    "share_in_body": "share of pixels within the radius",
}


def pretraining_rows(name: str, content: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    """Returns a row per task of a pretraining's metrics.json: measure, figure, chance, target, and whether it is
    reached."""
    rows = []
    for task, found in content["held_out"].items():
        figures = nan_for_null(found)
        key = next(key for key in _MEASURED if key in figures)
        reached = "yes" if figures["reached"] else "no"
        rows.append(
            (f"{name}, {task}", [_MEASURED[key], figures[key], figures["chance"], figures["target"], reached])
        )
    return rows


def _signed(value: float, digits: int = 1) -> str:
    if not math.isfinite(value):
        return "–"
    rounded = round(value, digits) + 0.0  # no minus sign before a zero
    return f"{rounded:+.{digits}f}".replace("-", "−")
