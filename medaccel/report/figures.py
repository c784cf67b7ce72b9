# SPDX-License-Identifier: Apache-2.0
"""Draws figures for reports, as PNG: image grids in patient orientation and true proportions, curves and histograms.

Volumes are turned to the closest canonical orientation first (i to the patient's right, j to the front, k to
the head). Images are shown in radiological convention: the patient's right is on the viewer's left, the head
or the front on top. matplotlib is used without pyplot, so that no window system and no global state is
touched.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
P = ParamSpec("P")
T = TypeVar("T")

DPI = 130
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
COLOURS = ("#0b5cad", "#d1495b", "#2e8b57", "#8a5cc2", "#c98a00", "#4a5560")


@dataclass(frozen=True)
class Slice:
    """Holds a picture of a volume: `pixels` (rows, columns) from the top left, and `spacing` in mm (down, right).

    `edges` are the letters at the left, right, top and bottom: R, L, A(nterior), P, H(ead), F(eet).
    """

    pixels: Array
    spacing: tuple[float, float]
    edges: tuple[str, str, str, str]


@dataclass(frozen=True)
class ImageRow:
    """Describes a row of an image grid: pictures of one size that share a window and a colour bar.

    Attributes:
        slices: pictures, one per column; None leaves the place empty.
        titles: titles above the pictures, one per column.
        low, high: the window, in the pictures' unit.
        label: text of the colour bar, with the unit.
        colours: matplotlib's name of the colour map.
    """

    slices: Sequence[Slice | None]
    titles: Sequence[str]
    low: float
    high: float
    label: str
    colours: str = "gray_r"


def to_canonical(volume: Array, affine: Array) -> tuple[Array, tuple[float, float, float]]:
    """Turns a volume's axes to the patient's right, front and head, and returns it with its spacing in mm.

    Args:
        volume: (i, j, k).
        affine: 4×4, maps voxel indices to RAS in mm, as nibabel's does.
    """
    import nibabel

    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.asarray(volume, dtype=np.float32), affine))
    x, y, z = (float(size) for size in image.header.get_zooms()[:3])
    return np.asarray(image.dataobj), (x, y, z)


def coronal_slice(volume: Array, spacing: tuple[float, float, float], j: int) -> Slice:
    """Returns slice j of a canonical volume, head up."""
    return _coronal(volume[:, j, :], spacing)


def coronal_projection(volume: Array, spacing: tuple[float, float, float]) -> Slice:
    """Returns the maximum-intensity projection of a canonical volume along the patient's front-to-back axis, head
    up."""
    return _coronal(volume.max(axis=1), spacing)


def axial_slice(volume: Array, spacing: tuple[float, float, float], k: int) -> Slice:
    """Returns slice k of a canonical volume, the patient's front up."""
    return Slice(volume[::-1, ::-1, k].T, (spacing[1], spacing[0]), ("R", "L", "A", "P"))


def _coronal(plane: Array, spacing: tuple[float, float, float]) -> Slice:
    return Slice(plane[::-1, ::-1].T, (spacing[2], spacing[0]), ("R", "L", "H", "F"))


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Lets a function draw in this module's style; matplotlib's own settings are restored when it returns."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def image_grid(rows: Sequence[ImageRow], *, width: float = 11.0, scale_bar: float | None = None) -> bytes:
    """Draws rows of pictures, all at one scale in mm, each row with its colour bar, the first with a scale bar.

    Args:
        width: the figure's width, inches.
        scale_bar: the bar's length in mm; default a round length, at most a third of a picture.

    Raises:
        ValueError: there is no picture at all, or rows differ in length.
    """
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    columns = len(rows[0].slices) if rows else 0
    sizes = [[_size(s) for s in row.slices if s is not None] for row in rows]
    if any(len(row.slices) != columns or len(row.titles) != columns for row in rows) or not any(sizes):
        raise ValueError(
            f"image rows have {[len(row.slices) for row in rows]} pictures; "
            "expected as many in each, a title for each, and at least one"
        )
    column_width = max(right for row in sizes for _, right in row)  # mm
    heights = [max((down for down, _ in row), default=1.0) for row in sizes]
    bar, gap, head = 0.85, 0.06, 0.24  # inches: margin right of a colour bar, gap between pictures, height of a title
    picture = (width - bar - gap * (columns - 1)) / columns
    scale = picture / column_width  # inches per mm
    height = sum(h * scale + head for h in heights) + 0.08 * len(rows)

    figure = new_figure(width, height)
    top = height
    marked = False
    for row, row_height in zip(rows, heights, strict=True):
        tall = row_height * scale
        bottom = top - head - tall
        mapped = None
        for column, (part, title) in enumerate(zip(row.slices, row.titles, strict=True)):
            left = column * (picture + gap)
            box = (left / width, bottom / height, picture / width, tall / height)
            if part is None:
                continue
            axes = figure.add_axes(box)
            down, right = _size(part)
            mapped = axes.imshow(
                part.pixels, extent=(0, right, down, 0), cmap=row.colours, interpolation="nearest",
                norm=Normalize(row.low, row.high),
            )  # fmt: skip
            # Every picture gets the same millimetres, so that all stand at one scale.
            axes.set_xlim((right - column_width) / 2, (right + column_width) / 2)
            axes.set_ylim((down + row_height) / 2, (down - row_height) / 2)
            axes.set_title(title, pad=3)
            _frame(axes)
            if column == 0:
                _letters(axes, part.edges)
            if not marked:
                _scale_bar(axes, scale_bar or _bar_length(column_width))
                marked = True
        if mapped is not None:
            side = ((width - bar + 0.1) / width, (bottom + 0.1 * tall) / height, 0.11 / width)
            colour_bar = figure.colorbar(mapped, cax=figure.add_axes((*side, 0.8 * tall / height)))
            colour_bar.locator = MaxNLocator(5, steps=[1, 2, 5, 10])
            colour_bar.update_ticks()
            colour_bar.set_label(row.label, fontsize=8)
            colour_bar.ax.tick_params(labelsize=7.5)
            colour_bar.outline.set_linewidth(0.5)
        top = bottom - 0.08
    return to_png(figure)


