# SPDX-License-Identifier: Apache-2.0
"""Writes the segmentation study's report on finished cells: metrics.json, metrics.csv, figures and one HTML file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from medaccel.data import write_bytes
from medaccel.report.html import (
    Block,
    Code,
    Column,
    Figure,
    Interval,
    Note,
    Page,
    Row,
    Section,
    Table,
    Text,
    versions,
    write_html,
)
from medaccel.segmentation.evaluation.curves import late_gain
from medaccel.segmentation.evaluation.results import MEASURES, Group, Outcome, write_metrics
from medaccel.segmentation.protocol import RANDOM, check_seeds
from medaccel.segmentation.report import figures
from medaccel.segmentation.report import text as words
from medaccel.segmentation.report.examples import example_blocks, illustration_blocks
from medaccel.segmentation.study import SegmentationStudy
from medaccel.studies.run_folder import REPORT
from medaccel.studies.statistics import Comparison, spread

_HEADERS = {
    "dice": ("Dice", "points"),
    "hausdorff95_mm": ("Hausdorff 95 %", "mm"),
    "surface_dice": ("Surface Dice", "points"),
    "boundary_dice": ("Boundary Dice", "points"),
    "interior_dice": ("Interior Dice", "points"),
    "volume_error_ml": ("Volume error", "mL, size"),
}


def write_report(study: SegmentationStudy, say: Callable[[str], None]) -> Path:
    """Writes all results of the cells into the study's folder.

    Args:
        study: the study whose finished cells are reported.
        say: a function that is called with each line of progress.

    Returns:
        The path of report.html, or of the folder if no cell has ended yet.

    Raises:
        ValueError: a result can't be read.
    """
    cells, folder = study.config.cells(), study.folder
    outcome = Outcome(cells, {cell.name: folder.cell(cell.name) for cell in cells})
    if not outcome.runs:
        say(f"{folder.path}: prepared; no cell has ended yet, and there is nothing to report")
        return folder.path
    comparison, sentence = primary(study, outcome)
    pretraining = pretraining_figures(study)
    write_metrics(
        folder.path,
        outcome,
        {
            "config_digest": study.config.digest(),
            "primary": {"comparison": study.config.comparison, "result": comparison and vars(comparison)},
            "pretraining": pretraining,
        },
    )
    page = build_page(study, outcome, sentence, pretraining)
    for number, figure in enumerate(
        block for section in page.sections for block in section.blocks if isinstance(block, Figure)
    ):
        (folder.path / "figures").mkdir(exist_ok=True)
        write_bytes(folder.path / "figures" / f"{number:02d}.png", figure.png, force=True)
    report = folder.path / REPORT
    write_html(report, page, force=True)
    say(sentence)
    say(f"report on {len(outcome.runs)} of {len(cells)} cells: {report.resolve()}")
    return report


def primary(study: SegmentationStudy, outcome: Outcome) -> tuple[Comparison | None, str]:
    """Returns the primary comparison and its sentence; None if some of its runs are missing, or none was asked
    for."""
    wanted = study.config.comparison
    if wanted is None:
        return None, "No primary comparison was asked for."
    sides = [outcome.groups.get((wanted["task"], wanted[init], wanted["fraction"])) for init in ("init", "against")]
    title = words.primary_title(wanted)
    for init, group in zip((wanted["init"], wanted["against"]), sides, strict=True):
        try:
            check_seeds([] if group is None else list(group.runs), wanted["seeds"])
        except ValueError as error:
            return None, f"{title}: not complete, no figure is given. Of {init} there are {error}."
    first, second = sides
    assert first is not None  # check_seeds refuses none
    assert second is not None
    found = first.against(second)
    assert found is not None
    return found, words.primary_sentence(wanted, first.spread("dice"), second.spread("dice"), found)


def pretraining_figures(study: SegmentationStudy) -> dict[str, Any]:
    """Returns the figures of the study's own pretrainings on held-out scans, by their folders' names."""
    found = {}
    root = study.folder.path / "pretraining"
    for path in sorted(root.glob("*/metrics.json")) if root.is_dir() else []:
        found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def build_page(study: SegmentationStudy, outcome: Outcome, sentence: str, pretraining: dict[str, Any]) -> Page:
    """Builds the report's content, before it is HTML."""
    config = study.config
    summary = [sentence]
    simulated = [name for name in outcome.tasks if config.tasks[name].data is None]
    if simulated:
        summary.append(words.simulated(simulated))
    if len(outcome.runs) < len(outcome.planned):
        summary.append(words.incomplete(len(outcome.runs), len(outcome.planned)))
    sections = []
    if config.comparison is not None:
        sections.append(Section("Primary comparison", _primary_blocks(study, outcome)))
    for task in outcome.tasks:
        sections.append(Section(f"Task {task}", _task_blocks(study, outcome, task)))
    sections.append(Section("Every cell", [_cell_table(outcome, task) for task in outcome.tasks]))
    sections.append(Section("Training", [_training_table(outcome), Note(words.PLATEAU)]))
    if pretraining:
        sections.append(Section("Pretraining", _pretraining_blocks(pretraining)))
    if config.illustration:
        sections.append(Section("Illustration", illustration_blocks(study)))
    found = versions()
    options = yaml.safe_load(study.folder.record.read_text(encoding="utf-8"))
    run: list[Block] = [
        Table("", [Column("Version")], [Row(name, [version]) for name, version in found.items()], "Software"),
        Code("Configuration (YAML)", yaml.safe_dump(options, sort_keys=False, allow_unicode=True)),
    ]
    sections.append(Section("This run", run))
    facts = {
        "Tasks": ", ".join(outcome.tasks),
        "Cells": f"{len(outcome.runs)} of {len(outcome.planned)}",
        "medaccel": found["medaccel"],
    }
    return Page("Segmentation from pretrained and random weights", summary, sections, facts)


