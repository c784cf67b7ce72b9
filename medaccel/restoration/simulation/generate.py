# SPDX-License-Identifier: Apache-2.0
"""Simulates studies: from an activity volume or a phantom to the folder layout of `medaccel.restoration.study`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.phantoms.attenuation import hu_to_attenuation
from medaccel.phantoms.pet import DEFAULT_SHAPE, DEFAULT_SPACING, make_phantom
from medaccel.phantoms.pet_anatomy import ORGANS
from medaccel.restoration.simulation.activity import denoise_activity
from medaccel.restoration.simulation.simulator import SIMULATOR_VERSION, Progress, SimulatorConfig, simulate
from medaccel.restoration.study import PETStudy, is_complete, read_parameters, save_study

# Parameters in study.json have these units; a name without a unit is a count or a ratio.
UNITS = {
    "durations": "s",
    "psf_fwhm": "mm",
    "scatter_fwhm": "mm",
    "sensitivity": "counts/s/mL at SUV 1",
    "bin_width": "mm",
    "postfilter_fwhm": "mm",
    "postfilter_axial_fwhm": "mm",
}


def simulate_study(
    name: str,
    activity: np.ndarray,
    spacing: Sequence[float],
    affine: np.ndarray,
    *,
    ct: np.ndarray | None = None,
    lesions: np.ndarray | None = None,
    organs: np.ndarray | None = None,
    organ_names: Mapping[str, int] | None = None,
    config: SimulatorConfig | None = None,
    seed: int = 0,
    denoise: str = "none",
    origin: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> PETStudy:
    """Simulates exposures of an activity volume as a study.

    Args:
        name: the study's name.
        activity: SUV, (i, j, k). A real PET has noise of its own: give ``denoise="nlm"``, or the noise counts as
            truth.
        spacing: voxel size, mm.
        affine: (4, 4), RAS, mm.
        ct: HU on the same grid, gives the attenuation; without it the activity's body counts as water.
        lesions, organs, organ_names: kept in the study.
        config: default `SimulatorConfig()`.
        seed: seed of the counts: other seeds are other realisations of the same patient.
        denoise: see `medaccel.restoration.simulation.activity.denoise_activity`; recorded in the study's parameters.
        origin: recorded as it is (plain JSON values): where the activity comes from.
        progress: called with the share done and a word about the work at hand.

    Raises:
        ValueError: `simulate` refuses the arguments.
    """
    config = config or SimulatorConfig()
    if denoise != "none":
        if progress is not None:
            progress(0.0, "denoising")
        activity = denoise_activity(activity, spacing, denoise)
    attenuation = None if ct is None else hu_to_attenuation(ct)
    simulation = simulate(activity, attenuation, spacing, config, seed, progress=progress)
    return PETStudy(
        name=name,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        affine=np.asarray(affine, dtype=np.float64),
        exposures=simulation.exposures,
        ct=None if ct is None else np.asarray(ct, dtype=np.float32),
        lesions=None if lesions is None else lesions.astype(np.uint16),
        noise_free=simulation.noise_free,
        activity=np.asarray(activity, dtype=np.float32),
        organs=None if organs is None else organs.astype(np.uint16),
        organ_names=None if organ_names is None else dict(organ_names),
        parameters=_parameters(config, seed, denoise, origin or {}),
    )


def phantom_study(
    seed: int,
    generator: str = "standard",
    *,
    config: SimulatorConfig | None = None,
    shape: Sequence[int] = DEFAULT_SHAPE,
    spacing: Sequence[float] = DEFAULT_SPACING,
    progress: Progress | None = None,
) -> PETStudy:
    """Simulates exposures of a random phantom; person and counts have the same seed. It raises the errors of
    `make_phantom` and `simulate`."""
    phantom = make_phantom(seed, generator, shape, spacing)
    origin = _phantom_origin(seed, generator, shape, spacing)
    study = simulate_study(
        _phantom_name(seed, generator),
        phantom.activity,
        phantom.spacing,
        phantom.affine,
        ct=phantom.ct,
        lesions=phantom.lesions,
        organs=phantom.organs,
        organ_names=ORGANS,
        config=config,
        seed=seed,
        origin=origin,
        progress=progress,
    )
    study.parameters["person"] = phantom.parameters
    study.parameters["lesions"] = phantom.lesion_table
    return study


def write_studies(
    folder: str | Path,
    seeds: Iterable[int],
    generator: str = "standard",
    *,
    config: SimulatorConfig | None = None,
    shape: Sequence[int] = DEFAULT_SHAPE,
    spacing: Sequence[float] = DEFAULT_SPACING,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes phantom studies, one folder per seed; complete ones are kept, so a second run resumes.

    Args:
        folder: made if missing.
        seeds, generator, config, shape, spacing: see `phantom_study`.
        progress: called with the share of all studies done, and the study and work at hand.

    Raises:
        ValueError: a study exists that was made with other parameters; the message names its folder and the first of
            them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config or SimulatorConfig()
    chosen = list(seeds)
    paths = []
    for position, seed in enumerate(chosen):
        name = _phantom_name(seed, generator)
        path = folder / name
        if is_complete(path):
            expected = _parameters(config, seed, "none", _phantom_origin(seed, generator, shape, spacing))
            _check_same(path, read_parameters(path), json.loads(json.dumps(expected)))
        else:

            def report(share: float, message: str, position: int = position, name: str = name) -> None:
                if progress is not None:
                    progress((position + share) / len(chosen), f"{name}: {message}")

            study = phantom_study(seed, generator, config=config, shape=shape, spacing=spacing, progress=report)
            save_study(path, study)
        paths.append(path)
    if progress is not None:
        progress(1.0, "studies written")
    return paths


def _phantom_name(seed: int, generator: str) -> str:
    return f"{generator}_{seed:04d}"


def _phantom_origin(seed: int, generator: str, shape: Sequence[int], spacing: Sequence[float]) -> dict[str, Any]:
    return {
        "phantom": generator,
        "phantom_seed": seed,
        "shape": [int(n) for n in shape],
        "spacing_mm": [float(s) for s in spacing],
    }


def _parameters(config: SimulatorConfig, seed: int, denoise: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "simulator_version": SIMULATOR_VERSION,
        "seed": seed,
        "denoise": denoise,
        "origin": dict(origin),
        "scanner": config.to_json(),
        "units": UNITS,
    }


def _check_same(path: Path, present: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if present.get(key) != value:
            raise ValueError(
                f"{path}: holds a study made with {key}={present.get(key)} (now {value}); "
                "remove it or choose another folder"
            )
