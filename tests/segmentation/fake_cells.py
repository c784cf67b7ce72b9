# SPDX-License-Identifier: Apache-2.0
"""Stands for `run_cell` and `pretrain_preset` where the way through the grid is tested, not the networks."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.data import write_text
from medaccel.data.msd import MSDDataset
from medaccel.segmentation.protocol import Cell, Split

GAIN = {"random": 0.0, "instance": 0.02, "instance_pixel": 0.06}


def fake_cell(
    cell: Cell,
    dataset: MSDDataset,
    split: Split,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    weights: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Figures that depend on the cell alone, written as `run_cell` does; a line in runs.txt says that it was run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runs.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    if cell.name == os.environ.get("FAKE_FAILURE"):
        raise ValueError("the loss is nan; training stops here")
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"{weights}: not found")
    generator = np.random.default_rng([cell.seed, round(100 * cell.fraction), len(cell.task), len(cell.init)])
    rows = []
    for name in split.test:
        dice = 0.75 + 0.1 * cell.fraction + GAIN.get(cell.init, 0.03) + generator.normal(0, 0.02)
        volume = generator.uniform(100, 300)
        rows.append(
            {
                "case": name,
                "structure": dataset.labels[1],
                "dice": dice,
                "hausdorff95_mm": 40 * (1 - dice),
                "surface_dice": dice,
                "volume_ml": volume,
                "predicted_ml": volume * dice,
                "volume_error_ml": volume * (dice - 1),
                "boundary_dice": dice - 0.1,
                "interior_dice": dice + 0.05,
                "lesions": 2,
                "lesions_found": 1,
                "false_positives": 1,
            }
        )
    result = {
        "cell": vars(cell),
        "settings": dict(settings),
        "curve": [{"step": step, "dice": 0.8 * (1 - 2 ** (-step / 50))} for step in (50, 100, 150, 200)],
        "initialization": None if weights is None else {"loaded": 150, "skipped": 2, "missing": 9},
        "rows": rows,
        "seconds": 1.0,
    }
    write_text(folder / "result.json", json.dumps(result), force=True)
    return result


def fake_pretraining(config: Any, init: str, number: int, folder: Any, width: int, say: Any) -> None:
    path = folder.pretraining(f"{init}-{number}")
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    (path / "checkpoints" / "weights.pt").write_bytes(b"weights")
    with (path / "runs.txt").open("a") as file:
        file.write("run\n")
