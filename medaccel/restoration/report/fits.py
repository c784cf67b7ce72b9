# SPDX-License-Identifier: Apache-2.0
"""Shows in blocks of the report how methods were fitted: time, size, choices and candidates, losses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from medaccel.report.html import Block, Column, Note, Row, Table
from medaccel.restoration.evaluation.noise import AXES
from medaccel.restoration.methods.base import Fitted, Method
from medaccel.restoration.methods.names import label
from medaccel.restoration.report.figures import loss_figure


def fit_blocks(methods: Mapping[str, Method], best: str) -> list[Block]:
    """Makes tables of fits, of Gaussians' widths and of candidates on the validation studies, and loss curves."""
    fits = {name: method.fitted for name, method in methods.items()}
    blocks: list[Block] = [_fits_table(fits, best)]
    widths = _width_rows(fits)
    if widths:
        columns = [Column(f"σ along {axis}", "mm", digits=2) for axis in AXES] + [Column("Weight", digits=3)]
        blocks.append(Table("Fitted Gaussians; FWHM = 2.3548·σ.", columns, widths))
    candidates = [
        Row(f"{label(name, {})}: {candidate}", list(scores))
        for name, fitted in fits.items()
        for candidate, scores in fitted.scores.items()
    ]
    if candidates:
        columns = [Column("MSE score", "%", signed=True), Column("1 − SSIM score", "%", signed=True)]
        caption = (
            "What was tried on validation studies. Networks choose by the mean of the MSE score's share of its limit "
            "and the 1 − SSIM score's share of its ceiling, the classical methods by the MSE score."
        )
        blocks.append(Table(caption, columns, candidates, "Candidate"))
    for name, fitted in fits.items():
        caps = fitted.parameters.get("sample_cap")
        if caps:
            said = ", ".join(f"{cap:+.1f} % at {seconds} s" for seconds, cap in caps.items())
            blocks.append(
                Note(
                    f"{label(name, {})}: the plain mean of K posterior samples of the target can't exceed an MSE "
                    f"score of 1 − (t/T)·(1 + 1/K): {said}, with K = {methods[name].settings['samples']}. Samples of "
                    "the activity, blended with the input, are not bound by it."
                )
            )
    losses = {
        f"{label(name, {})}{'' if part in ('loss', '') else f', {part}'}": curve
        for name, fitted in fits.items()
        for part, curve in fitted.losses.items()
        if part == "loss" or part.endswith(" s")
    }
    if losses:
        blocks.append(loss_figure(losses))
    return blocks


def _fits_table(fits: Mapping[str, Fitted], best: str) -> Table:
    columns = [
        Column("Fit", "s", digits=0),
        Column("Parameters", digits=0),
        Column("Steps", digits=0),
        Column("A step", "s", digits=2),
        Column("Chosen on validation"),
    ]
    rows = []
    for name, fitted in fits.items():
        found = fitted.parameters
        chosen = (
            json.dumps({k: v for k, v in fitted.choices.items() if k != "calibration"}) if fitted.choices else "–"
        )
        cells = [
            fitted.seconds,
            *(found.get(key, math.nan) for key in ("parameters", "steps", "seconds_per_step")),
            chosen,
        ]
        rows.append(Row(label(name, {}) + (" (chosen)" if name == best else ""), cells))
    return Table("How each method was fitted, and what it chose.", columns, rows, "Method")


def _width_rows(fits: Mapping[str, Fitted]) -> list[Row]:
    """Returns σ and weights of each Gaussian; for a cascade also the one Gaussian that equals it."""
    rows = []
    for name, fitted in fits.items():
        for seconds, found in fitted.parameters.items():
            if not isinstance(found, Mapping) or "sigma_mm" not in found:
                continue
            sigmas: Sequence[Sequence[float]] = found["sigma_mm"]
            weights = found["weights"]
            title = f"{label(name, {})}, {seconds} s"
            for number, sigma in enumerate(sigmas):
                part = "" if len(sigmas) == 1 else f" – {number + 1}"
                part += "" if any(sigma) else " (identity)"
                rows.append(Row(title + part, [*sigma, math.nan if weights is None else weights[number]]))
            if weights is None and len(sigmas) > 1:
                together = [math.sqrt(sum(s[axis] ** 2 for s in sigmas)) for axis in range(3)]
                rows.append(Row(f"{title}, as one Gaussian", [*together, math.nan], reference=True))
    return rows
