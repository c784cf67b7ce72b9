# SPDX-License-Identifier: Apache-2.0
"""Describes the folder of a segmentation study.

config.yaml                       the options, and all settings of the cells that follow from them
inputs.json                       size, time and SHA-256 of the tasks' files and of given weights
splits.json                       each task's splits, and the subsets that fractions train on
data/<task>/, data/pool/          phantoms
pretraining/<init>-<n>/           a run of `medaccel pretraining run` each, or weights of another task's network
cells/<cell>/                     result.json, best.pt; error.txt of one that failed
metrics.json|csv, figures/, report.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medaccel.segmentation.protocol import Cell
from medaccel.studies.run_folder import OptionsFolder

#: These are a cell's files: its results, its chosen network, and the reason of its failure.
RESULT, BEST, ERROR = "result.json", "best.pt", "error.txt"


class StudyFolder(OptionsFolder):
    """Names the files of a study; `start` begins or resumes it."""

    noun = "study"
    generated = (
        *("data", "pretraining", "cells", "figures"),
        *("splits.json", "metrics.json", "metrics.csv"),
    )
    worth = (
        *("cells/*/result.json", "cells/*/last.ckpt"),
        *("pretraining/*/checkpoints/*.pt", "pretraining/*/training/last.ckpt"),
    )
    parts = ("cells/*", "pretraining/*")

    def task(self, name: str) -> Path:
        """Returns the folder of a phantom task."""
        return self.path / "data" / name

    @property
    def pool(self) -> Path:
        return self.path / "data" / "pool"

    def pretraining(self, name: str) -> Path:
        return self.path / "pretraining" / name

    def cell(self, name: str) -> Path:
        return self.path / "cells" / name

    def network(self, cell: Cell) -> Path:
        """Returns the file of the network that a cell chose."""
        return self.cell(cell.name) / BEST

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuses to run one cell if the study was not prepared, or has other options.

        Raises:
            FileNotFoundError: the folder holds no study.
            ValueError: the study has other options.
        """
        if not self.record.exists():
            raise FileNotFoundError(
                f"{self.path}: holds no study yet (no config.yaml); the same command with --jobs 0 in place of "
                "--cell prepares data and pretraining for all cells"
            )
        self.check_same(options, self.options())
