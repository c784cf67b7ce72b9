# SPDX-License-Identifier: Apache-2.0
"""Splits cases into training, validation and test sets, and lists the grid of runs that compares initializations.

A third of the labelled cases, the same for ever, is the test set (the Decathlon's own has no public labels). A run's
seed splits the rest into halves, one to train and one to validate; 20, 50 or 100 % of the training half is used.
Subsets are nested, and a seed has one split for every initialization, so that runs can be compared in pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from medaccel.studies.tables import write_json

#: The study crosses initializations × fractions × seeds × tasks.
INITIALIZATIONS = ("random", "nvidia", "instance", "instance_pixel")
FRACTIONS = (0.2, 0.5, 1.0)
SEEDS = (0, 1, 2, 3, 4, 5)
RANDOM = "random"
# The test set has its own seed: no run's seed changes it.
_TEST_SEED = 20_240_101


@dataclass(frozen=True)
class Split:
    """Names the cases of each set; `training` is in the order in which fractions take them."""

    seed: int
    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def subset(self, fraction: float) -> tuple[str, ...]:
        """Returns the first share of the training half; a smaller fraction's cases are among a larger one's.

        Raises:
            ValueError: the fraction is out of range, or leaves no case.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction:g}; expected above 0 and at most 1")
        count = round(fraction * len(self.training))
        if count == 0:
            raise ValueError(f"fraction is {fraction:g} of {len(self.training)} training cases, which leaves no case")
        return self.training[:count]


def split_cases(names: Sequence[str], seed: int) -> Split:
    """Splits a task's labelled cases.

    Args:
        names: names of all cases, in any order; at least six.
        seed: the run's seed; it moves cases between training and validation alone.

    Raises:
        ValueError: there are fewer than six cases, or a name occurs twice.
    """
    ordered = sorted(names)
    if len(set(ordered)) != len(ordered):
        twice = next(a for a, b in itertools.pairwise(ordered) if a == b)
        raise ValueError(f"case {twice} is named twice")
    if len(ordered) < 6:
        raise ValueError(f"{len(ordered)} labelled cases; expected at least 6, for test, training and validation")
    shuffled = [ordered[i] for i in np.random.default_rng(_TEST_SEED).permutation(len(ordered))]
    tested = round(len(ordered) / 3)
    test, others = shuffled[:tested], shuffled[tested:]
    rest = [others[i] for i in np.random.default_rng([_TEST_SEED, seed]).permutation(len(others))]
    half = (len(rest) + 1) // 2  # an odd number gives the extra case to training
    return Split(seed, tuple(rest[:half]), tuple(sorted(rest[half:])), tuple(sorted(test)))


def write_splits(path: str | Path, splits: Mapping[str, Sequence[Split]], fractions: Sequence[float]) -> None:
    """Writes, as JSON, each task's splits and the cases that each fraction trains on."""
    content = {
        task: [
            asdict(split) | {"subsets": {f"{fraction:g}": split.subset(fraction) for fraction in fractions}}
            for split in of_task
        ]
        for task, of_task in splits.items()
    }
    write_json(path, content)


@dataclass(frozen=True, order=True)
class Cell:
    """Identifies one run: a task, an initialization, a fraction of the labels, a seed.

    Args:
        pretraining: number of the pretrained weights that are fine-tuned; 0 for random initialization.
    """

    task: str
    init: str
    fraction: float
    seed: int
    pretraining: int = 0

    @property
    def name(self) -> str:
        """Returns the name of its folder, such as spleen-instance_pixel-020-seed3."""
        return f"{self.task}-{self.init}-{round(100 * self.fraction):03d}-seed{self.seed}"


def make_grid(
    tasks: Sequence[str],
    inits: Sequence[str] = INITIALIZATIONS,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = SEEDS,
    pretrainings: Mapping[str, int] | None = None,
) -> list[Cell]:
    """Returns all cells in a fixed order, so that a cell's number means the same in every process.

    Args:
        tasks, inits, fractions, seeds: the values to cross.
        pretrainings: how many pretrained weights an initialization has, 1 by default; seeds take them in turn, so
            that their own spread is in the comparison.

    Raises:
        ValueError: a list is empty, or holds something twice.
    """
    for name, values in (("tasks", tasks), ("inits", inits), ("fractions", fractions), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} is {list(values)}; expected at least one, each once")
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions is {list(fractions)}; expected above 0 and at most 1")
    counts = dict(pretrainings or {})
    for init, count in counts.items():
        if count < 1:
            raise ValueError(f"{init} has {count} pretrained weights; expected at least one")
    cells = [Cell(*crossed) for crossed in itertools.product(tasks, inits, fractions, seeds)]
    order = {seed: number for number, seed in enumerate(seeds)}
    return [
        cell if cell.init == RANDOM else replace(cell, pretraining=order[cell.seed] % counts.get(cell.init, 1))
        for cell in cells
    ]


def select(cells: Sequence[Cell], wanted: Mapping[str, Collection[object]]) -> list[Cell]:
    """Selects the cells whose fields are among the wanted values, such as {"fraction": [0.2], "init": ["random"]}.

    Raises:
        ValueError: cells don't have a field, or no cell has a value.
    """
    fields = ("task", "init", "fraction", "seed")
    for field, values in wanted.items():
        if field not in fields:
            raise ValueError(f"selection names {field!r}; expected some of {', '.join(fields)}")
        known = {getattr(cell, field) for cell in cells}
        unknown = [value for value in values if value not in known]
        if unknown or not values:
            raise ValueError(
                f"selection of {field} is {list(values)}; expected some of {sorted(known, key=str)}, at least one"
            )
    return [cell for cell in cells if all(getattr(cell, field) in values for field, values in wanted.items())]


def check_seeds(found: Collection[int], expected: Sequence[int] = SEEDS) -> None:
    """Refuses an average over other runs than it claims to cover.

    Raises:
        ValueError: seeds are missing or too many.
    """
    if sorted(found) != sorted(expected):
        raise ValueError(f"runs of the seeds {sorted(found)}; expected {sorted(expected)}, {len(expected)} runs")
