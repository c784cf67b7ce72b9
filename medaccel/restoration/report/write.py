# SPDX-License-Identifier: Apache-2.0
"""Writes scored rows to files: metrics.json and .csv, per-study and comparison tables, figures, report.html."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medaccel.data.files import write_bytes, write_text
from medaccel.report.html import Block, Figure, Page, Section, versions, write_html
from medaccel.restoration.config import RunConfig, ScoreConfig
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.calibration import Calibration, Coverage, coverage
from medaccel.restoration.evaluation.comparison import PairedComparison, compare_methods
from medaccel.restoration.evaluation.noise import analyse_noise
from medaccel.restoration.evaluation.noise_effects import (
    RemainingNoise,
    compare_noise,
    remaining_noise,
    share_against_noise,
)
from medaccel.restoration.evaluation.resolution import PointResponse, point_response
from medaccel.restoration.evaluation.study_scores import SummaryRow, summarize
from medaccel.restoration.methods.base import Method
from medaccel.restoration.report.evaluation import (
    calibration_blocks,
    comparison_blocks,
    noise_change_blocks,
    noise_share_blocks,
    resolution_blocks,
)
from medaccel.restoration.report.figures import Example
from medaccel.restoration.report.fits import fit_blocks
from medaccel.restoration.report.scores import RestorationResults, build_page
from medaccel.restoration.report.text import IDENTITY, REFERENCES
from medaccel.restoration.scoring import EXAMPLES, Scored, Scorer, plain_json
from medaccel.restoration.sources import notes_on
from medaccel.restoration.statistics import Statistic, ratio_score
from medaccel.restoration.study import load_study

# A PET's resolution is measured with blobs of about the reconstruction's own width, well above the noise.
_BLOB_FWHM, _BLOB_AMPLITUDE = 8.0, 4.0
_BLOB_SAMPLES = 4  # samples that a drawing method draws for each blob: a response's width needs no fine average


def write_outcome(
    folder: Path,
    config: RunConfig,
    scorer: Scorer,
    scored: Sequence[Scored],
    *,
    data: str,
    calibrations: Mapping[str, Mapping[str, Calibration]],
    best: str,
    chosen: ScoreConfig | None = None,
    choices: Mapping[str, Any] | None = None,
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
        say: a function that is called with the main table.
    """
    tables = {one.seconds: summarize(one.rows) for one in scored}
    covered = {
        one.seconds: {
            name: coverage(found[str(one.seconds)], items)
            for name, found in calibrations.items()
            if str(one.seconds) in found and (items := list(scorer.items(name, one.paths, one.seconds)))
        }
        for one in scored
    }
    compared = {one.seconds: _compare(one, best) for one in scored}
    say_table = {one.seconds: printed(tables[one.seconds], one) for one in scored}
    for text in say_table.values():
        say(text)
    primary = scored[0]
    responses = _responses(scorer, primary)
    remaining = _remaining(scorer, primary)
    within = {one.seconds: _within_patient(one) for one in scored}
    page = _page(
        config,
        scorer,
        scored,
        covered,
        compared,
        responses,
        remaining,
        within,
        data,
        calibrations,
        best,
        chosen,
        choices,
    )
    per_study = [
        {"seconds": one.seconds, "study": study, "method": method, **row}
        for one in scored
        for method, rows in one.rows.items()
        for study, row in zip(one.studies, rows, strict=True)
    ]
    flat = [{"seconds": seconds, **row.flat()} for seconds, table in tables.items() for row in table]
    content = {
        "config_digest": config.digest(),
        "best": best,
        "target_seconds": config.target_seconds,
        "mse_limit": {one.seconds: metrics.mse_limit(one.seconds, one.target_seconds) for one in scored},
        "methods": flat,
        "per_study": per_study,
        "within_patient": {
            t: {m: {d: asdict(s) for d, s in row.items()} for m, row in found.items()} for t, found in within.items()
        },
        "coverage": {
            t: {m: {"studies": c.studies, "rows": [r.flat() for r in c.rows]} for m, c in found.items()}
            for t, found in covered.items()
        },
        "comparison": {t: [c.flat() for c in found["share_of_limit"]] for t, found in compared.items()},
        "resolution": {m: [asdict(r) for r in found] for m, found in responses.items()},
        "noise": [change.flat() for change in compare_noise(remaining)] if remaining else [],
        "seconds_per_volume": {one.seconds: {m: float(np.mean(v)) for m, v in one.times.items()} for one in scored},
        "fits": {name: asdict(method.fitted) for name, method in scorer.methods.items()},
        "versions": versions(),
    }
    write_text(folder / "metrics.json", plain_json(content), force=True)
    write_text(folder / "metrics.csv", _csv(flat), force=True)
    write_text(folder / "metrics_per_study.csv", _csv(per_study), force=True)
    rows = [{"seconds": t, "method": m, **r.flat()} for t, f in covered.items() for m, c in f.items() for r in c.rows]
    if rows:
        write_text(folder / "coverage.csv", _csv(rows), force=True)
    _write_figures(folder / "figures", page)
    report = folder / "report.html"
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
    lines = [f"{f'{one.seconds} s -> {one.target_seconds} s':<22}" + "".join(f"{t:>{w}}" for t, w, _, _ in columns)]
    for row in table:
        values = (factor * row.metrics[key].mean for _, _, key, factor in columns)
        cells = (
            f"{v:>{w}.1f}" if math.isfinite(v) else f"{'-':>{w}}"
            for v, (_, w, _, _) in zip(values, columns, strict=True)
        )
        lines.append(f"{row.method:<22}" + "".join(cells))
    return "\n".join(lines)


