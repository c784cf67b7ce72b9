# SPDX-License-Identifier: Apache-2.0
"""Defines the options of `medaccel pretraining run`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medaccel.pretraining.names import PRESETS, TASK_NAMES
from medaccel.pretraining.settings import (
    NetworkSettings,
    PretrainingTrainerSettings,
    SettingsByTask,
    ViewSettings,
)
from medaccel.studies.digest import digest
from medaccel.studies.settings import check_keys, check_seeds_range, check_written
from medaccel.studies.typed import Settings, nearest, plain

COARSEST = 8.0  # coarsest voxels of phantoms, mm


@dataclass(frozen=True)
class PretrainingConfig(Settings):
    """Holds the options of a pretraining; the same options give the same weights (on one number of threads and one
    processor).

    Args:
        output: folder of the run; made if missing. A second run with the same options continues where the first
            ended.
        scans: folders of CT scans, with folders below them: NIfTI, LUNA16's .mhd, DICOM series. Phantoms by default.
        phantoms: how many phantom CTs are made if `scans` is not given.
        phantom_spacing: voxel size of the phantoms, mm.
        spacing: voxel size that all scans are brought to, mm, from left to right, back to front and up.
        windows: lower and upper HU that become 0 and 1; one of them is drawn for each item.
        roi_size: voxels of a view: multiples of 32, one of them 64 or more.
        preset: a set of tasks: nvidia (inpainting, rotation and instance contrast), instance, instance_pixel, pixpro,
            all.
        tasks: weights by task (inpainting, rotation, instance, pixel, pixpro), instead of the preset's.
        settings: settings of single tasks: '{pixel: {level: decoder3}}'.
        network: options of the Swin UNETR, `medaccel.nets.SwinUNETR`.
        views: options of the two views, `medaccel.data.TwoViews`: '{flip: 0}'.
        trainer: settings of the training; a step's items are pairs of views. Several devices: start the command with
            `torchrun`.
        seed: seed of everything.
        held_out: share of the scans, at least one, that are never trained on and serve for evaluation.
        skip_limit: share of the scans that may be unreadable, or look like no CT; they are listed in scans.json.
        check_units: pass over files that don't look like a CT in HU: label maps, other modalities, scaled
            intensities.
        cache_folder: folder that keeps scans in their prepared form; by default in the output. Runs on the same scans
            can share one.
    """

    output: Path = Path("runs/pretraining")
    scans: tuple[Path, ...] = ()
    phantoms: int = 200
    phantom_spacing: tuple[float, float, float] = (4.0, 4.0, 4.0)
    spacing: tuple[float, float, float] = (1.5, 1.5, 2.0)
    windows: tuple[tuple[float, float], ...] = ((-1000.0, 1000.0),)
    roi_size: tuple[int, int, int] = (96, 96, 96)
    preset: str = "instance_pixel"
    tasks: dict[str, float] = field(default_factory=dict)
    settings: SettingsByTask = field(default_factory=SettingsByTask)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    trainer: PretrainingTrainerSettings = field(default_factory=PretrainingTrainerSettings)
    seed: int = 0
    held_out: float = 0.1
    skip_limit: float = 0.1
    check_units: bool = True
    cache_folder: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ValueError(
                f"preset is {self.preset!r}; expected one of {', '.join(PRESETS)}{nearest(self.preset, PRESETS)}"
            )
        check_keys("tasks", self.tasks, TASK_NAMES)
        for name, weight in self.tasks.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"tasks: the weight of {name} is {weight}; expected a number above 0")
        roi = self.roi_size
        if len(roi) != 3 or max(roi) < 64 or any(n < 1 or n % 32 for n in roi):
            raise ValueError(
                f"roi_size is {list(roi)}; expected three multiples of 32 voxels, one of them 64 or more"
            )
        for name in ("spacing", "phantom_spacing"):
            steps = getattr(self, name)
            if len(steps) != 3 or not all(0 < step < math.inf for step in steps):
                raise ValueError(f"{name} is {list(steps)}; expected three sizes in mm above 0")
        if not self.scans and max(self.phantom_spacing) > COARSEST:
            raise ValueError(f"phantom_spacing is {list(self.phantom_spacing)}; expected at most {COARSEST:g} mm")
        if not self.windows:
            raise ValueError("windows is empty; expected at least one pair of HU")
        for limits in self.windows:
            if len(limits) != 2 or not limits[0] < limits[1]:
                raise ValueError(f"windows holds {list(limits)}; expected two increasing numbers of HU")
        if not self.scans and self.phantoms < 2:
            raise ValueError(
                f"phantoms is {self.phantoms} and there are no scans; expected at least 2, one of them to evaluate on"
            )
        check_seeds_range("seed", self.seed)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; expected a share in (0, 1)")
        if not 0 <= self.skip_limit <= 1:
            raise ValueError(f"skip_limit is {self.skip_limit}; expected a share from 0 to 1")

    @property
    def weights(self) -> dict[str, float]:
        """Returns the weights of the tasks, by name: `tasks`, or else the preset's."""
        return dict(self.tasks or PRESETS[self.preset])

    @property
    def title(self) -> str:
        """Returns the preset's name, or the tasks'."""
        return " + ".join(self.tasks) if self.tasks else self.preset

    def plain(self) -> dict[str, Any]:
        """Returns the options as plain YAML and JSON values; paths are absolute, so that a run can be resumed from
        anywhere."""
        # Folders may be moved, so they don't identify a run.
        values = {
            name: plain(getattr(self, name)) for name in self.option_names() if name not in ("output", "cache_folder")
        }
        if self.check_units:  # runs from before the option existed can continue
            del values["check_units"]
        values["scans"] = [str(Path(path).resolve()) for path in self.scans]
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found

    def digest(self) -> str:
        """Identifies the options by 12 hexadecimal digits of SHA-256."""
        return digest(self.plain())

    @classmethod
    def of(cls, output: Path, plain: Mapping[str, Any]) -> PretrainingConfig:
        """Rebuilds the options from the result of `plain` and a folder.

        Raises:
            ValueError: this version does not know some of the options.
        """
        values = dict(plain)
        check_written(output / "config.yaml", values, cls)
        return cls(**{**values, "output": output})