@styled
def line_plot(series: Mapping[str, Sequence[float]], *, x_label: str, y_label: str, log: bool = False) -> bytes:
    """Draws curves of values over their index from 1, such as losses over epochs.

    Raises:
        ValueError: no curve has a point.
    """
    if not any(len(values) for values in series.values()):
        raise ValueError(f"curves {list(series)} have no points; expected at least one")
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.5, 3.2)
    axes = figure.add_axes((0.11, 0.15, 0.86, 0.8))
    for colour, (name, values) in zip(_cycle(len(series)), series.items(), strict=True):
        marker = "o" if len(values) < 30 else ""
        axes.plot(range(1, len(values) + 1), values, label=name, color=colour, marker=marker, markersize=3)
    if log:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend()
    return to_png(figure)


@dataclass(frozen=True)
class HistogramPanel:
    """Holds densities over common bin edges; `reference` is drawn dashed behind them, under its name."""

    title: str
    edges: Array
    densities: Mapping[str, Array]
    reference: tuple[str, Array] | None = None


@styled
def histogram_plot(panels: Sequence[HistogramPanel], *, x_label: str) -> bytes:
    """Draws histograms side by side on common axes, as outlines, so that overlapping ones all show."""
    if not panels:
        raise ValueError("histogram_plot got no panel; expected at least one")
    figure = new_figure(11.0, 3.1)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.16, top=0.9, wspace=0.08)
    for axes, panel in zip(all_axes, panels, strict=True):
        if panel.reference is not None:
            name, density = panel.reference
            axes.stairs(density, panel.edges, color="#9aa3ad", linestyle="--", linewidth=1.2, label=name)
        for colour, (name, density) in zip(_cycle(len(panel.densities)), panel.densities.items(), strict=True):
            axes.stairs(density, panel.edges, color=colour, label=name)
        axes.set_title(panel.title)
        axes.set_xlabel(x_label)
        axes.legend(fontsize=7.5, handlelength=1.4, loc="upper left")
    all_axes[0].set_ylabel("density")
    lines = max(len(panel.densities) + 1 for panel in panels)
    all_axes[0].set_ylim(top=all_axes[0].get_ylim()[1] * (1 + 0.1 * lines))  # the legend stands above the curves
    return to_png(figure)


def new_figure(width: float, height: float) -> Any:
    """Makes a matplotlib figure of that size in inches, on white paper and bound to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """Returns the figure as PNG, without software version or date: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _size(part: Slice) -> tuple[float, float]:
    """Returns height and width in mm."""
    return part.pixels.shape[0] * part.spacing[0], part.pixels.shape[1] * part.spacing[1]


def _frame(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("#b8c0c8")
        spine.set_linewidth(0.6)


def _outlined(axes: Any, x: float, y: float, text: str, across: str, up: str, **placing: Any) -> None:
    """Writes text that is legible on white air and on black uptake."""
    from matplotlib.patheffects import withStroke

    effects = [withStroke(linewidth=2, foreground="white")]
    axes.text(
        x, y, text, ha=across, va=up, fontsize=7.5, color="#1c2126", path_effects=effects, **placing
    )  # fmt: skip


def _letters(axes: Any, edges: tuple[str, str, str, str]) -> None:
    left, right, top, bottom = edges
    inside = {"transform": axes.transAxes}
    _outlined(axes, 0.02, 0.5, left, "left", "center", **inside)
    _outlined(axes, 0.98, 0.5, right, "right", "center", **inside)
    _outlined(axes, 0.5, 0.985, top, "center", "top", **inside)
    _outlined(axes, 0.5, 0.015, bottom, "center", "bottom", **inside)


def _scale_bar(axes: Any, length: float) -> None:
    """Draws the scale bar at the lower left, inside the picture."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    x, y = left + 0.04 * (right - left), bottom + 0.045 * (top - bottom)
    axes.plot([x, x + length], [y, y], color="#1c2126", linewidth=2, solid_capstyle="butt")
    label_y = bottom + 0.06 * (top - bottom)
    _outlined(axes, x, label_y, f"{length:g} mm", "left", "bottom")


def _bar_length(width: float) -> float:
    """Returns a round length in mm of at most a third of the picture's width."""
    return max((n for n in (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0) if n <= width / 3), default=1.0)


def _cycle(count: int) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(count)]
