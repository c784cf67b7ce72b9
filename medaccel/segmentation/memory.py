# SPDX-License-Identifier: Apache-2.0
"""Estimates the memory that the segmentation commands need; see `medaccel.training.memory`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Image

from medaccel.data.msd import read_dataset
from medaccel.segmentation.config import SegmentationConfig
from medaccel.training import memory, ranks
from medaccel.training.memory import Part

# These are bytes per voxel: of a scan while it is read and brought to the network's grid; of a training case that is
# kept; of a validation case, image and labels.
_READ, _KEPT, _VALIDATED = 24.0, 6.0, 8.0
# `inference.to_grid` works on about so many copies of its planes: logits, probabilities, padded ones, resampled ones.
_PLANE_COPIES, _PLANES = 3, 18
# A torso phantom has these sides, mm, as in `medaccel.phantoms.ct`.
_PHANTOM_MM = (384.0, 304.0, 272.0)


@dataclass(frozen=True)
class Size:
    """Holds a scan's voxels, and its shape on the network's grid, not yet cropped to the body."""

    voxels: int
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, scan: Nifti1Image, spacing: Sequence[float]) -> Size:
        """Reads the size from the header alone."""
        shape, affine = scan.shape[:3], np.asarray(scan.affine, dtype=np.float64)
        lengths = np.linalg.norm(affine[:3, :3], axis=0) * shape
        axes = nibabel.orientations.io_orientation(affine)[:, 0]  # the patient's axis that each array axis follows
        grid = [1, 1, 1]
        for length, axis in zip(lengths, axes, strict=True):
            if np.isfinite(axis):
                grid[int(axis)] = max(1, math.ceil(length / spacing[int(axis)]))
        return cls(math.prod(shape), (grid[0], grid[1], grid[2]))


def expected_of_scan(size: Size, settings: Mapping[str, Any], classes: int) -> list[Part]:
    """Returns the memory for one scan that is segmented."""
    roi = settings["roi_size"]
    depth, *across = (max(n, r) for n, r in zip((roi[0], *size.grid[1:]), roi, strict=True))
    plane = 4.0 * math.prod(across)
    return [
        Part("the scan", _READ * size.voxels + 8.0 * math.prod(size.grid), "crop it to the body"),
        Part(
            f"{classes} classes on a window's depth of the scan",
            plane * ((classes + 1) * depth + _PLANE_COPIES * classes * _PLANES),
            "choose a coarser spacing or a smaller roi_size",
        ),
        *memory.swin_unetr(roi, settings["sw_batch_size"], settings["feature_size"], training=False, classes=classes),
    ]


def expected_of_study(config: SegmentationConfig, settings: Mapping[str, Mapping[str, Any]]) -> list[list[Part]]:
    """Returns the stages of a cell of each chosen task."""
    stages = []
    for name in {cell.task for cell in config.chosen()}:
        s = settings[name]
        sizes, classes = _sizes(config, name, s["spacing"])
        if not sizes:
            continue
        # A third of the cases is the test set; half of the rest is trained on and the other half chosen on.
        half = math.ceil(len(sizes) / 3)
        largest = sorted(sizes, key=lambda size: math.prod(size.grid))[-half:]
        held = [
            Part(
                f"{half} validation cases in memory",
                _VALIDATED * sum(math.prod(size.grid) for size in largest[-(s["validation_cases"] or half) :]),
                "set validation_cases",
            )
        ]
        if s["cache"] == "memory":
            kept = _KEPT * sum(math.prod(size.grid) for size in largest)
            held.append(Part(f"{half} training cases in memory", kept, 'set cache to "none"'))
        training = memory.swin_unetr(
            s["roi_size"],
            s["batch_size"] / ranks.world_size(),
            s["feature_size"],
            training=True,
            classes=classes,
        )
        stages += [[*held, *training], [*held, *expected_of_scan(largest[-1], s, classes)]]
    return stages


def _sizes(config: SegmentationConfig, task: str, spacing: Sequence[float]) -> tuple[list[Size], int]:
    """Returns the sizes of a task's cases, and its number of classes; also for phantoms that are still to be made."""
    given = config.tasks[task].data
    if given is None:
        made = config.phantoms
        shape = [math.ceil(length / step) for length, step in zip(_PHANTOM_MM, made.spacing, strict=True)]
        affine = np.diag([*made.spacing, 1.0])
        empty = Nifti1Image(np.broadcast_to(np.int16(0), shape), affine)
        return [Size.of(empty, spacing)] * made.cases, 2
    dataset = read_dataset(given)
    sizes = []
    for case in dataset.cases:
        try:
            sizes.append(Size.of(nibabel.load(case.image), spacing))
        except (OSError, ValueError, nibabel.filebasedimages.ImageFileError):
            continue  # refused elsewhere, in better words
    return sizes, len(dataset.labels)


def on_gpu(settings: Mapping[str, Any]) -> bool:
    """Tells whether a cell's network is computed on a GPU."""
    import torch

    return torch.cuda.is_available() and settings["accelerator"] != "cpu"
