# SPDX-License-Identifier: Apache-2.0
"""Draws the restoration report's figures: projections and slices of example studies, noise histograms, losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medaccel.report import figures
from medaccel.report.figures import HistogramPanel, ImageRow, Slice
from medaccel.report.html import Figure
from medaccel.restoration.evaluation.metrics import Array, body_mask
from medaccel.restoration.evaluation.noise import AXES, HISTOGRAM_EDGES, NoiseAnalysis
from medaccel.restoration.report.text import subscripts

PROJECTION_SUV = 7.0
SLICE_SUV = 5.0
DIFFERENCE_SUV = 1.0
MARGIN = 12.0  # mm of air around the body that pictures keep


@dataclass(frozen=True)
class RestorationExample:
    """Holds one study to show.

    Attributes:
        name: the study's.
        affine: 4×4, nibabel's; turns the pictures upright.
        input, target: (i, j, k), SUV.
        restored: restored images by method, in the order to be shown.
        noise_free: shown last, if it exists.
        lesions: instance labels; slices are chosen among those with a lesion.
    """

    name: str
    affine: Array
    input: Array
    target: Array
    restored: Mapping[str, Array] = field(default_factory=dict)
    noise_free: Array | None = None
    lesions: Array | None = None


def example_figures(
    example: RestorationExample, names: Mapping[str, str], input_name: str, target_name: str
) -> list[Figure]:
    """Draws projections, then coronal and axial slices with their differences from the target.

    Args:
        names: names of the restored methods for readers; a method without one has its key.
        input_name, target_name: names of the exposures, such as "60 s", "90 s".
    """
    volumes = {f"Input, {input_name}": example.input}
    volumes |= {names.get(method, method): volume for method, volume in example.restored.items()}
    target_title = f"Target, {target_name}"
    volumes[target_title] = example.target
    if example.noise_free is not None:
        volumes["Noise-free"] = example.noise_free
    target, spacing = figures.to_canonical(example.target, example.affine)
    box = _body_box(target, spacing)
    turned = {title: figures.to_canonical(v, example.affine)[0][box] for title, v in volumes.items()}
    labels = None
    if example.lesions is not None:
        labels = figures.to_canonical(example.lesions, example.affine)[0][box]
    target = turned[target_title]
    j, k = _slices_to_show(target, labels)

    titles = list(turned)
    projections = [figures.coronal_projection(volume, spacing) for volume in turned.values()]
    row = ImageRow(projections, titles, 0, PROJECTION_SUV, "SUV")
    shown = f"{example.name}: {', '.join(titles)}"
    convention = "Radiological convention: the patient's right (R) is on the left; H is the head, F the feet."
    result = [
        Figure(
            figures.image_grid([row]),
            f"{example.name}: maximum-intensity projections, front view, SUV 0 to {PROJECTION_SUV:g} in inverted "
            f"grey. {convention}",
            f"Maximum-intensity projections. {shown}",
        )
    ]
    for plane, cut, index in (("Coronal", figures.coronal_slice, j), ("Axial", figures.axial_slice, k)):
        pictures = [cut(volume, spacing, index) for volume in turned.values()]
        differences: list[Slice | None] = [
            None if title == target_title else cut(volume - target, spacing, index)
            for title, volume in turned.items()
        ]
        below = ["" if part is None else f"minus {target_name}" for part in differences]
        rows = [
            ImageRow(pictures, titles, 0, SLICE_SUV, "SUV"),
            ImageRow(differences, below, -DIFFERENCE_SUV, DIFFERENCE_SUV, "difference, SUV", "RdBu_r"),
        ]
        caption = (
            f"{example.name}: {plane.lower()} slice. Above, SUV 0 to {SLICE_SUV:g}; below, the difference from the "
            f"{target_name} image, red where it is higher. All pictures stand at one scale."
        )
        result.append(Figure(figures.image_grid(rows), caption, f"{plane} slices. {shown}"))
    return result


def noise_figure(name: str, analysis: NoiseAnalysis, exposures: str) -> Figure:
    """Draws histograms of the noise differences, a panel per axis, a curve per distance."""
    variance = 2 * analysis.variance
    centres = (HISTOGRAM_EDGES[:-1] + HISTOGRAM_EDGES[1:]) / 2
    white = np.exp(-(centres**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    panels = []
    for axis in range(3):
        parts = [d for d in analysis.differences if d.axis == axis]
        densities = {f"d = {d.voxels} ({d.distance:.3g} mm), ρ = {_signed(d.correlation)}": d.density for d in parts}
        panels.append(HistogramPanel(f"axis {AXES[axis]}", HISTOGRAM_EDGES, densities, ("white noise", white)))
    png = figures.histogram_plot(panels, x_label="difference of two voxels, local standard deviations")
    caption = (
        f"{name}: differences D_d of the noise Δ = {exposures}, divided by its local standard deviation, between "
        "voxels at a distance of d inside the body. White noise would give the dashed curve at every d; "
        "neighbouring voxels of a reconstructed PET share their noise, so that their difference is smaller."
    )
    return Figure(png, subscripts(caption), f"Histograms of noise differences along three axes, {name}")


def loss_figure(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Draws a curve per method, on a logarithmic scale if the losses span more than a factor of ten."""
    values = [v for curve in losses.values() for v in curve if math.isfinite(v)]
    wide = bool(values) and min(values) > 0 and max(values) > 10 * min(values)
    png = figures.line_plot(losses, x_label="epoch", y_label="training loss", log=wide)
    return Figure(png, "Training loss of each fitted method.", f"Loss curves of {', '.join(losses)}")


def _body_box(target: Array, spacing: tuple[float, float, float]) -> tuple[slice, ...]:
    mask = body_mask(target, spacing)
    if not mask.any():
        return (slice(None),) * 3
    margins = [math.ceil(MARGIN / s) for s in spacing]
    where = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(max(int(w[0]) - m, 0), int(w[-1]) + 1 + m) for w, m in zip(where, margins, strict=True))


def _slices_to_show(target: Array, lesions: Any) -> tuple[int, int]:
    """Returns the coronal and the axial slice with most uptake, among those with a lesion if there is one."""
    # Uptake is clipped, since the slice through a hot bladder shows little else.
    uptake = np.clip(target, 0, SLICE_SUV)
    chosen = []
    for others in ((0, 2), (0, 1)):
        profile = uptake.sum(axis=others)
        if lesions is not None and lesions.any():
            profile = np.where((lesions > 0).any(axis=others), profile, -np.inf)
        chosen.append(int(profile.argmax()))
    return chosen[0], chosen[1]


def _signed(value: float) -> str:
    """Formats two digits with a true minus sign, and none before a zero."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
