# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of the segmentation report, as PNG: Dice over labels, runs, learning curves, volumes,
contours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medaccel.report.figures import COLOURS, axial_slice, new_figure, styled, to_canonical, to_png
from medaccel.segmentation.evaluation.curves import mean_curve
from medaccel.segmentation.evaluation.metrics import bland_altman
from medaccel.segmentation.evaluation.results import Group, Run, volumes

GREY = "#9aa3ad"
TRUTH, PREDICTION = "#2e8b57", "#d1495b"


@styled
def dice_plot(groups: Sequence[Group]) -> bytes:
    """Draws Dice over the fraction of labels, a curve per initialization: mean ± standard deviation over runs, and
    the runs.

    Args:
        groups: groups of one task.
    """
    figure = new_figure(7.5, 3.6)
    axes = figure.add_axes((0.1, 0.14, 0.62, 0.82))
    fractions = sorted({group.fraction for group in groups})
    curves = _by_init(groups)
    for number, (init, found) in enumerate(curves.items()):
        # Curves stand side by side, so that no error bar hides another.
        shift = (number - (len(curves) - 1) / 2) * 0.06
        spreads = [group.spread("dice") for group in found]
        places = [fractions.index(group.fraction) + shift for group in found]
        deviations = [0.0 if not np.isfinite(s.sd) else s.sd for s in spreads]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            places, [s.mean for s in spreads], yerr=deviations, label=init, color=colour, marker="o", capsize=3
        )
        for place, group in zip(places, found, strict=True):
            values = [run.mean("dice") for run in group.runs.values()]
            axes.plot([place] * len(values), values, ".", color=colour, markersize=4, alpha=0.35)
    axes.set_xticks(range(len(fractions)), [f"{100 * fraction:g} %" for fraction in fractions])
    axes.set_xlabel("labels of the training half")
    axes.set_ylabel("Dice of the test cases, points")
    _legend(axes)
    return to_png(figure)