def _primary_blocks(study: SegmentationStudy, outcome: Outcome) -> list[Block]:
    wanted = study.config.comparison or {}
    groups = [g for g in outcome.of(wanted["task"]) if g.fraction == wanted["fraction"]]
    groups = [g for init in (wanted["against"], wanted["init"]) for g in groups if g.init == init]
    if not groups:
        return [Text("None of its cells has ended yet.")]
    caption = (
        f"{wanted['task']}, {100 * wanted['fraction']:g} % of the labels: each run's mean Dice over the test cases, "
        "as it is; a line joins the runs of one seed, which share split, crops and order."
    )
    figure = Figure(figures.paired_plot(groups), caption, f"Dice of each run: {', '.join(g.init for g in groups)}")
    blocks: list[Block] = [figure]
    if len(groups) == 2:
        base, first = ([run.curve for run in group.runs.values()] for group in groups)
        blocks.append(Text(words.head_start(first, base)))
    return [*blocks, Note(words.STATISTICS)]


def _task_blocks(study: SegmentationStudy, outcome: Outcome, task: str) -> list[Block]:
    groups = outcome.of(task)
    blocks: list[Block] = [_score_table(outcome, task), Text(words.MEASURES)]
    if any(g.init != RANDOM and (task, RANDOM, g.fraction) in outcome.groups for g in groups):
        blocks += [_random_table(outcome, task), Note(words.UNADJUSTED)]
    blocks.append(
        Figure(
            figures.dice_plot(groups),
            f"{task}: Dice over the share of labels, mean ± standard deviation over runs; small dots are the runs.",
            f"Dice over labels, {task}",
        )
    )
    fractions = sorted({g.fraction for g in groups})
    for fraction in fractions:
        of_fraction = [g for g in groups if g.fraction == fraction]
        title = f"{task}, {100 * fraction:g} % of the labels"
        blocks.append(
            Figure(
                figures.learning_plot(of_fraction),
                f"{title}: mean foreground Dice on the validation cases while training, mean over runs ± their "
                "standard deviation. The best step of each run was tested.",
                f"Learning curves, {title}",
            )
        )
    for fraction in dict.fromkeys((fractions[0], fractions[-1])):
        of_fraction = [g for g in groups if g.fraction == fraction]
        title = f"{task}, {100 * fraction:g} % of the labels"
        blocks.append(
            Figure(
                figures.volume_plot(of_fraction),
                f"{title}: Bland–Altman plot of the volumes of all runs' test cases; bias, and dashed the 95 % "
                "limits of agreement, ± 1.96 standard deviations.",
                f"Bland–Altman plot, {title}",
            )
        )
    return blocks + example_blocks(study, outcome, task)


