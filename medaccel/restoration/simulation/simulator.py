# SPDX-License-Identifier: Apache-2.0
"""Simulates PET exposures of an activity volume: nested Poisson counts, reconstructed.

The chain for an activity in SUV and an attenuation map is:

1. The activity is interpolated to a finer grid and blurred with the scanner's point spread; the projections
   of that grid, attenuated, are the trues. Scatter is a broad blur of the trues, randoms are flat within a
   slice.
2. Counts are Poisson, drawn per increment between consecutive durations and summed, so exposures nest as in a
   list-mode acquisition: the 90 s data contain the 60 s data.
3. OSEM on the image grid, *without* the point spread, with the known mean of scatter and randoms and the
   attenuation in its model, then a Gaussian post-filter, transaxial and axial. Data and model thus come
   from different grids and different physics (no inverse crime).

The noise-free reconstruction is the same chain on the expected counts. OSEM scales with its data, so one
serves for all durations. Decay within the minutes of an exposure, dead time and time of flight are not
modelled. Arrays are (i, j, k), slices along k. Nothing here is parallel, so the bits depend on the seed
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medaccel.restoration.simulation.activity import attenuation_from_activity
from medaccel.restoration.simulation.config import SimulatorConfig
from medaccel.restoration.simulation.projector import (
    Geometry,
    finer,
    forward_project,
    geometry_for,
    osem,
    slice_blocks,
)

# Raise this version whenever the same configuration and seed would give other exposures.
SIMULATOR_VERSION = 1

FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))
# If a greater share of the total activity lies outside the circular field of view, the whole rectangle is scanned.
_CORNER_SHARE = 1e-3

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Projections:
    """Holds expected coincidences per second and bin, float32, each (subsets, angles, bins, slices).

    Args:
        geometry: image grid and bins.
        spacing: voxel size of the image grid, mm.
        trues: true coincidences, attenuated, with the point spread.
        background: scatter plus randoms.
        factors: factors of the reconstruction on its own projection of SUV: attenuation (projected on the image
            grid), sensitivity and dose.
    """

    geometry: Geometry
    spacing: tuple[float, float, float]
    trues: np.ndarray
    background: np.ndarray
    factors: np.ndarray


@dataclass(frozen=True)
class Simulation:
    """Holds the result of `simulate`: images in SUV, float32, on the activity's grid.

    Args:
        exposures: one image per duration in s.
        noise_free: the reconstruction of the expected counts.
        counts: prompts per duration, (subsets, angles, bins, slices), uint32, if they were asked for.
    """

    exposures: dict[int, np.ndarray]
    noise_free: np.ndarray
    counts: dict[int, np.ndarray] | None = None


def simulate(
    activity: np.ndarray,
    attenuation: np.ndarray | None,
    spacing: Sequence[float],
    config: SimulatorConfig | None = None,
    seed: int = 0,
    *,
    return_counts: bool = False,
    progress: Progress | None = None,
) -> Simulation:
    """Simulates exposures of an activity volume and their noise-free reconstruction.

    Args:
        activity: SUV, (i, j, k), finite, >= 0, at least two slices.
        attenuation: linear attenuation coefficient at 511 keV, 1/cm, same grid; None derives a
            water-equivalent body from the activity.
        spacing: mm, three numbers > 0.
        config: default `SimulatorConfig()`.
        seed: seed of the counts; the same seed gives the same bits.
        return_counts: keep the sinograms.
        progress: called with the share done (0 to 1) and a word about the work at hand.

    Raises:
        ValueError: bad arrays or spacing; the message names the argument.
    """
    config = config or SimulatorConfig()
    report = progress or (lambda share, message: None)
    projections = expected_projections(
        activity, attenuation, spacing, config, progress=lambda share, message: report(0.3 * share, message)
    )
    counts = draw_counts(projections, config.durations, seed)
    rates = {t: counts[t].astype(np.float32) / np.float32(t) for t in config.durations}
    rates[0] = projections.trues + projections.background  # 0: the noise-free one
    images = reconstruct(
        projections, rates, config, progress=lambda share, message: report(0.3 + 0.7 * share, message)
    )
    noise_free = images.pop(0)
    return Simulation(images, noise_free, counts if return_counts else None)


def expected_projections(
    activity: np.ndarray,
    attenuation: np.ndarray | None,
    spacing: Sequence[float],
    config: SimulatorConfig,
    *,
    progress: Progress | None = None,
) -> Projections:
    """Computes the expected coincidence rates of an activity volume; its arguments and errors are those of
    `simulate`."""
    from scipy.ndimage import gaussian_filter, gaussian_filter1d, zoom

    activity, attenuation, steps = _checked(activity, attenuation, spacing)
    geometry = geometry_for(
        activity.shape[:2],
        steps[:2],
        n_angles=config.n_angles,
        bin_width=config.bin_width,
        n_subsets=config.n_subsets,
        corners=_reaches_corners(activity, steps),
    )
    fine = finer(geometry, config.fine_factor)
    psf_sigma = config.psf_fwhm / FWHM_PER_SIGMA  # mm
    activity = gaussian_filter1d(activity, psf_sigma / steps[2], axis=2, mode="nearest")
    if not config.attenuation:
        attenuation = np.zeros_like(activity)
    elif attenuation is None:
        attenuation = attenuation_from_activity(activity, steps)

    # The scale gives counts per second and bin for a projection of 1 SUV · pixel.
    scale = config.sensitivity * config.dose_fraction * math.prod(steps) / 1000.0 / config.n_angles
    shape = (*geometry.sinogram_shape, activity.shape[2])
    trues = np.empty(shape, dtype=np.float32)
    factors = np.empty(shape, dtype=np.float32)
    blocks = slice_blocks(activity.shape[2])
    upsampling = {
        "zoom": (config.fine_factor, config.fine_factor, 1),
        "order": 1,
        "mode": "nearest",
        "grid_mode": True,
    }
    for done, block in enumerate(blocks):
        if progress is not None:
            progress(done / len(blocks), "projecting")
        fine_activity = zoom(activity[..., block], **upsampling)
        fine_activity = gaussian_filter(
            fine_activity, [psf_sigma / step for step in fine.spacing], axes=(0, 1), mode="constant"
        )
        # A fine pixel holds 1/fine_factor² of an image pixel's activity.
        trues[..., block] = forward_project(fine_activity, fine) * np.float32(scale / config.fine_factor**2)
        if config.attenuation:
            fine_attenuation = zoom(attenuation[..., block], **upsampling)
            trues[..., block] *= _survival(fine_attenuation, fine)
        factors[..., block] = _survival(attenuation[..., block], geometry) * np.float32(scale)
    return Projections(geometry, steps, trues, _background(trues, steps[2], config), factors)


def draw_counts(projections: Projections, durations: Sequence[int], seed: int) -> dict[int, np.ndarray]:
    """Draws nested Poisson prompts: each duration's counts are the previous one's plus an independent increment.

    Returns:
        Counts per duration in s, (subsets, angles, bins, slices), uint32. Each increment has a random
        stream of its own.
    """
    rate = projections.trues.astype(np.float64) + projections.background
    streams = np.random.SeedSequence(seed).spawn(len(durations))
    counts: dict[int, np.ndarray] = {}
    total, previous = np.zeros(rate.shape, dtype=np.uint32), 0
    for duration, stream in zip(durations, streams, strict=True):
        increment = np.random.default_rng(stream).poisson(rate * (duration - previous))
        total = total + increment.astype(np.uint32)
        counts[duration], previous = total, duration
    return counts


def reconstruct(
    projections: Projections,
    rates: Mapping[int, np.ndarray],
    config: SimulatorConfig,
    *,
    progress: Progress | None = None,
) -> dict[int, np.ndarray]:
    """Reconstructs several measurements (prompts per second and bin), each under a key, by OSEM and post-filter.

    Returns:
        Images in SUV, (i, j, k), float32, >= 0.
    """
    from scipy.ndimage import gaussian_filter

    geometry = projections.geometry
    n_slices = projections.trues.shape[-1]
    images = {key: np.empty((*geometry.shape, n_slices), dtype=np.float32) for key in rates}
    blocks = slice_blocks(n_slices)
    for done, block in enumerate(blocks):
        if progress is not None:
            progress(done / len(blocks), "reconstructing")
        results = osem(
            [rate[..., block] for rate in rates.values()],
            projections.background[..., block],
            projections.factors[..., block],
            geometry,
            iterations=config.iterations,
        )
        for image, result in zip(images.values(), results, strict=True):
            image[..., block] = result
    fwhm = (config.postfilter_fwhm, config.postfilter_fwhm, config.postfilter_axial_fwhm)
    sigma = [width / FWHM_PER_SIGMA / step for width, step in zip(fwhm, projections.spacing, strict=True)]
    for key in images:
        images[key] = gaussian_filter(images[key], sigma, mode="nearest")
    if progress is not None:
        progress(1.0, "reconstructed")
    return images


def _checked(
    activity: np.ndarray, attenuation: np.ndarray | None, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray | None, tuple[float, float, float]]:
    """Returns the arguments as float32 arrays and a tuple, or raises a sentence about the fault."""
    steps = tuple(float(step) for step in spacing)
    if len(steps) != 3 or not all(0.0 < step < math.inf for step in steps):
        raise ValueError(f"simulate: spacing is {tuple(spacing)}; expected three sizes in mm, > 0")
    checked: list[np.ndarray | None] = []
    for name, array, unit in (("activity", activity, "SUV"), ("attenuation", attenuation, "1/cm")):
        if array is None:
            checked.append(None)
            continue
        array = np.asarray(array)
        if array.ndim != 3 or min(array.shape) < 2:
            raise ValueError(f"simulate: {name} has shape {array.shape}; expected three axes of at least 2 voxels")
        array = array.astype(np.float32)
        if not np.isfinite(array).all() or array.min() < 0.0:
            raise ValueError(f"simulate: {name} has values that are negative or not finite; expected {unit} >= 0")
        checked.append(array)
    image, mu = checked
    assert image is not None
    if mu is not None and mu.shape != image.shape:
        raise ValueError(f"simulate: attenuation has shape {mu.shape}, activity {image.shape}; expected one grid")
    if not image.any():
        raise ValueError("simulate: activity is zero everywhere")
    return image, mu, (steps[0], steps[1], steps[2])


def _reaches_corners(activity: np.ndarray, spacing: Sequence[float]) -> bool:
    """Tells whether activity lies outside the circle whose diameter is the grid's longer side."""
    n_i, n_j = activity.shape[:2]
    x = (np.arange(n_i) - (n_i - 1) / 2) * spacing[0]
    y = (np.arange(n_j) - (n_j - 1) / 2) * spacing[1]
    radius = max(n_i * spacing[0], n_j * spacing[1]) / 2
    outside = np.add.outer(x**2, y**2) > radius**2
    slice_sums = activity.sum(axis=2, dtype=np.float64)
    return bool(slice_sums[outside].sum() > _CORNER_SHARE * slice_sums.sum())


