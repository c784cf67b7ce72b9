# SPDX-License-Identifier: Apache-2.0
"""Makes varied training studies for a model that is to serve many scanners, in the form that training reads.

The people are `medaccel.phantoms.pet_varied`'s. Half of them are imaged by the frozen simulator, mostly on the grids
of the project's studies; for the others voxel size, point spread, reconstruction, filter and counts are drawn too.

One study is one file of 16-bit floats, (channels, i, j, k): the noise-free image, noisy ones of several exposures,
and the body; it is cut to the body and a margin. A JSON file beside it holds what was drawn, and each input's error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.data.files import atomic_path
from medaccel.phantoms.attenuation import hu_to_attenuation
from medaccel.phantoms.pet_varied import KINDS, paint_varied
from medaccel.restoration.evaluation.metrics import body_mask, mse
from medaccel.restoration.evaluation.training_range import root_noise
from medaccel.restoration.simulation.simulator import (
    FWHM_PER_SIGMA,
    SimulatorConfig,
    draw_counts,
    expected_projections,
    reconstruct,
)

CLINICAL_SPACING = (4.6875, 4.6875, 3.27)  # a common scanner's, mm
_DEFAULT_SPACING = (4.0, 4.0, 4.0)
_MARGIN_MM = 16.0


@dataclass(frozen=True)
class VariedStudy:
    """Holds one study, cut to the body; arrays (i, j, k).

    Args:
        spacing: mm.
        noise_free: SUV.
        inputs: noisy images, SUV.
        mask: the body.
        record: what was drawn, plain JSON values; `errors` holds each input's MSE against the noise-free image in the
            body, `noise` its `root_noise`, `seconds` its exposure at the scanner's dose.
    """

    spacing: tuple[float, float, float]
    noise_free: np.ndarray
    inputs: list[np.ndarray]
    mask: np.ndarray
    record: dict[str, Any]


def varied_study(seed: int, kinds: Mapping[str, float] = KINDS, frozen: bool | None = None) -> VariedStudy:
    """Draws a person, a scanner and exposures; the same arguments give the same bits.

    Args:
        seed: whole number >= 0.
        kinds: how often each kind of person is drawn.
        frozen: whether the simulator is the frozen one; None: in half of the studies.
    """
    rng = np.random.default_rng([seed, 7301])
    kind = str(rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values())))
    drawn = bool(rng.random() < (0.8 if kind == "standard" else 0.5))
    frozen = drawn if frozen is None else frozen
    spacing = _spacing(rng, frozen)
    config = SimulatorConfig() if frozen else _scanner(rng)
    activity, ct = paint_varied(kind, spacing, rng)
    blur = 0.0 if kind == "standard" or rng.random() < 0.4 else float(rng.uniform(1.5, 9.0))
    if blur:  # a measured patient's truth is as blurred as his scanner's image
        from scipy.ndimage import gaussian_filter

        activity = gaussian_filter(activity, [blur / FWHM_PER_SIGMA / s for s in spacing], mode="nearest")
    durations = sorted({30, 60, *(int(t) for t in np.exp(rng.uniform(np.log(10), np.log(120), size=2)))})
    config = replace(config, durations=tuple(durations))
    projections = expected_projections(activity, hu_to_attenuation(ct), spacing, config)
    rates: dict[int, np.ndarray] = {0: projections.trues + projections.background}
    for t in durations:  # realisations of their own, not nested: more noise to learn from
        alone = draw_counts(projections, (t,), int(rng.integers(2**62)))[t]
        rates[t] = alone.astype(np.float32) / np.float32(t)
    images = reconstruct(projections, rates, config)
    noise_free = images.pop(0)
    mask = body_mask(noise_free, spacing)
    if not mask.any():
        raise ValueError(f"seed {seed}: no body in the noise-free image")
    box = _box(mask, spacing)
    mask = mask[box]
    record = {
        "seed": seed,
        "kind": kind,
        "spacing": list(spacing),
        "scanner": config.to_json(),
        "truth_blur_mm": blur,
        "seconds": durations,
        "errors": [mse(images[t][box], noise_free[box], mask) for t in durations],
        "noise": [root_noise(images[t][box], spacing) for t in durations],
    }
    return VariedStudy(spacing, noise_free[box], [images[t][box] for t in durations], mask, record)


def write_varied(
    folder: Path, seeds: Sequence[int], kinds: Mapping[str, float] = KINDS, frozen: bool | None = None
) -> Iterator[Path]:
    """Writes the studies that are missing, a file of images and a record each; yields each path once it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = folder / f"{seed:06d}.npy"
        if not path.with_suffix(".json").exists():
            study = varied_study(seed, kinds, frozen)
            stack = np.stack([study.noise_free, *study.inputs, study.mask]).astype(np.float16)
            with atomic_path(path, force=True) as temporary, open(temporary, "wb") as file:
                np.save(file, stack)
            # The record comes last: where it is, the images are whole.
            with atomic_path(path.with_suffix(".json"), force=True) as temporary:
                Path(temporary).write_text(json.dumps(study.record) + "\n", encoding="utf-8")
        yield path


def _spacing(rng: np.random.Generator, frozen: bool) -> tuple[float, float, float]:
    choice = rng.random()
    if frozen and choice < 0.65:
        return _DEFAULT_SPACING
    if choice < (0.9 if frozen else 0.25):
        return CLINICAL_SPACING
    plane = float(rng.uniform(2.0, 5.5))
    return plane, plane, float(np.clip(plane * rng.uniform(0.6, 1.3), 2.0, 5.0))


def _scanner(rng: np.random.Generator) -> SimulatorConfig:
    angles, subsets = ((96, 12), (96, 16), (96, 24), (120, 10), (120, 20), (144, 18), (144, 24))[rng.integers(7)]
    filtered = rng.random() < 0.85
    return SimulatorConfig(
        psf_fwhm=float(rng.uniform(3.5, 7.0)),
        scatter_fraction=float(rng.uniform(0.2, 0.45)),
        randoms_fraction=float(rng.uniform(0.1, 1.0)),
        dose_fraction=float(np.exp(rng.uniform(np.log(0.4), np.log(2.5)))),
        n_angles=angles,
        bin_width=float(rng.uniform(3.0, 5.0)),
        iterations=int(rng.integers(2, 4)) if subsets < 20 else int(rng.integers(1, 3)),
        n_subsets=subsets,
        postfilter_fwhm=float(rng.uniform(3.0, 8.5)) if filtered else 0.0,
        postfilter_axial_fwhm=float(rng.uniform(0.0, 7.0)) if filtered else 0.0,
    )


def _box(mask: np.ndarray, spacing: Sequence[float]) -> tuple[slice, slice, slice]:
    found = []
    for axis, (n, step) in enumerate(zip(mask.shape, spacing, strict=True)):
        where = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        margin = math.ceil(_MARGIN_MM / step)
        found.append(slice(max(int(where[0]) - margin, 0), min(int(where[-1]) + 1 + margin, n)))
    return found[0], found[1], found[2]
