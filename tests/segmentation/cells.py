# SPDX-License-Identifier: Apache-2.0
"""A tiny cell, for tests; as a program, it is run in a process that can be killed, or by torchrun."""

import sys
from pathlib import Path
from typing import Any

from medaccel.data.msd import read_dataset
from medaccel.segmentation.cell import run_cell
from medaccel.segmentation.protocol import Cell, split_cases

# 12 mm: all of a case in one window.
SETTINGS: dict[str, Any] = {
    "preset": "phantom_spleen",
    "spacing": [12.0, 12.0, 12.0],
    "roi_size": [64, 32, 32],
    "steps": 4,
    "steps_per_epoch": 4,
    "validate_every": 2,
    "validation_cases": 2,
    "warm_up": 1,
}


def run_tiny(
    task: Path, folder: Path, *, init: str = "random", weights: Path | None = None, seed: int = 1, **overrides: Any
) -> dict[str, Any]:
    """Runs a cell on all the training cases."""
    dataset = read_dataset(task)
    split = split_cases([case.name for case in dataset.cases], seed)
    cell = Cell(dataset.name, init, 1.0, seed)
    return run_cell(cell, dataset, split, folder, settings=SETTINGS | overrides, weights=weights, progress=False)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    run_tiny(Path(sys.argv[1]), Path(sys.argv[2]), checkpoint_minutes=0.0, accelerator="cpu")
