# SPDX-License-Identifier: Apache-2.0
"""Writes scored rows to files: metrics.json and .csv, per-study and comparison tables, figures, report.html."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.data.files import write_bytes
from medaccel.report.html import Figure, Page, Section, versions, write_html
from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.detection import Detection
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.calibration import Calibration
from medaccel.restoration.evaluation.study_scores import SummaryRow, lesion_checks, summarize
from medaccel.restoration.report.analyses import analyse
from medaccel.restoration.report.detectability import detection_blocks
from medaccel.restoration.report.page import build_report
from medaccel.restoration.report.robustness import (
    curve_blocks,
    curve_rows,
    other_truths,
    rank_agreements,
    truth_blocks,
)
from medaccel.restoration.scoring import Scored, Scorer
from medaccel.restoration.sources import notes_on
from medaccel.studies.run_folder import REPORT
from medaccel.studies.tables import write_csv, write_json

_NO_COST = {"seconds_per_volume": math.nan, "memory_gib": math.nan}


def write_report(
    folder: Path,
    config: RestorationConfig,
    scorer: Scorer,
    scored: Sequence[Scored],
    *,
    data: str,
    calibrations: Mapping[str, Mapping[str, Calibration]],
    best: str,
    chosen: ScoreConfig | None = None,
    choices: Mapping[str, Any] | None = None,
    curve: Sequence[Scored] = (),
    detection: Detection | None = None,
    frozen: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Writes all results of a scoring, and returns the report's path.

    Args:
        folder: an existing folder.
        config, chosen: options of the run, and of the scoring if it is not the run's own on validation studies.
        scorer: the scorer that made `scored`, which has one entry per exposure, the primary one first.
        data: the kind of studies, to complete "scored on … studies: ".
        calibrations: factors of the intervals, by method and seconds.
        best: the method chosen on validation.
        choices: the frozen choices.
        curve: a scoring of each exposure of the curve.
        detection: what model observers found.
        frozen: digest of the run's choices.
        say: a function that is called with the main table.
    """
    tables = {one.seconds: summarize(one.rows) for one in scored}
    for one in scored:
        say(printed(tables[one.seconds], one))
    analyses = analyse(scorer, scored, calibrations, best)
    options = config.plain() | ({} if chosen is None else {"score": chosen.plain(), "frozen": dict(choices or {})})
    others = [] if chosen is None or chosen.dicom is None else other_truths(folder, chosen, frozen)
    further = []
    if any(one.times for one in curve):
        left_out = [name for name in scorer.methods if name not in curve[0].rows]
        blocks = curve_blocks(curve, left_out, config.exposures)
        further.append(Section("Share of the limit over exposures", blocks))
    if chosen is not None and (blocks := truth_blocks(scored[0], chosen, others)):
        further.append(Section("The ranking under other truths", blocks))
    if detection is not None:
        further.append(Section("Detectability of faint lesions", detection_blocks(detection)))
    page = build_report(
        scorer,
        scored,
        analyses,
        calibrations,
        data=data,
        best=best,
        options=options,
        notes=[] if chosen is None else notes_on(chosen),
        further=further,
    )
    per_study = [
        {"seconds": one.seconds, "study": study, "method": method, **row}
        for one in scored
        for method, rows in one.rows.items()
        for study, row in zip(one.studies, rows, strict=True)
    ]
    flat = [{"seconds": seconds, **row.flat()} for seconds, table in tables.items() for row in table]
    costs = [
        {"seconds": one.seconds, "method": name, "seconds_per_volume": seconds, "memory_gib": memory}
        for one in scored
        for name, (seconds, memory) in one.costs().items()
    ]
    cost_of = {(row["seconds"], row["method"]): row for row in costs}
    content = {
        "config_digest": config.digest(),
        "best": best,
        "target_seconds": config.target_seconds,
        "mse_limit": {one.seconds: metrics.mse_limit(one.seconds, one.target_seconds) for one in scored},
        "methods": [row | cost_of.get((row["seconds"], row["method"]), _NO_COST) for row in flat],
        "per_study": per_study,
        "within_patient": {
            t: {m: {d: asdict(s) for d, s in row.items()} for m, row in found.items()}
            for t, found in analyses.within_patient.items()
        },
        "coverage": {
            t: {m: {"studies": c.studies, "rows": [r.flat() for r in c.rows]} for m, c in found.items()}
            for t, found in analyses.coverage.items()
        },
        "comparison": {t: [c.flat() for c in found["share_of_limit"]] for t, found in analyses.comparisons.items()},
        "resolution": {m: [asdict(r) for r in found] for m, found in analyses.responses.items()},
        "noise": [change.flat() for change in analyses.noise_changes],
        "seconds_per_volume": {one.seconds: {m: float(np.mean(v)) for m, v in one.times.items()} for one in scored},
        "lesion_checks": [
            {"seconds": seconds, "method": row.method, "group": group, **lesion_checks(row, table[0], group)}
            for seconds, table in tables.items()
            for row in table
            for group in ("large", "small")
        ],
        "hot_lesion_kept": {m: list(found) for m, found in analyses.hot_lesions.items()},
        "curve": curve_rows(curve),
        "detectability": [] if detection is None else detection.rows(),
        "truth": None if chosen is None or chosen.dicom is None else chosen.truth,
        "rankings": [
            {"seconds": one.seconds, **found.flat()}
            for one in scored
            if chosen is not None
            for found in rank_agreements(one, chosen, others)
        ],
        "fits": {name: asdict(method.fitted) for name, method in scorer.methods.items()},
        "versions": versions(),
    }
    write_json(folder / "metrics.json", content)
    write_csv(folder / "metrics.csv", flat)
    write_csv(folder / "metrics_per_study.csv", per_study)
    # The figures of metrics.csv are the same wherever a scoring is repeated; times are not.
    write_csv(folder / "costs.csv", costs)
    rows = [
        {"seconds": t, "method": m, **r.flat()}
        for t, f in analyses.coverage.items()
        for m, c in f.items()
        for r in c.rows
    ]
    if rows:
        write_csv(folder / "coverage.csv", rows)
    if curve:
        write_csv(folder / "curve.csv", curve_rows(curve))
    if detection is not None:
        write_csv(folder / "detectability.csv", detection.rows())
    _write_figures(folder / "figures", page)
    report = folder / REPORT
    write_html(report, page, force=True)
    return report