@styled
def paired_plot(groups: Sequence[Group]) -> bytes:
    """Draws each run's Dice under each initialization; a grey line joins the runs of one seed.

    Args:
        groups: groups of one task and fraction.
    """
    figure = new_figure(7.5, 3.0)
    axes = figure.add_axes((0.1, 0.12, 0.62, 0.84))
    seeds = sorted({seed for group in groups for seed in group.runs})
    for seed in seeds:
        there = [(i, group.runs[seed].mean("dice")) for i, group in enumerate(groups) if seed in group.runs]
        axes.plot(*zip(*there, strict=True), color=GREY, linewidth=0.8, zorder=1)
    for i, group in enumerate(groups):
        values = [run.mean("dice") for run in group.runs.values()]
        axes.plot([i] * len(values), values, "o", color=COLOURS[i % len(COLOURS)], markersize=5)
    axes.set_xticks(range(len(groups)), [group.init for group in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel("Dice of the test cases, points")
    return to_png(figure)


@styled
def learning_plot(groups: Sequence[Group]) -> bytes:
    """Draws Dice on validation cases over the steps: mean over the runs, and ± their standard deviation.

    Args:
        groups: groups of one task and fraction.
    """
    figure = new_figure(7.5, 3.2)
    axes = figure.add_axes((0.1, 0.15, 0.62, 0.8))
    for number, group in enumerate(groups):
        steps, means, deviations = mean_curve([run.curve for run in group.runs.values()])
        if not steps:
            continue
        middle, half = 100 * np.array(means), 100 * np.array(deviations)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(steps, middle, color=colour, label=group.init, marker="o" if len(steps) < 30 else "", markersize=3)
        axes.fill_between(steps, middle - half, middle + half, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("training steps")
    axes.set_ylabel("Dice of the validation cases, points")
    _legend(axes)
    return to_png(figure)


@styled
def volume_plot(groups: Sequence[Group]) -> bytes:
    """Draws Bland and Altman's plot, a panel per initialization: difference of the volumes over their mean, mL.

    Args:
        groups: groups of one task and fraction.
    """
    figure = new_figure(11.0, 3.1)
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.07, right=0.99, bottom=0.16, top=0.9, wspace=0.08)
    for number, (axes, group) in enumerate(zip(panels, groups, strict=True)):
        true, predicted = (np.array(values) for values in volumes(group))
        axes.plot(
            (true + predicted) / 2,
            predicted - true,
            ".",
            markersize=4,
            alpha=0.5,
            color=COLOURS[number % len(COLOURS)],
        )
        axes.axhline(0, color="#d3d8de", linewidth=0.8, zorder=0)
        if len(true) > 1:
            found = bland_altman(true.tolist(), predicted.tolist())
            axes.axhline(found["bias_ml"], color="#1c2126", linewidth=1)
            for end in ("lower_ml", "upper_ml"):
                axes.axhline(found[end], color=GREY, linestyle="--", linewidth=1)
        axes.set_title(group.init)
        axes.set_xlabel("mean of both, mL")
    panels[0].set_ylabel("predicted less true, mL")
    return to_png(figure)


@dataclass(frozen=True)
class SegmentationExample:
    """Holds a scan with the truth and predictions, to be shown as axial slices.

    Args:
        affine: (4, 4), maps voxel indices to RAS, mm.
        hu: (i, j, k).
        truth: (i, j, k), above 0 is foreground; None if it is unknown.
        predicted: likewise, by the title of the picture.
        window: HU that are black and white.
    """

    affine: np.ndarray
    hu: np.ndarray
    truth: np.ndarray | None
    predicted: Mapping[str, np.ndarray]
    window: tuple[float, float]


@styled
def contour_figure(example: SegmentationExample) -> bytes:
    """Draws the axial slice with most foreground, a picture per prediction, with contours of truth and prediction."""
    hu, spacing = to_canonical(example.hu, example.affine)
    truth = None if example.truth is None else to_canonical(example.truth > 0, example.affine)[0]
    masks = {title: to_canonical(mask > 0, example.affine)[0] for title, mask in example.predicted.items()}
    k = _fullest_slice(truth if truth is not None and truth.any() else sum(masks.values()))
    picture = axial_slice(hu, spacing, k)
    (height, width), (down, right) = picture.pixels.shape, picture.spacing
    low, high = example.window
    wide = 3.0  # width of a picture, inches
    tall = wide * height * down / (width * right)
    figure = new_figure(wide * len(masks), tall + 0.25)
    panels = figure.subplots(1, len(masks), squeeze=False)[0]
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=tall / (tall + 0.25), wspace=0.03)
    for axes, (title, predicted) in zip(panels, masks.items(), strict=True):
        extent = (0, width * right, height * down, 0)
        axes.imshow(picture.pixels, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="nearest")
        for mask, colour in ((truth, TRUTH), (predicted, PREDICTION)):
            if mask is not None and mask[:, :, k].any():
                centres = (np.arange(width) + 0.5) * right, (np.arange(height) + 0.5) * down
                pixels = axial_slice(mask, spacing, k).pixels
                axes.contour(*centres, pixels, levels=[0.5], colors=[colour], linewidths=1.3)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.set_title(title, fontsize=8, pad=3)
    return to_png(figure)


def _fullest_slice(mask: Any) -> int:
    """Returns the axial slice with most of a mask; the middle one of an empty mask."""
    areas = np.asarray(mask).sum(axis=(0, 1))
    return int(areas.argmax()) if areas.any() else areas.shape[0] // 2


def _by_init(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.fraction):
        found.setdefault(group.init, []).append(group)
    return found


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


def representative(group: Group) -> Run:
    """Returns the run whose Dice is nearest to the group's mean; among equal ones, the first seed's."""
    mean = group.spread("dice").mean
    return min(group.runs.values(), key=lambda run: (abs(run.mean("dice") - mean), run.cell.seed))
