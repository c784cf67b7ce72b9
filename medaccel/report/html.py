# SPDX-License-Identifier: Apache-2.0
"""Writes a report as one HTML file that needs nothing else: styles and figures are inside, and scripts are not used.

    page = Page(
        title="Restoration of 60 s PET",
        summary=["On 20 studies …"],
        sections=[Section("Scores", [table, Note("The limit is 33.3 %.")]), Section("Images", [figure])],
    )
    write_html("report.html", page)

Text is escaped; pass `markupsafe.Markup` for markup.
"""

from __future__ import annotations

import base64
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from typing import Any, Literal

from medaccel.data.files import write_text
from medaccel.report.figures import DPI


@dataclass(frozen=True)
class Interval:
    """Holds a value with the ends of its interval, shown as "11.8 [10.2, 13.1]"; NaN ends are not shown."""

    value: float
    low: float
    high: float


Cell = float | int | str | Interval


@dataclass(frozen=True)
class Column:
    """Describes a column of numbers or text.

    Attributes:
        header: its name.
        unit: text below the name, such as "%" or "SUV²".
        digits: number of digits after the decimal point.
        signed: put a plus sign before positive numbers.
        best: the row to mark among those that are no reference: the largest, the smallest, or the one nearest to 0;
            None marks no row.
    """

    header: str
    unit: str = ""
    digits: int = 1
    signed: bool = False
    best: Literal["max", "min", "zero"] | None = None


@dataclass(frozen=True)
class Row:
    """Holds a row: its name, and a cell per column. `reference` rows are set apart and never marked as best."""

    label: str
    cells: Sequence[Cell]
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """Arranges rows under columns; `label` heads the rows' names, and NaN shows as a dash.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    label: str = "Method"
    kind: str = field(default="table", init=False)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(
                    f"table {self.caption!r}: row {row.label!r} has {len(row.cells)} cells "
                    f"(expected {len(self.columns)}, a cell a column)"
                )

    def formatted(self) -> list[dict[str, Any]]:
        """Prepares for the template each row's label and kind, and its cells' text, range and mark."""
        marked = {index: self._best(index) for index in range(len(self.columns))}
        rows = []
        for number, row in enumerate(self.rows):
            cells = []
            for index, (column, cell) in enumerate(zip(self.columns, row.cells, strict=True)):
                text, spread = format_cell(cell, column)
                best = number in marked[index]
                cells.append({"text": text, "spread": spread, "best": best, "words": isinstance(cell, str)})
            rows.append({"label": row.label, "reference": row.reference, "cells": cells})
        return rows

    def _best(self, index: int) -> set[int]:
        """Returns the rows to mark in a column: all that look equal to the best, if another looks worse."""
        column = self.columns[index]
        if column.best is None:
            return set()
        values = {}
        for number, row in enumerate(self.rows):
            cell = row.cells[index]
            value = cell.value if isinstance(cell, Interval) else cell
            if not row.reference and not isinstance(value, str) and math.isfinite(value):
                values[number] = round(float(value), column.digits)
        if len(set(values.values())) < 2:
            return set()
        rank = {"max": lambda v: -v, "min": lambda v: v, "zero": abs}[column.best]
        least = min(rank(v) for v in values.values())
        return {number for number, value in values.items() if rank(value) == least}


@dataclass(frozen=True)
class Figure:
    """Holds a PNG with its caption; `alt` describes it to readers who can't see it."""

    png: bytes
    caption: str
    alt: str
    kind: str = field(default="figure", init=False)

    @property
    def width(self) -> int:
        """Returns the width in CSS pixels, 96 per inch: figures with one font size then look alike beside each
        other."""
        pixels = int.from_bytes(self.png[16:20], "big")  # PNG's header
        return round(pixels * 96 / DPI)

    @property
    def source(self) -> str:
        """Returns the image as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Text:
    """Holds a paragraph."""

    text: str
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Note:
    """Holds a paragraph set apart, which the reader must know to read the table or figure beside it."""

    text: str
    kind: str = field(default="note", init=False)


@dataclass(frozen=True)
class Code:
    """Holds preformatted text, folded under its title."""

    title: str
    text: str
    kind: str = field(default="code", init=False)


Block = Table | Figure | Text | Note | Code


@dataclass(frozen=True)
class Section:
    """Holds a heading and the parts under it.

    Args:
        title: the heading, for readers.
        blocks: the parts under it.
        key: names the section for the code that arranges a page, however its heading is worded.
    """

    title: str
    blocks: Sequence[Block]
    key: str = ""

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """Holds a report. `facts` are short pairs under the title, such as {"Studies": "20, simulated"}."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    facts: Mapping[str, str] = field(default_factory=dict)


def format_cell(cell: Cell, column: Column) -> tuple[str, str]:
    """Formats a cell's value and its interval, with a true minus sign; NaN becomes a dash, infinity ∞."""
    if isinstance(cell, str):
        return cell, ""
    if isinstance(cell, Interval):
        text = _number(cell.value, column)
        if not (math.isfinite(cell.low) and math.isfinite(cell.high)):
            return text, ""
        return text, f"[{_number(cell.low, column)}, {_number(cell.high, column)}]"
    return _number(cell, column), ""


def _number(value: float, column: Column) -> str:
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = round(float(value), column.digits) + 0.0  # + 0.0: no minus sign before a zero
    sign = "+" if column.signed and rounded > 0 else ""
    return sign + f"{rounded:,.{column.digits}f}".replace("-", "−").replace(",", "\u202f")


def render(page: Page) -> str:
    """Renders the page as HTML text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files("medaccel.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page)


def write_html(path: str | os.PathLike[str], page: Page, *, force: bool = False) -> None:
    """Writes the page atomically; raises the OSError of `medaccel.data.files.atomic_path`."""
    write_text(path, render(page), force=force)


def versions(packages: Sequence[str] = ("medaccel", "torch", "monai")) -> dict[str, str]:
    """Returns the versions of installed packages (read, not imported) and of Python, and the platform."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    system = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} processors"
    return found | {"Python": platform.python_version(), "platform": system}
