# SPDX-License-Identifier: Apache-2.0
"""Estimates the memory that the restoration commands need; see `medaccel.training.memory`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medaccel.phantoms.pet import DEFAULT_SHAPE, DEFAULT_SPACING
from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.methods import method_class
from medaccel.training import memory, ranks
from medaccel.training.memory import Part

# These are measured bytes per voxel of a study: while its exposures are simulated; while it is restored and scored.
_SIMULATED, _WORKED_ON = 200.0, 200.0
# Training keeps so many volumes of a study beside its exposures: target, truth, body, weight, CT; float32.
_KEPT = 5
# The diffusion methods see volumes up to so many voxels whole, not in windows.
_WHOLE = 2_000_000
# The U-Net sees a volume in slabs of up to about so many voxels; a varied study has no more than that.
_SLAB, _VARIED = 5_000_000, 800_000


def expected_of_run(config: RestorationConfig, settings: Mapping[str, Mapping[str, Any]]) -> list[list[Part]]:
    """Returns the stages of a run; `settings` are each method's own, without defaults."""
    voxels, studies = _studies(config)
    stages = [] if config.train_studies is not None else [[_of_volume("simulating a phantom", voxels, _SIMULATED)]]
    for name in config.methods:
        chosen = _all_settings(name, settings[name])
        if "roi_size" not in chosen:
            continue
        if name == "unet" and chosen["weights"]:
            stages.append(expected_of_restoring(name, settings[name], voxels))
            continue
        if name == "unet":
            patches = math.prod(chosen["roi_size"]) * chosen["batch_size"] / ranks.world_size()
            stages.append(
                [
                    Part(
                        "the network's features and gradients",
                        patches * _unet_bytes(chosen, training=True),
                        "reduce unet.batch_size",
                        network=True,
                    )
                ]
            )
            stages.append([_of_volume("simulating a varied study", _VARIED, _SIMULATED)])
            stages.append(expected_of_restoring(name, settings[name], voxels))
            continue
        volumes = _KEPT + len(config.exposures) * (2 if chosen["base"] == "nlm" else 1)
        kept = Part(
            f"{studies} training studies in memory", 4.0 * volumes * voxels * studies, 'set trainer.cache to "disk"'
        )
        network = _network(chosen, chosen["roi_size"], chosen["batch_size"] / ranks.world_size(), training=True)
        stages.append([*network, *([kept] if chosen["cache"] == "memory" else [])])
        stages.append(expected_of_restoring(name, settings[name], voxels))
    stages.append([_of_volume("a study's exposures and scores", voxels, _WORKED_ON)])
    return stages


def expected_of_scoring(
    config: RestorationConfig, chosen: ScoreConfig, settings: Mapping[str, Mapping[str, Any]]
) -> list[list[Part]]:
    """Returns the stages of a scoring; `settings` by method."""
    stages = []
    if chosen.test_studies is not None:
        voxels = _largest(chosen.test_studies, config.target_seconds)
    elif chosen.dicom is not None:
        voxels = _slices(chosen.dicom)
    else:
        voxels = math.prod(DEFAULT_SHAPE)
    if chosen.test_studies is None:
        stages.append([_of_volume("simulating a study", voxels, _SIMULATED)])
    for name, own in settings.items():
        more = {} if chosen.samples is None else {"samples": chosen.samples}
        stages.append(expected_of_restoring(name, {**own, **more}, voxels))
    return stages


def expected_of_restoring(name: str, settings: Mapping[str, Any], voxels: int) -> list[Part]:
    """Returns the memory for one study of so many voxels, restored by a method and scored."""
    chosen = _all_settings(name, settings)
    parts = [_of_volume("a study's volumes", voxels, _WORKED_ON)]
    if name == "unet":
        parts.append(
            Part(
                "the network's features",
                min(voxels, _SLAB) * _unet_bytes(chosen, training=False),
                "crop the study to the body",
                network=True,
            )
        )
    elif "roi_size" in chosen:
        roi, batch = chosen["roi_size"], chosen["sw_batch_size"]
        if "channels" in chosen and voxels <= _WHOLE:
            side = math.ceil(voxels ** (1 / 3))
            roi, batch = [side] * 3, 1
        parts += _network(chosen, roi, batch, training=False)
    if "samples" in chosen:
        parts.append(Part("the samples", 4.0 * chosen["samples"] * voxels, "reduce samples"))
    return parts


def _unet_bytes(settings: Mapping[str, Any], *, training: bool) -> float:
    """Returns the bytes per voxel of the U-Net's features: those that the backward pass needs, or the few that are
    alive at once."""
    levels = list(zip(settings["channels"], settings["blocks"], strict=False))
    if not training:
        return 4.0 * 5 * levels[0][0]
    return sum(4.0 * channels * (6 * blocks + 2) / 8**level for level, (channels, blocks) in enumerate(levels))


def on_gpu(settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tells whether the networks of some methods are computed on a GPU."""
    import torch

    wanted = [_all_settings(name, own).get("accelerator", "cpu") for name, own in settings.items()]
    return torch.cuda.is_available() and any(accelerator != "cpu" for accelerator in wanted)


def _all_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**method_class(name).defaults, **settings}


def _network(settings: Mapping[str, Any], roi: Sequence[int], batch: float, *, training: bool) -> list[Part]:
    if "channels" in settings:
        return memory.diffusion_unet(roi, batch, settings["channels"], settings["shuffle"], training=training)
    return memory.swin_unetr(roi, batch, settings["feature_size"], training=training)


def _of_volume(name: str, voxels: int, a_voxel: float) -> Part:
    return Part(f"{name} ({voxels / 1e6:.1f} million voxels)", voxels * a_voxel, "crop the studies to the body")


def _studies(config: RestorationConfig) -> tuple[int, int]:
    """Returns the voxels of the largest study, and the largest number of studies that are trained on."""
    if config.train_studies is not None:
        from medaccel.restoration.study import find_studies

        return _largest(config.train_studies, config.target_seconds), len(find_studies(config.train_studies))
    sizes = [
        math.prod(math.ceil(n * d / s) for n, d, s in zip(DEFAULT_SHAPE, DEFAULT_SPACING, spacing, strict=True))
        for spacing in config.phantom_spacings
    ]
    return max(sizes), config.train_phantoms


def _largest(folder: Path, seconds: int) -> int:
    """Returns the voxels of the largest study, by the headers; unreadable files are refused elsewhere, in better
    words."""
    import nibabel

    from medaccel.restoration.study import find_studies

    most = 0
    for study in find_studies(folder):
        try:
            most = max(most, math.prod(nibabel.load(study / f"PET_{seconds}.nii.gz").shape[:3]))
        except (OSError, ValueError, nibabel.filebasedimages.ImageFileError):
            continue
    return most


def _slices(folder: Path) -> int:
    from medaccel.data import open_series

    headers = open_series(folder).headers
    return len(headers) * int(headers[0].Rows) * int(headers[0].Columns)
