# SPDX-License-Identifier: Apache-2.0
"""Writes the report of a pretraining: results on held-out scans, curves, pictures, and the skipped scans."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medaccel.pretraining.config import PretrainingConfig
from medaccel.pretraining.evaluation import HeldOut
from medaccel.report.figures import ImageRow, Slice, axial_slice, image_grid, line_plot
from medaccel.report.html import (
    Block,
    Code,
    Column,
    Figure,
    Note,
    Page,
    Row,
    Section,
    Table,
    Text,
    versions,
    write_html,
)

_BOUND = "mutual_information_bound"
_SHOWN = 20


def write_report(
    path: Path, config: PretrainingConfig, metrics: Mapping[str, Any], held_out: HeldOut, scans: Mapping[str, Any]
) -> None:
    """Writes report.html.

    Args:
        metrics: the content of metrics.json.
        held_out: figures and pictures.
        scans: the content of scans.json.
    """
    rows = [Row(name, cells) for name, cells in map(_figures, held_out.figures.items())]
    reached = [name for name, figure in held_out.figures.items() if figure["reached"]]
    table = Table(
        "On held-out scans",
        [Column("Measured"), Column("Chance"), Column("Asked for"), Column("Reached")],
        rows,
        label="Task",
    )
    notes = [
        Note(
            "Rotation: share of right answers. Inpainting: mean error on hidden voxels of the body, against the "
            "harmonic fill (Laplace's equation in the hole); its chance is the smooth fill that it starts from. "
            "Instance: how often the most alike view is of the same scan. Pixels: share of body pixels whose most "
            "alike pixel of the other view lies within the radius."
        )
    ]
    losses: Mapping[str, list[float]] = metrics["losses"]
    curves: list[Block] = [
        Figure(
            line_plot({k: v for k, v in losses.items() if k != _BOUND}, x_label="epoch", y_label="loss", log=False),
            f"Mean losses of {metrics['steps'] // max(len(losses['loss']), 1)} steps each.",
            "Curves of the losses over the epochs",
        )
    ]
    if losses.get(_BOUND):
        most = math.log(config.trainer.batch_size)
        bound = {"log N − L": losses[_BOUND], "log N": [most] * len(losses[_BOUND])}
        curves.append(
            Figure(
                line_plot(bound, x_label="epoch", y_label="nats"),
                "InfoNCE's lower bound on the mutual information of the two views; it can't say more than log N.",
                "The bound over the epochs, and its ceiling",
            )
        )
    page = Page(
        title=f"Pretraining without labels: {config.title}",
        summary=[
            f"Trained for {metrics['steps']} steps on {metrics['scans']['training']} scans and evaluated on "
            f"{metrics['scans']['held_out']} others. Of {len(held_out.figures)} tasks, {len(reached)} reached what "
            f"was asked for{': ' + ', '.join(reached) if reached else ''}."
        ],
        sections=[
            Section("What was learnt", [table, *notes]),
            Section("Training", curves),
            Section("Pictures", _pictures(held_out.pictures, config)),
            Section("Scans", _scans(scans)),
            Section(
                "This run",
                [
                    Code("Options", yaml.safe_dump(config.plain(), sort_keys=False)),
                    Code("Versions", json.dumps(versions(), indent=1)),
                ],
            ),
        ],
        facts={
            "Tasks": ", ".join(f"{name} × {weight:g}" for name, weight in metrics["tasks"].items()),
            "Trained parameters of the backbone": f"{metrics['parameters']:,}",
            "Time": f"{metrics['seconds'] / 60:.1f} min, {metrics['seconds_per_step']:.2f} s a step",
        },
    )
    write_html(path, page, force=True)


def _figures(entry: tuple[str, Mapping[str, Any]]) -> tuple[str, list[str]]:
    name, f = entry
    reached = "yes" if f["reached"] else "no"
    if name == "rotation":
        return name, [f"{f['accuracy']:.1%} of {f['crops']}", f"{f['chance']:.0%}", f"≥ {f['target']:.0%}", reached]
    if name == "inpainting":
        said = f"{f['error_hu']:.1f} HU; better in {f['better_in']} of {f['scans']} scans"
        return name, [said, f"{f['chance']:.1f} HU", f"< {f['target']:.1f} HU (harmonic)", reached]
    if name == "instance":
        said = f"{f['top1']:.1%} of {f['pairs']} pairs of {f['scans']} scans"
        return name, [said, f"{f['chance']:.1%}", f"≥ {f['target']:.0%}", reached]
    said = f"{f['share_in_body']:.1%} in the body, {f['share']:.1%} of all"
    return name, [said, f"{f['chance']:.1%}", f"≥ {f['target']:.0%}", reached]


def _pictures(pictures: Mapping[str, np.ndarray], config: PretrainingConfig) -> list[Block]:
    """Draws middle slices of two views of a held-out scan, and of the hidden part, filled in and true."""
    x, y, z = config.spacing
    blocks: list[Block] = []
    for title, names in (
        ("Two views of one held-out scan", [name for name in pictures if name.startswith("view")]),
        ("Inpainting of a held-out scan", [name for name in pictures if name.startswith("inpainting")]),
    ):
        if names:
            slices: list[Slice | None] = [
                axial_slice(pictures[name], (x, y, z), pictures[name].shape[2] // 2) for name in names
            ]
            titles = [name.rpartition(": ")[2] for name in names]
            row = ImageRow(slices, titles, 0.0, 1.0, "window", "gray")
            blocks.append(Figure(image_grid([row]), f"{title}, middle slice.", title))
    return blocks or [Text("None of the tasks has pictures to show.")]


def _scans(scans: Mapping[str, Any]) -> list[Block]:
    counted = ", ".join(f"{len(entries)} {name.replace('_', ' ')}" for name, entries in scans.items())
    blocks: list[Block] = [Text(f"{counted}; scans.json names them all.")]
    if scans["skipped"]:
        listed = "\n".join(f"{entry['path']}: {entry['reason']}" for entry in scans["skipped"][:_SHOWN])
        blocks.append(Code("Skipped", listed))
    return blocks