def _score_table(outcome: Outcome, task: str) -> Table:
    lesions = outcome.has_lesions(task)
    columns = [Column("Runs", digits=0), *(Column(*_HEADERS[name]) for name in MEASURES)]
    if lesions:
        columns += [Column("Lesions found", "%"), Column("False positives", "a scan")]
    rows = []
    for group in outcome.of(task):
        cells: list[Any] = [len(group.runs), *(words.mean_sd(group.spread(name)) for name in MEASURES)]
        if lesions:
            cells.append(words.mean_sd(spread([run.sensitivity for run in group.runs.values()])))
            cells.append(words.mean_sd(spread([run.false_positives for run in group.runs.values()]), digits=2))
        rows.append(Row(_label(group), cells, reference=group.init == RANDOM))
    tested = len({row["case"] for group in outcome.of(task) for run in group.runs.values() for row in run.rows})
    caption = (
        f"{task} ({', '.join(outcome.structures(task))}): mean over {tested} test cases, then mean ± standard "
        "deviation over runs."
    )
    return Table(caption, columns, rows, "Initialization")


def _random_table(outcome: Outcome, task: str) -> Table:
    columns = [
        Column("Dice difference", "points [95 %]", signed=True),
        Column("Boundary Dice difference", "points [95 %]", signed=True),
        Column("Interior Dice difference", "points [95 %]", signed=True),
        Column("Standard deviation", "points"),
        Column("t", digits=2, signed=True),
        Column("p", digits=4),
        Column("Runs won"),
    ]
    rows = []
    for group in outcome.of(task):
        base = outcome.groups.get((task, RANDOM, group.fraction))
        found = None if base is None or group.init == RANDOM else group.against(base)
        if base is None or found is None:
            continue
        sides = [group.against(base, name) for name in ("boundary_dice", "interior_dice")]
        cells: list[Any] = [Interval(s.difference, s.low, s.high) for s in (found, *sides) if s is not None]
        cells += [found.sd, found.t, found.p, f"{found.won} of {found.runs}"]
        rows.append(Row(_label(group), cells))
    caption = (
        f"{task}: against random initialization, in pairs of runs of one seed. Intervals are bootstrap intervals "
        "over runs × test cases; t and p are of Dice, paired over the runs, two-sided."
    )
    return Table(caption, columns, rows, "Initialization")


def _cell_table(outcome: Outcome, task: str) -> Table:
    seeds = sorted({cell.seed for cell in outcome.planned})
    rows = [
        Row(_label(g), [g.runs[s].mean("dice") if s in g.runs else float("nan") for s in seeds])
        for g in outcome.of(task)
    ]
    caption = f"{task}: Dice of every cell, points, mean over the test cases. Single cases are in metrics.csv."
    return Table(caption, [Column(f"Seed {seed}") for seed in seeds], rows, "Initialization")


def _training_table(outcome: Outcome) -> Table:
    columns = [
        Column("Steps", digits=0),
        Column("Best step", digits=0),
        Column("Best validation Dice", "points"),
        Column("Gained in the last quarter", "points", signed=True),
        Column("Tensors loaded"),
        Column("Time", "s"),
    ]
    rows = []
    for task in outcome.tasks:
        for group in outcome.of(task):
            contents = [run.content for run in group.runs.values()]
            starts = [content.get("initialization") or {} for content in contents]
            best = [
                max(run.curve, key=lambda point: point[1], default=(0, float("nan"))) for run in group.runs.values()
            ]
            cells: list[Any] = [
                max((run.curve[-1][0] for run in group.runs.values() if run.curve), default=0),
                spread([step for step, _ in best]).mean,
                words.mean_sd(spread([100 * dice for _, dice in best])),
                spread([100 * late_gain(run.curve) for run in group.runs.values()]).mean,
                ", ".join(dict.fromkeys(str(s["loaded"]) for s in starts if "loaded" in s)) or "none",
                spread([content.get("seconds", float("nan")) for content in contents]).mean,
            ]
            rows.append(Row(f"{task}, {_label(group)}", cells, reference=group.init == RANDOM))
    return Table("Means over the runs.", columns, rows, "Cells")


def _pretraining_blocks(pretraining: dict[str, Any]) -> list[Block]:
    columns = [Column("Measured by"), *(Column(name, digits=3) for name in ("Reached", "Chance", "Asked for"))]
    rows = [
        Row(label, cells)
        for name, content in pretraining.items()
        for label, cells in words.pretraining_rows(name, content)
    ]
    caption = (
        "What each pretraining reached on scans that it did not see; curves and pictures are in the reports in the "
        "folder pretraining."
    )
    return [Table(caption, [*columns, Column("Met")], rows, "Pretraining, task")]


def _label(group: Group) -> str:
    return f"{100 * group.fraction:g} %, {group.init}"
