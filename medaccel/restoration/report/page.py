# SPDX-License-Identifier: Apache-2.0
"""Builds the page of a restoration run: the scores of each exposure, the analyses, the fits, and the run's own
record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from medaccel.report.html import Block, Page, Section
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.calibration import Calibration
from medaccel.restoration.evaluation.noise import analyse_noise
from medaccel.restoration.evaluation.noise_effects import share_against_noise
from medaccel.restoration.methods.names import REFERENCES
from medaccel.restoration.report.analyses import Analyses
from medaccel.restoration.report.evaluation import (
    calibration_blocks,
    comparison_blocks,
    hot_lesion_table,
    noise_change_blocks,
    noise_share_blocks,
    resolution_blocks,
)
from medaccel.restoration.report.figures import RestorationExample
from medaccel.restoration.report.fits import fit_blocks
from medaccel.restoration.report.scores import (
    EACH_STUDY,
    PUBLISHED,
    RUN,
    TARGET,
    TRUTH,
    WITHIN_PATIENT,
    RestorationResults,
    build_page,
)
from medaccel.restoration.scoring import Scored, Scorer
from medaccel.restoration.study import load_study

# Every exposure has these sections of its own; the others stand at the end, as the run's own record.
_OF_EXPOSURES = (TARGET, TRUTH, WITHIN_PATIENT)
_LAST = (EACH_STUDY, PUBLISHED, RUN)


def build_report(
    scorer: Scorer,
    scored: Sequence[Scored],
    analyses: Analyses,
    calibrations: Mapping[str, Mapping[str, Calibration]],
    *,
    data: str,
    best: str,
    options: Mapping[str, Any],
    notes: Sequence[str] = (),
    further: Sequence[Section] = (),
) -> Page:
    """Builds the whole page.

    Args:
        scorer: the scorer that made `scored`, which has one entry per exposure, the primary one first.
        analyses: the scorer's analyses.
        calibrations: factors of the intervals, by method and seconds.
        data: the kind of studies, to complete "scored on … studies: ".
        best: the method chosen on validation.
        options: options of the run and of the scoring, plain values.
        notes: further sentences that the reader must know.
        further: sections of what was scored beside the methods' exposures.
    """
    shown = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    pages = [
        _scores(scorer, one, analyses, data=data, best=best, options=shown, notes=notes, first=one is scored[0])
        for one in scored
    ]
    extra: list[Section] = []
    for one, page in zip(scored[1:], pages[1:], strict=True):
        wanted = [s for s in page.sections if s.key in _OF_EXPOSURES]
        extra += [replace(s, title=f"From {one.seconds} s: {s.title[0].lower()}{s.title[1:]}") for s in wanted]
    for one in scored:
        start = "" if one is scored[0] else f"From {one.seconds} s: "
        extra += _evaluation(one, analyses, calibrations, start)
    extra += further
    if analyses.noise_changes:
        changes = noise_change_blocks(analyses.noise_changes, target_seconds=scored[0].target_seconds)
        extra.append(Section("Noise before and after", changes))
    if analyses.responses:
        blocks = resolution_blocks(analyses.responses)
        if analyses.hot_lesions:
            blocks.append(hot_lesion_table(analyses.hot_lesions))
        extra.append(Section("Resolution", blocks))
    extra.append(Section("How the methods were fitted and chosen", fit_blocks(scorer.methods, best)))
    # Tables come first, then their explanations, then the run's own record.
    sections = pages[0].sections
    kept = [s for s in sections if s.key not in _LAST]
    last = [s for s in sections if s.key in _LAST]
    return Page(pages[0].title, pages[0].summary, [*kept, *extra, *last], pages[0].facts)


def _scores(
    scorer: Scorer,
    one: Scored,
    analyses: Analyses,
    *,
    data: str,
    best: str,
    options: str,
    notes: Sequence[str],
    first: bool,
) -> Page:
    """Builds the page of one exposure's scores; pictures, noise and options stand in the first one's page alone."""
    example = load_study(one.paths[0], (one.seconds, one.target_seconds))
    target = example.exposures[one.target_seconds]
    mask = metrics.body_mask(target, example.spacing)
    noise = analyse_noise(example.exposures[one.seconds], target, mask, example.spacing)
    picture = RestorationExample(
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
        within_patient=analyses.within_patient[one.seconds],
        config=options if first else "",
        notes=notes,
        costs=one.costs(),
    )
    return build_page(results)


def _evaluation(
    one: Scored, analyses: Analyses, calibrations: Mapping[str, Mapping[str, Calibration]], start: str
) -> list[Section]:
    """Makes sections on comparison, dependence on noise, and uncertainty, for one exposure."""
    covered, compared = analyses.coverage[one.seconds], analyses.comparisons[one.seconds]
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
