# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of the report's evaluation blocks, as PNG: coverage, share of the limit against noise, point
response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medaccel.report.figures import COLOURS, new_figure, styled, to_png
from medaccel.restoration.evaluation.calibration import CALIBRATED, UNCALIBRATED, CoverageRow
from medaccel.restoration.evaluation.noise import AXES
from medaccel.restoration.evaluation.resolution import PointResponse

GREY = "#9aa3ad"


@styled
def coverage_plot(
    rows: Mapping[str, Sequence[CoverageRow]], *, level: float, band: tuple[float, float], x_label: str
) -> bytes:
    """Draws covered voxels in percent, a point per group and a curve per method: calibrated solid, uncalibrated
    dotted.

    Args:
        rows: rows of one group by the method's name for readers, the same groups for all.
        level: the share to be covered, a dashed line.
        band: range that is shaded; fractions.
        x_label: name of the groups.
    """
    figure = new_figure(7.5, 3.4)
    axes = figure.add_axes((0.1, 0.15, 0.6, 0.8))
    labels = [row.label for row in next(iter(rows.values()))]
    places = np.arange(len(labels))
    axes.axhspan(100 * band[0], 100 * band[1], color="#e8f1ea", label=f"{100 * band[0]:g}–{100 * band[1]:g} %")
    axes.axhline(100 * level, color=GREY, linestyle="--", linewidth=1.2, label=f"nominal {100 * level:g} %")
    for colour, (name, found) in zip(_colours(len(rows)), rows.items(), strict=True):
        for kind, words, style in ((CALIBRATED, "", "-"), (UNCALIBRATED, ", uncalibrated", ":")):
            values = [100 * row.intervals[kind].coverage for row in found]
            axes.plot(places, values, style, marker="o", markersize=3.5, color=colour, label=name + words)
    axes.set_xticks(places, labels)
    axes.set_ylim(top=101)
    axes.set_xlabel(x_label)
    axes.set_ylabel("covered voxels, %")
    _legend(axes)
    return to_png(figure)


@styled
def noise_share_plot(points: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str) -> bytes:
    """Draws the share of the limit in percent over the noise level in percent, a point per study, a colour per
    method.

    Args:
        points: noise levels and shares, fractions, by the method's name for readers; values that aren't finite are
            left out.
    """
    figure = new_figure(7.5, 3.4)
    axes = figure.add_axes((0.1, 0.15, 0.6, 0.8))
    for colour, (name, (levels, shares)) in zip(_colours(len(points)), points.items(), strict=True):
        pairs = 100 * np.column_stack([levels, shares])
        pairs = pairs[np.isfinite(pairs).all(axis=1)]
        axes.plot(pairs[:, 0], pairs[:, 1], "o", markersize=4, color=colour, label=name)
        if len(pairs) > 2 and np.ptp(pairs[:, 0]) > 0:
            ends = np.array([pairs[:, 0].min(), pairs[:, 0].max()])
            axes.plot(ends, np.polyval(np.polyfit(pairs[:, 0], pairs[:, 1], 1), ends), color=colour, linewidth=1)
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1.2)
    axes.set_xlabel(x_label)
    axes.set_ylabel("share of the limit, %")
    _legend(axes)
    return to_png(figure)


@styled
def exposure_plot(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, target: float) -> bytes:
    """Draws the share of the limit in percent over the exposure, a line a method.

    Args:
        lines: exposures in s and shares, fractions, by the method's name for readers.
        target: the exposure that is predicted, s; the axis ends there.
    """
    figure = new_figure(7.5, 3.4)
    axes = figure.add_axes((0.1, 0.15, 0.6, 0.8))
    for number, (colour, (name, (seconds, shares))) in enumerate(
        zip(_colours(len(lines)), lines.items(), strict=True)
    ):
        style = "-" if number < len(COLOURS) else "--"  # further methods have the same colours
        values = 100 * np.asarray(shares)
        axes.plot(seconds, values, style, marker="o", markersize=4, color=colour, label=name)
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1.2)
    axes.set_xlim(0, target)
    axes.set_ylim(top=100)
    axes.set_xticks(sorted({t for seconds, _ in lines.values() for t in seconds}))
    axes.set_xlabel("exposure of the input, s")
    axes.set_ylabel("share of the limit, %")
    _legend(axes)
    return to_png(figure)


@styled
def response_plot(responses: Mapping[str, Sequence[PointResponse]]) -> bytes:
    """Draws a point per blob: its width along each axis, and the peak and sum that are kept, a column per method.

    Args:
        responses: responses to blobs of one width by the method's name for readers.
    """
    figure = new_figure(9.0, 3.4)
    left, right = figure.add_axes((0.07, 0.24, 0.4, 0.64)), figure.add_axes((0.57, 0.24, 0.41, 0.64))
    added = next(iter(responses.values()))[0].added_fwhm
    left.axhline(added, color=GREY, linestyle="--", linewidth=1.2, label=f"added, {added:g} mm")
    right.axhline(100, color=GREY, linestyle="--", linewidth=1.2, label="added")
    for place, found in enumerate(responses.values()):
        for axis, name in enumerate(AXES):
            values = [response.fwhm[axis] for response in found]
            _column(left, place + 0.22 * (axis - 1), values, COLOURS[axis], f"along {name}" if not place else None)
        for side, (name, values) in enumerate(
            (("peak", [100 * r.peak for r in found]), ("sum", [100 * r.total for r in found]))
        ):
            _column(right, place + 0.24 * (side - 0.5), values, COLOURS[3 + side], name if not place else None)
    for axes, label in ((left, "FWHM of the response, mm"), (right, "kept, % of what was added")):
        axes.set_xticks(range(len(responses)), list(responses), rotation=20, ha="right")
        axes.set_xlim(-0.6, len(responses) - 0.4)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.legend(
            fontsize=7.5, ncols=4, columnspacing=1.0, handlelength=1.4, loc="lower left", bbox_to_anchor=(0, 1)
        )
    return to_png(figure)


def _column(axes: Any, place: float, values: Sequence[float], colour: str, label: str | None) -> None:
    """Draws points above each other, and their median as a bar."""
    finite = np.asarray(values)[np.isfinite(values)]
    axes.plot(np.full(len(finite), place), finite, "o", markersize=3, color=colour, alpha=0.6, label=label)
    if len(finite):
        axes.plot([place - 0.1, place + 0.1], [np.median(finite)] * 2, color=colour, linewidth=2)


def _legend(axes: Any) -> None:
    """Draws the legend beside the axes, where it hides no point."""
    axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.01, 1.02))


def _colours(count: int) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(count)]