def printed(table: Sequence[SummaryRow], one: Scored) -> str:
    """Formats the main table as text."""
    columns = (  # title, width, metric, factor
        ("MSE score %", 13, "score_mse", 1),
        ("of the limit %", 16, "share_of_limit", 100),
        ("1-SSIM score %", 16, "score_ssim", 1),
        ("of the ceiling %", 18, "share_of_ceiling", 100),
        ("truth MSE %", 13, "truth_score_mse", 1),
    )
    costs = one.costs()
    head = f"{f'{one.seconds} s -> {one.target_seconds} s':<22}" + "".join(f"{t:>{w}}" for t, w, _, _ in columns)
    lines = [head + f"{'s/volume':>10}{'GiB/volume':>12}"]
    for row in table:
        values = [(factor * row.metrics[key].mean, width, 1) for _, width, key, factor in columns]
        seconds, memory = costs.get(row.method, (math.nan, math.nan))
        values += [(seconds, 10, 1), (memory, 12, 2)]
        cells = (f"{v:>{w}.{digits}f}" if math.isfinite(v) else f"{'-':>{w}}" for v, w, digits in values)
        lines.append(f"{row.method:<22}" + "".join(cells))
    return "\n".join(lines)


def _write_figures(folder: Path, page: Page) -> None:
    folder.mkdir(exist_ok=True)
    figures = [block for section in page.sections for block in section.blocks if isinstance(block, Figure)]
    for number, figure in enumerate(figures, start=1):
        write_bytes(folder / f"figure_{number:02d}.png", figure.png, force=True)
