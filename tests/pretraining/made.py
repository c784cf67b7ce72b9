# SPDX-License-Identifier: Apache-2.0
"""Makes small things that several tests here pretrain on: phantoms of 8 mm, and the smallest network."""

from pathlib import Path
from typing import Any

import torch

from medaccel.phantoms.ct_dataset import write_pool
from medaccel.pretraining.data import Scans, Volumes, prepare
from medaccel.pretraining.fit import PretrainingFit, settings_of
from medaccel.pretraining.items import Items
from medaccel.pretraining.network import PretrainingNet
from medaccel.pretraining.tasks import make_tasks

SPACING = (8.0, 8.0, 8.0)
ROI = (64, 32, 32)
WINDOW = (-1000.0, 1000.0)
TRAINER: dict[str, Any] = {
    "steps": 4,
    "steps_per_epoch": 2,
    "batch_size": 2,
    "accelerator": "cpu",
    "checkpoint_minutes": 1e-6,
}


def prepared(folder: Path, count: int = 4) -> Scans:
    """Prepares phantoms below a folder, and holds a quarter of them out."""
    write_pool(folder / "scans", count, spacing=SPACING, progress=False)
    cache = folder / "cache"
    found = prepare([folder / "scans"], cache, SPACING, held_out=0.25, skip_limit=0.0, seed=0, progress=False)
    return Scans.of(found, cache)


def training(scans: Scans, weights: dict[str, float], **trainer: Any) -> tuple[PretrainingFit, Items]:
    """Returns the arguments of `medaccel.training.fit.train`."""
    tasks = make_tasks(list(weights), {}, ROI)
    torch.manual_seed(5)
    net = PretrainingNet(tasks, feature_size=12)
    fit = PretrainingFit(net, tasks, weights, settings_of(TRAINER | trainer))
    return fit, Items(Volumes(scans.training), tasks, windows=[WINDOW], roi_size=ROI, seed=1)
