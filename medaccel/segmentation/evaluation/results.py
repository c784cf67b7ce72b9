# SPDX-License-Identifier: Apache-2.0
"""Gathers the cells' results: a group is one task, initialization and fraction, and holds its runs by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.segmentation.evaluation.metrics import bland_altman
from medaccel.segmentation.protocol import RANDOM, Cell
from medaccel.studies.statistics import Comparison, Spread, compare, spread
from medaccel.studies.tables import write_csv, write_json

#: Each measure of a row has the factor by which tables show it: Dice is shown in points.
MEASURES: Mapping[str, float] = {
    "dice": 100.0,
    "hausdorff95_mm": 1.0,
    "surface_dice": 100.0,
    "boundary_dice": 100.0,
    "interior_dice": 100.0,
    "volume_error_ml": 1.0,
}
# A label whose name holds one of these words marks lesions, which are counted one by one.
_LESIONS = ("cancer", "tumour", "tumor", "lesion", "nodule", "metastas")


@dataclass(frozen=True)
class Run:
    """Holds the results of one cell.

    Args:
        rows: rows of the test cases, one per structure: `CaseScores.plain` with "case" and "structure".
        curve: steps and mean Dice on the validation cases.
        content: the whole of result.json.
    """

    cell: Cell
    rows: Sequence[Mapping[str, Any]]
    curve: Sequence[tuple[int, float]]
    content: Mapping[str, Any]

    @property
    def keys(self) -> list[tuple[str, str]]:
        return [(row["case"], row["structure"]) for row in self.rows]

    def values(self, measure: str) -> np.ndarray:
        """Returns a measure of all rows, (rows,), as in tables."""
        return MEASURES[measure] * np.array([float(row[measure]) for row in self.rows])

    def mean(self, measure: str) -> float:
        """Returns the mean over the test cases; volume errors count by their sizes."""
        values = self.values(measure)
        return float(np.abs(values).mean() if measure == "volume_error_ml" else values.mean())

    @property
    def sensitivity(self) -> float:
        """Returns the percentage of the test cases' lesions that was found; NaN without any."""
        count = sum(row["lesions"] for row in self.rows)
        return 100 * sum(row["lesions_found"] for row in self.rows) / count if count else math.nan

    @property
    def false_positives(self) -> float:
        """Returns the false positives per scan."""
        return sum(row["false_positives"] for row in self.rows) / len({row["case"] for row in self.rows})


@dataclass(frozen=True)
class Group:
    """Holds the runs of one task, initialization and fraction, by seed."""

    task: str
    init: str
    fraction: float
    runs: Mapping[int, Run]

    def spread(self, measure: str) -> Spread:
        """Summarises each run's mean over the test cases over the runs."""
        return spread([run.mean(measure) for run in self.runs.values()])

    def against(self, other: Group, measure: str = "dice") -> Comparison | None:
        """Compares this group with another (this less the other), over the seeds that both have; returns None if they
        share none."""
        seeds = sorted(set(self.runs) & set(other.runs))
        if not seeds:
            return None
        pairs = [(self.runs[seed], other.runs[seed]) for seed in seeds]
        for mine, its in pairs:
            if mine.keys != its.keys or mine.keys != pairs[0][0].keys:
                raise ValueError(
                    f"{mine.cell.name} and {its.cell.name} were tested on other cases; expected the same ones"
                )
        return compare(*([run.values(measure) for run in side] for side in zip(*pairs, strict=True)))


class Outcome:
    """Holds all finished cells.

    Args:
        cells: the grid's cells, in its order.
        folders: the cells' folders, by name.

    Raises:
        ValueError: a result can't be read.
    """

    def __init__(self, cells: Sequence[Cell], folders: Mapping[str, Path]) -> None:
        self.planned = list(cells)
        found: dict[tuple[str, str, float], dict[int, Run]] = {}
        for cell in cells:
            path = folders[cell.name] / "result.json"
            if path.is_file():
                found.setdefault((cell.task, cell.init, cell.fraction), {})[cell.seed] = read_run(path, cell)
        self.groups = {key: Group(*key, runs) for key, runs in found.items()}

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups.values() for run in group.runs.values()]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(group.task for group in self.groups.values()))

    def of(self, task: str) -> list[Group]:
        """Returns a task's groups: fractions in their order, within each the initializations."""
        found = [group for group in self.groups.values() if group.task == task]
        inits = list(dict.fromkeys(cell.init for cell in self.planned))
        return sorted(found, key=lambda group: (group.fraction, inits.index(group.init)))

    def structures(self, task: str) -> list[str]:
        runs = [run for group in self.of(task) for run in group.runs.values()]
        return list(dict.fromkeys(row["structure"] for run in runs for row in run.rows))

    def has_lesions(self, task: str) -> bool:
        """Tells by their names whether the task's structures are lesions."""
        return any(word in name.lower() for name in self.structures(task) for word in _LESIONS)

    def plain(self) -> list[dict[str, Any]]:
        """Returns a dictionary per group, for metrics.json."""
        result = []
        for group in (group for task in self.tasks for group in self.of(task)):
            entry: dict[str, Any] = {
                "task": group.task,
                "init": group.init,
                "fraction": group.fraction,
                "seeds": list(group.runs),
                **{name: asdict(group.spread(name)) for name in MEASURES},
                "volumes": _agreement(group),
            }
            base = self.groups.get((group.task, RANDOM, group.fraction))
            if base is not None and group.init != RANDOM:
                found = group.against(base)
                entry["dice_against_random"] = None if found is None else asdict(found)
            if self.has_lesions(group.task):
                entry["lesion_sensitivity"] = asdict(spread([run.sensitivity for run in group.runs.values()]))
                entry["false_positives"] = asdict(spread([run.false_positives for run in group.runs.values()]))
            result.append(entry)
        return result


def _agreement(group: Group) -> dict[str, float] | None:
    true, predicted = volumes(group)
    return dict(bland_altman(true, predicted)) if len(true) > 1 else None


def volumes(group: Group) -> tuple[list[float], list[float]]:
    """Returns true and predicted volumes, mL, of all runs' test cases."""
    rows = [row for run in group.runs.values() for row in run.rows]
    return [row["volume_ml"] for row in rows], [row["predicted_ml"] for row in rows]


def read_run(path: Path, cell: Cell) -> Run:
    """Reads a cell's result.json.

    Raises:
        ValueError: the file can't be read, or is another cell's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored = Cell(**content["cell"])
        run = Run(stored, content["rows"], [(int(p["step"]), float(p["dice"])) for p in content["curve"]], content)
        for measure in MEASURES:
            run.mean(measure)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a cell's result ({error}); delete it to run the cell anew") from error
    if stored != cell or not run.rows:
        raise ValueError(f"{path}: of the cell {stored} with {len(run.rows)} rows; expected {cell}'s")
    return run


def write_metrics(folder: Path, outcome: Outcome, more: Mapping[str, Any]) -> None:
    """Writes metrics.json, an entry per group, and metrics.csv, a row per cell, test case and structure.

    Args:
        more: entries of metrics.json beside the groups.
    """
    content = {**more, "cells": {"planned": len(outcome.planned), "finished": len(outcome.runs)}}
    content["groups"] = outcome.plain()
    write_json(folder / "metrics.json", content)
    rows = [{"cell": run.cell.name, **asdict(run.cell), **row} for run in outcome.runs for row in run.rows]
    write_csv(folder / "metrics.csv", rows)
