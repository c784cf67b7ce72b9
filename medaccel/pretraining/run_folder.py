# SPDX-License-Identifier: Apache-2.0
"""Describes the folder of a pretraining.

config.yaml             the options
scans/                  phantoms, where no scans were given
cache/                  scans as they are trained on, unless another folder was named
inputs.json             size, time and SHA-256 of the scans' files, where scans were given
scans.json              what was trained on, held out, skipped, found twice
training/               logs, and what an interrupted training goes on from
checkpoints/weights.pt  the backbone's trained tensors, for `medaccel.nets.load_pretrained`
metrics.json|csv, report.html
"""

from __future__ import annotations

from pathlib import Path

from medaccel.studies.run_folder import REPORT, OptionsFolder


class PretrainingFolder(OptionsFolder):
    """Describes the folder of a pretraining."""

    generated = ("scans", "training", "checkpoints", "metrics.json", "metrics.csv", "scans.json")
    folders = ("checkpoints",)
    worth = ("training/last.ckpt", "checkpoints/*.pt")

    @property
    def ended(self) -> bool:
        return (self.path / REPORT).exists()


def weights(output: Path) -> Path:
    """Returns the path of a run's weights."""
    return output / "checkpoints" / "weights.pt"
