# SPDX-License-Identifier: Apache-2.0
"""The segmentation study: what its cells share, and what identifies it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medaccel.data.msd import MSDDataset, read_dataset
from medaccel.pretraining.run_folder import weights as pretrained_weights
from medaccel.segmentation.config import SUPERVISED, SegmentationConfig, check_fractions
from medaccel.segmentation.grid import Work
from medaccel.segmentation.protocol import RANDOM, Cell, split_cases
from medaccel.segmentation.run_folder import StudyFolder


def settings_of(config: SegmentationConfig, task: str, fraction: float | None = None) -> dict[str, Any]:
    """Returns all settings of a task's cells, or of those at one fraction.

    Raises:
        ValueError: a preset or setting is unknown, or a value is out of range.
    """
    from medaccel.segmentation.model.presets import make_settings

    options = config.tasks[task]
    preset = options.preset or ("generic" if options.data is not None else f"phantom_{task}")
    try:
        settings = make_settings({"preset": preset, **config.overrides(task, fraction)})
        if settings["steps"] % settings["steps_per_epoch"]:
            raise ValueError(
                f"steps is {settings['steps']}; expected a multiple of steps_per_epoch, {settings['steps_per_epoch']}"
            )
    except ValueError as error:
        raise ValueError(f"task {task}: {error}") from error
    return settings


def options_of(config: SegmentationConfig, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns everything that defines a study: its options, and the cells' settings, which another version's presets
    could change."""
    plain: dict[str, Any] = json.loads(json.dumps({"cells": settings}))
    return config.plain() | plain


def check_data(config: SegmentationConfig) -> dict[str, MSDDataset]:
    """Checks and returns the given data of the tasks.

    Raises:
        FileNotFoundError, ValueError: `read_dataset` refuses a task; or a fraction leaves no case.
    """
    found = {
        name: read_dataset(task.data, check_units=task.check_units)
        for name, task in config.tasks.items()
        if task.data is not None
    }
    for name, dataset in found.items():
        check_fractions([case.name for case in dataset.cases], config.fractions, f"task {name}")
    return found


class SegmentationStudy:
    """Holds everything that the cells share: data, splits, settings, and the weights that each starts from.

    Args:
        config, folder: the study's options and folder.
        settings: the settings of each task.

    Raises:
        FileNotFoundError, ValueError: `read_dataset` refuses a task; or a fraction leaves no case. Phantoms may
            be missing.
    """

    def __init__(
        self, config: SegmentationConfig, folder: StudyFolder, settings: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.config, self.folder, self.settings = config, folder, settings
        self.data: dict[str, MSDDataset] = {}
        for name, task in config.tasks.items():
            path = folder.task(name) if task.data is None else task.data
            if task.data is not None or path.exists():
                self.data[name] = read_dataset(path, check_units=task.check_units)
                check_fractions([case.name for case in self.data[name].cases], config.fractions, f"task {name}")
        self.splits = {
            name: {seed: split_cases([case.name for case in dataset.cases], seed) for seed in config.seeds}
            for name, dataset in self.data.items()
        }

    def supervised(self, cell: Cell) -> bool:
        """Tells whether a cell starts from a network trained on another task's labels."""
        return cell.init == SUPERVISED and SUPERVISED not in self.config.weights

    def pretrained(self, cell: Cell) -> bool:
        """Tells whether a cell starts from one of the study's own pretrainings."""
        return cell.init not in (RANDOM, SUPERVISED, *self.config.weights)

    def donor(self, cell: Cell) -> Cell:
        """Returns the cell whose network a supervised one starts from: the other task's, trained on all of its
        labels."""
        seed = self.config.seeds[cell.pretraining % len(self.config.seeds)]
        return Cell(self.config.donor(cell.task), RANDOM, 1.0, seed)

    def weights(self, cell: Cell) -> Path | None:
        """Returns the file that a cell starts from, whether it exists or not."""
        if cell.init == RANDOM:
            return None
        if cell.init in self.config.weights:
            return Path(self.config.weights[cell.init][cell.pretraining])
        if self.supervised(cell):
            return self.folder.network(self.donor(cell))
        return pretrained_weights(self.folder.pretraining(f"{cell.init}-{cell.pretraining}"))

    def work(self, cell: Cell) -> Work:
        """A cell with all that another process needs to run it."""
        return Work(
            cell,
            self.data[cell.task],
            self.splits[cell.task][cell.seed],
            self.folder.cell(cell.name),
            settings_of(self.config, cell.task, cell.fraction),
            self.weights(cell),
        )
