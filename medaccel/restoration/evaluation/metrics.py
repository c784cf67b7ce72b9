# SPDX-License-Identifier: Apache-2.0
"""Computes distances between a restored PET and a reference, the score built on them, and its bounds.

Volumes are numpy arrays (i, j, k) in SUV, k the axial direction; `mask` is the body, a boolean array of the
same shape. An input of t seconds is restored and compared with the T-second image of the same study, t < T;
exposures nest, so both share the first t seconds' counts. λ is the activity itself: in a simulation, the
noise-free reconstruction.

The functions raise ValueError where shapes differ, the mask is empty, or a volume holds NaN or infinity.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = NDArray[np.bool_]

SSIM_RANGE = 10.0  # SUV; fixed, since with the study's own range a hot bladder turns 1 − SSIM into a second MSE
SSIM_SIGMA = 1.5  # voxels; with scikit-image's cut at 3.5 σ: 11 taps, the window of Wang et al. 2004
SSIM_RADIUS = 5


def check_volumes(mask: Mask, **volumes: Array) -> None:
    """Raises ValueError unless all are finite 3-D arrays of the mask's shape and the mask has a voxel."""
    if mask.ndim != 3 or mask.dtype != np.bool_:
        raise ValueError(f"mask is a {mask.ndim}-D array of {mask.dtype}; expected 3-D, bool")
    for name, volume in volumes.items():
        if volume.shape != mask.shape:
            raise ValueError(f"{name} has shape {volume.shape}, the mask {mask.shape}; expected the same")
        bad = int(np.count_nonzero(~np.isfinite(volume)))
        if bad:
            raise ValueError(f"{name} has {bad} voxels that are NaN or infinite; expected SUV")
    if not mask.any():
        raise ValueError("mask is empty; expected at least one body voxel")


def check_seconds(input_seconds: float, target_seconds: float) -> None:
    """Raises ValueError unless 0 < input < target."""
    if not 0 < input_seconds < target_seconds:
        raise ValueError(
            f"input_seconds={input_seconds}, target_seconds={target_seconds}; expected 0 < input < target"
        )


def body_mask(suv: Array, spacing: tuple[float, float, float], *, threshold: float = 0.2, fwhm: float = 8.0) -> Mask:
    """Finds the patient: the largest connected part above `threshold` after smoothing, with its holes filled.

    Scores are taken over it; all that attenuates is more,
    `medaccel.restoration.simulation.activity.attenuating_body`.
    Smoothing keeps the noise outside the patient below the threshold. On a real whole-body FDG PET of a 71 kg
    patient, thresholds from 0.1 to 0.3 SUV change the volume by ±8 %, since the skin is a steep edge.

    Args:
        suv: (i, j, k), SUV.
        spacing: voxel size in mm.
        threshold: SUV. Fat and lung are at 0.2–0.6, air below 0.1.
        fwhm: width of the smoothing, in mm.

    Returns:
        Boolean (i, j, k), all False if nothing reaches the threshold, as in a volume of zeros.

    Raises:
        ValueError: `suv` is not 3-D or not finite; `spacing` is not three positive lengths.
    """
    from scipy import ndimage

    if suv.ndim != 3 or not np.isfinite(suv).all():
        raise ValueError(f"suv has shape {suv.shape} and must be 3-D and finite")
    check_spacing(spacing)
    smooth = ndimage.gaussian_filter(suv.astype(np.float32), [fwhm / 2.3548 / s for s in spacing])
    labels, count = ndimage.label(smooth > threshold)
    if not count:
        return np.zeros(suv.shape, dtype=bool)
    # Labels are counted slice by slice: a whole body's labels as the integers that bincount needs are a gigabyte.
    sizes = sum(np.bincount(labels[:, :, k].ravel(), minlength=count + 1) for k in range(suv.shape[2]))
    body = labels == 1 + int(np.argmax(np.asarray(sizes)[1:]))
    filled = ndimage.binary_fill_holes(body)
    # The field of view cuts the airways open at its ends, so that lungs are holes only slice by slice.
    slices = [ndimage.binary_fill_holes(filled[:, :, k]) for k in range(suv.shape[2])]
    return np.stack(slices, axis=2).astype(bool)


def check_spacing(spacing: tuple[float, ...]) -> None:
    """Raises ValueError unless spacing is three positive, finite lengths."""
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing is {tuple(spacing)}; expected three positive lengths in mm")


def mse(restored: Array, reference: Array, mask: Mask) -> float:
    """Returns the mean squared error over the mask, in SUV²."""
    check_volumes(mask, restored=restored, reference=reference)
    difference = restored[mask].astype(np.float64) - reference[mask]
    return float(np.mean(difference * difference))


def psnr(restored: Array, reference: Array, mask: Mask, *, data_range: float = SSIM_RANGE) -> float:
    """Returns the peak signal-to-noise ratio in dB, 10·log10(data_range² / MSE); infinite for equal images."""
    error = mse(restored, reference, mask)
    return 10 * math.log10(data_range**2 / error) if error > 0 else math.inf