def _compare(one: Scored, best: str) -> dict[str, list[PairedComparison]]:
    """Compares every method with the one that validation chose, on the quantities that decide."""
    methods = [m for m in one.rows if m not in REFERENCES or m == IDENTITY]
    if best not in methods or len(methods) < 2:
        return {"share_of_limit": [], "share_of_ceiling": []}
    return {
        key: compare_methods({m: [row[key] for row in one.rows[m]] for m in methods}, best)
        for key in ("share_of_limit", "share_of_ceiling")
    }


def _responses(scorer: Scorer, one: Scored) -> dict[str, list[PointResponse]]:
    """Measures each method's response to blobs in the first study."""
    study = load_study(one.paths[0], (one.seconds, one.target_seconds))
    image = study.exposures[one.seconds]
    mask = metrics.body_mask(study.exposures[one.target_seconds], study.spacing)
    found = {}
    for name, method in scorer.methods.items():

        def restore(volume: np.ndarray, method: Method = method) -> np.ndarray:
            return method.restore(
                volume, study.spacing, seconds=one.seconds, ct=study.ct, samples=_BLOB_SAMPLES, seed=0
            ).volume

        found[name] = point_response(
            restore,
            image,
            mask,
            study.spacing,
            amplitude=_BLOB_AMPLITUDE,
            fwhm_mm=_BLOB_FWHM,
            together=True,
        )
    return found


def _remaining(scorer: Scorer, one: Scored) -> list[dict[str, RemainingNoise]]:
    """Analyses noise before and after, in the studies whose images were kept."""
    found = []
    for path in one.paths[:EXAMPLES]:
        study = load_study(path, (one.seconds, one.target_seconds))
        target = study.exposures[one.target_seconds]
        mask = metrics.body_mask(target, study.spacing)
        images = {IDENTITY: study.exposures[one.seconds], **scorer.volumes(path, one.seconds)}
        found.append(remaining_noise(images, target, mask, study.spacing))
    # A drawing method may have been applied to the first studies alone.
    common = set.intersection(*(set(study) for study in found))
    return [{name: noise for name, noise in study.items() if name in common} for study in found]


def _within_patient(one: Scored) -> dict[str, dict[str, Statistic]]:
    """Scores one patient over noise realisations and axial blocks; returns nothing if the studies are of several
    patients."""
    found: dict[str, dict[str, Statistic]] = {}
    for distance, sums in one.blocks.items():
        for name in one.rows:
            if name in REFERENCES or name not in sums:
                continue
            count = len(sums[name])  # a drawing method may have seen the first realisations alone
            found.setdefault(name, {})[distance] = ratio_score(sums[name], sums[IDENTITY][:count])
    return found


