# SPDX-License-Identifier: Apache-2.0
"""Makes a study of twelve cells that take no time, and records what it ran."""

from pathlib import Path
from typing import Any

from medaccel.segmentation.config import SegmentationConfig
from medaccel.segmentation.pipeline import run
from tests.segmentation.fake_cells import fake_cell, fake_pretraining

PHANTOMS = {"cases": 9, "spacing": [8.0, 8.0, 8.0], "pool": 2, "pool_spacing": [8.0, 8.0, 8.0]}
NONE = {"none": True}


def make_config(output: Path, task: Path, **options: Any) -> SegmentationConfig:
    """Twelve cells of a task that is there."""
    values: dict[str, Any] = {
        "tasks": {"spleen": {"data": str(task)}},
        "phantoms": PHANTOMS,
        "inits": ("random", "instance_pixel"),
        "fractions": (0.34, 1.0),
        "seeds": (0, 1, 2),
        "primary": {"fraction": 0.34, "seeds": [0, 1, 2]},
        "backend": "sequential",
    }
    return SegmentationConfig(output=output, **{**values, **options})


def run_fake(config: SegmentationConfig, **options: Any) -> tuple[Path, list[str]]:
    lines: list[str] = []
    path = run(config, run_cell=fake_cell, pretrain=fake_pretraining, say=lines.append, **options)
    return path, lines


def runs(folder: Path) -> dict[str, int]:
    """Counts how often each cell and pretraining was run."""
    files = [*folder.glob("cells/*/runs.txt"), *folder.glob("pretraining/*/runs.txt")]
    return {path.parent.name: len(path.read_text().splitlines()) for path in files}