def _survival(attenuation: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Returns exp(−∫μ dl) per bin; μ in 1/cm, (i, j, slices)."""
    line_integral = forward_project(attenuation, geometry)
    line_integral *= np.float32(geometry.line_length / 10.0)  # mm -> cm
    return np.exp(-line_integral)


def _background(trues: np.ndarray, slice_step: float, config: SimulatorConfig) -> np.ndarray:
    """Returns expected scatter plus randoms per second and bin, from attenuated trues per second."""
    from scipy.ndimage import gaussian_filter

    sigma = config.scatter_fwhm / FWHM_PER_SIGMA  # mm
    blurred = gaussian_filter(
        trues, (sigma / config.bin_width, sigma / slice_step), axes=(2, 3), mode="constant", truncate=3.0
    )
    total = trues.sum(dtype=np.float64)
    scatter_total = total * config.scatter_fraction / (1.0 - config.scatter_fraction)
    # The trues already hold one power of the dose.
    randoms_total = total * config.randoms_fraction * config.dose_fraction
    background = blurred * np.float32(scatter_total / blurred.sum(dtype=np.float64))
    # A bed position's singles are spread over its slices; within a slice randoms are flat.
    profile = blurred.sum(axis=(0, 1, 2), dtype=np.float64)  # (slices,)
    per_bin = randoms_total * profile / profile.sum() / math.prod(trues.shape[:3])
    background += per_bin.astype(np.float32)
    # OSEM divides by the model: a scan without scatter and randoms still needs one above zero.
    floor = np.float32(1e-6 * total / trues.size)
    return np.maximum(background, floor, out=background)