def ssim_map(restored: Array, reference: Array, *, data_range: float = SSIM_RANGE, axial: bool = False) -> Array:
    """Returns the full map of the structural similarity (Wang et al. 2004), by scikit-image.

    It has a Gaussian window, σ 1.5 voxels, 11 taps per axis, population covariance, reflected borders.

    Args:
        restored, reference: (i, j, k), of any size. float32 is computed in float32: 1 − SSIM then differs by
            about 1e-7 of itself.
        data_range: L of the constants (0.01·L)² and (0.03·L)², in SUV.
        axial: 2-D windows within each axial slice, instead of 3-D ones.

    Raises:
        ValueError: `data_range` is not positive.
    """
    from skimage.metrics import structural_similarity

    if not data_range > 0:
        raise ValueError(f"data_range is {data_range}; expected a positive SUV")
    dtype = np.result_type(restored, reference, np.float32)
    # win_size only says how much of the border scikit-image leaves out of a mean that is not used here;
    # without it, volumes thinner than 11 voxels would be refused.
    _, similarity = structural_similarity(
        restored.astype(dtype, copy=False),
        reference.astype(dtype, copy=False),
        data_range=data_range,
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
        win_size=1,
        full=True,
        channel_axis=2 if axial else None,
    )
    return np.asarray(similarity)


def ssim_distance(
    restored: Array, reference: Array, mask: Mask, *, data_range: float = SSIM_RANGE, axial: bool = False
) -> float:
    """Returns 1 − SSIM: 1 minus the mean over the mask of `ssim_map`.

    The defaults are the primary convention. Two others are published elsewhere: `data_range=study_range(target,
    mask)`, and `axial=True`.
    """
    check_volumes(mask, restored=restored, reference=reference)
    # Within the mask the map depends on no voxel further than the window's radius from it.
    box = tuple(
        slice(max(int(where.min()) - SSIM_RADIUS, 0), int(where.max()) + SSIM_RADIUS + 1)
        for where in np.nonzero(mask)
    )
    similarity = ssim_map(restored[box], reference[box], data_range=data_range, axial=axial)
    return float(1 - similarity[mask[box]].mean(dtype=np.float64))


def study_range(reference: Array, mask: Mask) -> float:
    """Returns maximum minus minimum over the mask, in SUV."""
    check_volumes(mask, reference=reference)
    return float(np.ptp(reference[mask]))


def score(distance: float, input_distance: float) -> float:
    """Returns 100·(1 − Δ(restored, target) / Δ(input, target)), in percent: 0 = no help, negative = harm.

    It is NaN if the input already equals the target.
    """
    return 100 * (1 - distance / input_distance) if input_distance > 0 else math.nan


def mse_limit(input_seconds: float, target_seconds: float) -> float:
    """Returns the largest MSE score that any estimate can have, as a fraction: 1 − t/T.

    The target is noisy too: the unrestored input misses it by the variance λ·(1/t − 1/T), and the best
    estimate, `oracle`, still by t/T of that. The limit is one third for 60 s of 90 s, two thirds for 30 s. It is
    exact for a linear reconstruction, and holds for OSEM within about two points.
    """
    check_seconds(input_seconds, target_seconds)
    return 1 - input_seconds / target_seconds


def share_of_limit(mse_score: float, input_seconds: float, target_seconds: float) -> float:
    """Returns the MSE score (percent) as a fraction of its limit, which can be compared across data sets.

    It is the fraction of the input's squared error that `implied_truth` no longer has.
    """
    return mse_score / 100 / mse_limit(input_seconds, target_seconds)


def equivalent_seconds(share: float, input_seconds: float) -> float:
    """Returns the scan time t/(1 − s) whose image is as good as the restored one; infinite from s = 1 on."""
    return input_seconds / (1 - share) if share < 1 else math.inf


def oracle(image: Array, noise_free: Array, input_seconds: float, target_seconds: float) -> Array:
    """Returns the estimate of the target with the least MSE, E[PET_T | PET_t, λ] = (t·PET_t + (T − t)·λ) / T."""
    check_seconds(input_seconds, target_seconds)
    weight = input_seconds / target_seconds
    return np.asarray(weight * image + (1 - weight) * noise_free)


def implied_truth(restored: Array, image: Array, input_seconds: float, target_seconds: float) -> Array:
    """Returns the activity that a restored image claims, (T·PET_r − t·PET_t) / (T − t): `oracle` solved for λ."""
    check_seconds(input_seconds, target_seconds)
    remaining = target_seconds - input_seconds
    return np.asarray((target_seconds * restored - input_seconds * image) / remaining)


def ssim_ceiling(
    image: Array, noise_free: Array, target: Array, mask: Mask, *, data_range: float = SSIM_RANGE
) -> tuple[float, float]:
    """Returns the least 1 − SSIM that a blend w·PET_t + (1 − w)·λ reaches against the target, and its w.

    The MSE's oracle is not the SSIM's: SSIM punishes missing noise harder.
    """
    from scipy.optimize import minimize_scalar

    def distance(weight: float) -> float:
        blend = weight * image + (1 - weight) * noise_free
        return ssim_distance(blend, target, mask, data_range=data_range)

    best = minimize_scalar(distance, bounds=(0, 1), method="bounded", options={"xatol": 0.02})
    # The bounded search never looks at the ends, and the unrestored input is one.
    return min((float(best.fun), float(best.x)), (distance(1.0), 1.0))