def _page(
    config: RunConfig,
    scorer: Scorer,
    scored: Sequence[Scored],
    covered: Mapping[int, Mapping[str, Coverage]],
    compared: Mapping[int, Mapping[str, Sequence[PairedComparison]]],
    responses: Mapping[str, Sequence[PointResponse]],
    remaining: Sequence[Mapping[str, RemainingNoise]],
    within: Mapping[int, Mapping[str, Mapping[str, Statistic]]],
    data: str,
    calibrations: Mapping[str, Mapping[str, Calibration]],
    best: str,
    chosen: ScoreConfig | None,
    choices: Mapping[str, Any] | None,
) -> Page:
    options = config.plain() | ({} if chosen is None else {"score": chosen.plain(), "frozen": dict(choices or {})})
    pages = []
    for one in scored:
        first = one is scored[0]
        example = load_study(one.paths[0], (one.seconds, one.target_seconds))
        target = example.exposures[one.target_seconds]
        mask = metrics.body_mask(target, example.spacing)
        noise = analyse_noise(example.exposures[one.seconds], target, mask, example.spacing)
        picture = Example(
            name=example.name,
            affine=example.affine,
            input=example.exposures[one.seconds],
            target=target,
            restored=scorer.volumes(one.paths[0], one.seconds),
            noise_free=example.noise_free,
            lesions=example.lesions,
        )
        results = RestorationResults(
            input_seconds=one.seconds,
            target_seconds=one.target_seconds,
            studies=one.studies,
            per_study=one.rows,
            data=data,
            best=best,
            simulated=example.noise_free is not None,
            examples=[picture] if first else [],
            noise={example.name: noise} if first else {},
            within_patient=within[one.seconds],
            config=yaml.safe_dump(options, sort_keys=False, allow_unicode=True) if first else "",
            notes=notes_on(chosen) if chosen is not None else [],
        )
        pages.append(build_page(results))
    sections = list(pages[0].sections)
    extra: list[Section] = []
    for one, page in zip(scored[1:], pages[1:], strict=True):
        wanted = [s for s in page.sections if s.title.startswith(("Against", "Within"))]
        extra += [Section(f"From {one.seconds} s: {s.title[0].lower()}{s.title[1:]}", s.blocks) for s in wanted]
    for one in scored:
        start = "" if one is scored[0] else f"From {one.seconds} s: "
        extra += _evaluation(one, covered[one.seconds], calibrations, compared[one.seconds], start)
    if remaining:
        changes = noise_change_blocks(compare_noise(remaining), target_seconds=config.target_seconds)
        extra.append(Section("Noise before and after", changes))
    if responses:
        extra.append(Section("Resolution", resolution_blocks(responses)))
    extra.append(Section("How the methods were fitted and chosen", fit_blocks(scorer.methods, best)))
    # Tables come first, then their explanations, then the run's own record.
    last = [s for s in sections if s.title in ("Each study", "Published results", "This run")]
    kept = [s for s in sections if s not in last]
    return Page(pages[0].title, pages[0].summary, [*kept, *extra, *last], pages[0].facts)


def _evaluation(
    one: Scored,
    covered: Mapping[str, Coverage],
    calibrations: Mapping[str, Mapping[str, Calibration]],
    compared: Mapping[str, Sequence[PairedComparison]],
    start: str,
) -> list[Section]:
    """Makes sections on comparison, dependence on noise, and uncertainty, for one exposure."""
    sections = []
    blocks: list[Block] = []
    for key, words in (("share_of_limit", "share of the limit"), ("share_of_ceiling", "share of the ceiling")):
        if compared[key]:
            blocks += comparison_blocks(compared[key], words, unit="%", factor=100, digits=1)
    if blocks:
        sections.append(Section(f"{start}Method against method", blocks))
    points = {
        name: share_against_noise(one.studies, one.noise, rows)
        for name, rows in one.rows.items()
        if name not in REFERENCES
    }
    sections.append(Section(f"{start}Share of the limit against noise", noise_share_blocks(points)))
    if covered:
        factors = {name: calibrations[name][str(one.seconds)] for name in covered}
        sections.append(Section(f"{start}Uncertainty of the samples", calibration_blocks(covered, factors)))
    return sections


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_figures(folder: Path, page: Page) -> None:
    folder.mkdir(exist_ok=True)
    figures = [block for section in page.sections for block in section.blocks if isinstance(block, Figure)]
    for number, figure in enumerate(figures, start=1):
        write_bytes(folder / f"figure_{number:02d}.png", figure.png, force=True)
