# SPDX-License-Identifier: Apache-2.0
"""Draws scans for the segmentation report: some test cases, and a scan that is no part of the study, as an
illustration."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.data import read_nifti
from medaccel.data.hounsfield import check_hu
from medaccel.data.msd import load_case
from medaccel.report.html import Block, Figure, Note, Text
from medaccel.segmentation.evaluation.metrics import dice
from medaccel.segmentation.evaluation.results import Outcome
from medaccel.segmentation.protocol import Cell
from medaccel.segmentation.report import figures
from medaccel.segmentation.study import SegmentationStudy

_CASES = 2


def example_blocks(study: SegmentationStudy, outcome: Outcome, task: str) -> list[Block]:
    """Shows test cases with contours of the truth and, for each initialization, of the run nearest to its mean.

    The fraction is the primary comparison's if the task has it, else the smallest. Initializations without a stored
    network are left out.
    """
    groups = outcome.of(task)
    fractions = sorted({group.fraction for group in groups})
    wanted = (study.config.comparison or {}).get("fraction")
    fraction = wanted if wanted in fractions else fractions[0]
    runs = [figures.representative(group) for group in groups if group.fraction == fraction]
    files = {run.cell: study.folder.network(run.cell) for run in runs}
    runs = [run for run in runs if files[run.cell].is_file()]
    if not runs or task not in study.data:
        return []
    names = list(dict.fromkeys(row["case"] for row in runs[0].rows))[:_CASES]
    low, high = study.settings[task]["window"]
    blocks: list[Block] = []
    for case in study.data[task].cases:
        if case.name not in names:
            continue
        scan, label = load_case(study.data[task], case)
        predicted = {}
        for run in runs:
            of_case = np.mean([row["dice"] for row in run.rows if row["case"] == case.name])
            predicted[f"{run.cell.init}, seed {run.cell.seed}: {100 * of_case:.1f}"] = _segmented(
                files[run.cell], scan
            )
        example = figures.SegmentationExample(
            scan.affine, np.asarray(scan.dataobj), np.asarray(label.dataobj), predicted, (low, high)
        )
        caption = (
            f"Test case {case.name}, {100 * fraction:g} % of the labels: axial slice with most of the truth; "
            "contours of the truth (green) and of the prediction (red) by each initialization's run nearest to its "
            "mean, with this case's Dice in points. The patient's right is on the left."
        )
        blocks.append(Figure(figures.contour_figure(example), caption, f"Contours on {case.name}"))
    return blocks


def illustration_blocks(study: SegmentationStudy) -> list[Block]:
    """Shows a cell's segmentation of a scan that is no part of the study."""
    options = study.config.illustration
    path = study.folder.network(illustrated_cell(study))
    if not path.is_file():
        return [Text(f"The cell that is to be shown, {path.parent.name}, has not ended yet.")]
    try:
        scan = read_nifti(options.image)
        if study.config.tasks[options.task].check_units:
            check_hu(np.asarray(scan.dataobj), Path(options.image))
    except (ValueError, OSError) as error:  # no figure of the study's: the report is written without it
        warnings.warn(f"illustration.image: {error}", stacklevel=2)
        return [Text(f"The illustration is left out: {error}.")]
    predicted = _segmented(path, scan) > 0
    truth, stated = None, "Its truth is not known."
    if options.organs:
        organs = read_nifti(options.organs)
        if organs.shape != scan.shape:
            raise ValueError(
                f"illustration.organs has the shape {organs.shape}; expected the image's, {tuple(scan.shape)}"
            )
        truth = np.asarray(organs.dataobj) == options.label
        stated = f"Dice {100 * dice(predicted, truth):.1f} points."
    low, high = study.settings[options.task]["window"]
    name = Path(options.image).name
    example = figures.SegmentationExample(
        scan.affine, np.asarray(scan.dataobj), truth, {path.parent.name: predicted}, (low, high)
    )
    caption = f"{name}: the network of cell {path.parent.name}. {stated} Truth green, prediction red."
    return [
        Figure(figures.contour_figure(example), caption, f"Contours on {name}"),
        Note("One scan, shown as an illustration: it is no part of the study, and no figure of it rests on this."),
    ]


def illustrated_cell(study: SegmentationStudy) -> Cell:
    """Returns the cell that the options name, or by default the primary comparison's initialization at the largest
    fraction, first seed."""
    config, options = study.config, study.config.illustration
    defaults = {
        "init": (config.comparison or {}).get("init", config.inits[-1]),
        "fraction": max(config.fractions),
        "seed": config.seeds[0],
    }
    chosen = {name: getattr(options, name) for name in defaults}
    wanted: dict[str, Any] = {
        "task": options.task,
        **{name: default if chosen[name] is None else chosen[name] for name, default in defaults.items()},
    }
    for cell in config.cells():
        if all(getattr(cell, key) == value for key, value in wanted.items()):
            return cell
    raise ValueError(f"illustration is of {wanted}; expected a cell of the study")


def _segmented(checkpoint: Path, scan: Any) -> np.ndarray:
    from medaccel.segmentation.model import checkpoint as checkpoints
    from medaccel.segmentation.model.inference import segment

    loaded = checkpoints.load(checkpoint)
    return np.asarray(segment(loaded.network(), scan, loaded.settings).dataobj)
