# SPDX-License-Identifier: Apache-2.0
"""Measures the resolution of a restoration by local perturbation: how it changes a small blob added to a PET.

A restoration need not be linear, so it has no one point-spread function. But at a place in a patient's image the
difference between restoring with and without a faint point source is a response (the local impulse response of
Fessler and Rogers 1996), whose width, height and sum say how much detail and how much uptake is kept there. The blob
is as wide as the reconstruction's own resolution, as a real point source would be. It has no noise of its own, and
with a small `amplitude` it is fainter than the structures that a method learnt to keep or to remove: so the answer
holds for that amplitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medaccel.restoration.evaluation.metrics import Array, Mask, check_spacing, check_volumes

FWHM_PER_SIGMA = 2.3548  # 2·sqrt(2·ln 2)
REACH = 4.0  # FWHM of the blob, to each side: the response is measured within this cube
DEPTH = 1.5  # FWHM of the blob: positions lie so far inside the mask, where the body's edge has no influence


@dataclass(frozen=True)
class PointResponse:
    """Describes what became of one blob.

    Attributes:
        position: (i, j, k) of its centre, a voxel.
        background: SUV there, the mean over the mask within one FWHM.
        added: SUV at its peak.
        added_fwhm: FWHM of the blob, mm.
        fwhm: FWHM along (i, j, k), mm, of the Gaussian fitted to the response; NaN if none fits, for instance without
            any response.
        peak: the response's highest value / the blob's.
        total: the response's sum / the blob's: the part of the uptake that is kept.
        explained: the part of the response's squares that the fitted Gaussian explains: 1 if it is one.
    """

    position: tuple[int, int, int]
    background: float
    added: float
    added_fwhm: float
    fwhm: tuple[float, float, float]
    peak: float
    total: float
    explained: float


@dataclass(frozen=True)
class ResponseSummary:
    """Holds medians over blobs; blobs that no Gaussian fits drop out of `fwhm` and `explained`.

    Attributes:
        count: number of blobs; `fitted` of them have a width.
        added_fwhm: FWHM of the blob, mm.
        amplitude: peak of the blob over its background.
        fwhm: FWHM along (i, j, k), mm.
        peak, total, explained: see `PointResponse`.
    """

    count: int
    fitted: int
    added_fwhm: float
    amplitude: float
    fwhm: tuple[float, float, float]
    peak: float
    total: float
    explained: float

    def flat(self) -> dict[str, Any]:
        """Returns a flat row for CSV and JSON, with `fwhm_i`, `fwhm_j`, `fwhm_k`."""
        row = asdict(self)
        return row | dict(zip(("fwhm_i", "fwhm_j", "fwhm_k"), row.pop("fwhm"), strict=True))


def point_response(
    restore: Callable[[Array], Array],
    volume: Array,
    mask: Mask,
    spacing: tuple[float, float, float],
    *,
    amplitude: float,
    fwhm_mm: float,
    positions: Sequence[tuple[int, int, int]] | None = None,
    count: int = 8,
    seed: int = 0,
    together: bool = False,
) -> list[PointResponse]:
    """Adds a Gaussian blob at several places, one at a time, and measures the restoration's response to each.

    The width is that of an axis-aligned 3-D Gaussian fitted by least squares; second moments would drown in faint
    tails and lobes. The blob is sampled at voxel centres.

    Args:
        restore: (i, j, k) SUV, float32, to the restored volume; it must give the same for the same input, so a
            method that draws samples gets a fixed seed. It is called once, and once more per blob.
        volume: the PET to be restored, SUV.
        mask: the body.
        spacing: voxel size, mm.
        amplitude: the blob's peak over the background around it.
        fwhm_mm: FWHM of the blob, mm: the reconstruction's resolution.
        positions: voxels; None: `blob_positions`.
        count, seed: number and seed of the drawn positions.
        together: put all blobs into one volume, which needs two calls of `restore` in all, for slow methods; this is
            right if the response at one place doesn't depend on a blob at another.

    Raises:
        ValueError: `metrics` would refuse shapes, mask or values; amplitude or fwhm_mm is not positive; a position is
            outside the mask, without uptake, or too close to another that shares its volume; no position is found;
            `restore` returns another shape, NaN or infinity.
    """
    check_volumes(mask, volume=volume)
    check_spacing(spacing)
    if not (math.isfinite(amplitude) and amplitude > 0):
        raise ValueError(f"amplitude is {amplitude}; expected a positive multiple of the background")
    _check_width(fwhm_mm)
    if positions is None:
        positions = blob_positions(volume, mask, spacing, fwhm_mm=fwhm_mm, count=count, seed=seed)
    elif not len(positions):
        raise ValueError("positions is empty; expected at least one voxel, or None to draw some")
    elif together:
        _check_apart(positions, spacing, fwhm_mm)
    # The image is float32, as methods expect it, and as the sum with a blob will be: rounding then cancels in the
    # difference.
    image = np.asarray(volume, dtype=np.float32)
    blobs = []
    for position in positions:
        background = _background(image, mask, position, spacing, fwhm_mm)
        blobs.append((position, background, _blob(image.shape, position, spacing, fwhm_mm, amplitude * background)))
    before = _restored(restore, image)
    after_all = _restored(restore, image + np.sum([blob for *_, blob in blobs], axis=0)) if together else None
    responses = []
    for position, background, blob in blobs:
        after = _restored(restore, image + blob) if after_all is None else after_all
        responses.append(_measured(after - before, blob, position, background, spacing, fwhm_mm))
    return responses


def summarize_responses(responses: Sequence[PointResponse]) -> ResponseSummary:
    """Returns medians over blobs of one width, in one study or in several.

    Raises:
        ValueError: there are no responses, or blobs of several widths.
    """
    if not responses:
        raise ValueError("summarize_responses got no responses; expected at least one")
    widths = sorted({response.added_fwhm for response in responses})
    if len(widths) > 1:
        raise ValueError(f"responses are to blobs of {widths} mm FWHM; expected one width")
    fitted = [(*response.fwhm, response.explained) for response in responses if math.isfinite(response.explained)]
    i, j, k, explained = np.median(fitted, axis=0).tolist() if fitted else (math.nan,) * 4
    return ResponseSummary(
        count=len(responses),
        fitted=len(fitted),
        added_fwhm=widths[0],
        amplitude=float(np.median([response.added / response.background for response in responses])),
        fwhm=(i, j, k),
        peak=float(np.median([response.peak for response in responses])),
        total=float(np.median([response.total for response in responses])),
        explained=explained,
    )


def blob_positions(
    volume: Array,
    mask: Mask,
    spacing: tuple[float, float, float],
    *,
    fwhm_mm: float,
    count: int = 8,
    seed: int = 0,
) -> list[tuple[int, int, int]]:
    """Draws random voxels with uptake, 1.5 FWHM inside the mask and so far apart that responses don't overlap.

    Returns:
        `count` voxels, or fewer if the body has no room for more.

    Raises:
        ValueError: no such voxel is found; count is below 1.
    """
    from scipy import ndimage

    check_volumes(mask, volume=volume)
    check_spacing(spacing)
    _check_width(fwhm_mm)
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one blob")
    # The mask is padded: a body that the field of view cuts has an edge there too.
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    candidates = np.argwhere((depth > DEPTH * fwhm_mm) & (volume > 0))
    if not len(candidates):
        raise ValueError(
            f"mask has no voxel with uptake that is {DEPTH * fwhm_mm:g} mm inside it; expected room for a blob of "
            f"{fwhm_mm:g} mm FWHM"
        )
    generator = np.random.default_rng(seed)
    found: list[tuple[int, int, int]] = []
    while len(candidates) and len(found) < count:
        i, j, k = (int(index) for index in candidates[generator.integers(len(candidates))])
        found.append((i, j, k))
        distance = np.abs((candidates - (i, j, k)) * spacing).max(axis=1)
        candidates = candidates[distance >= 2 * REACH * fwhm_mm]
    return found


def _measured(
    difference: Array,
    blob: Array,
    position: tuple[int, int, int],
    background: float,
    spacing: tuple[float, float, float],
    fwhm_mm: float,
) -> PointResponse:
    window = _window(difference.shape, position, spacing, fwhm_mm)
    response = difference[window].astype(np.float64)
    added = float(blob[position])
    fwhm, explained = _gaussian_fit(response, _millimetres(window, position, spacing), fwhm_mm, float(min(spacing)))
    return PointResponse(
        position=position,
        background=background,
        added=added,
        added_fwhm=fwhm_mm,
        fwhm=fwhm,
        peak=float(response.max()) / added,
        total=float(response.sum()) / float(blob[window].sum(dtype=np.float64)),
        explained=explained,
    )


def _gaussian_fit(
    response: NDArray[np.float64], points: list[NDArray[np.float64]], fwhm_mm: float, voxel: float
) -> tuple[tuple[float, float, float], float]:
    """Returns the FWHM along the axes in mm, and the explained part of the squares; NaN if no Gaussian fits.

    Args:
        points: each axis's voxel centres, relative to the blob's, mm.
        voxel: the shortest side of a voxel, mm.
    """
    from scipy.optimize import least_squares

    nothing = (math.nan, math.nan, math.nan), math.nan
    height = float(response.max())
    squares = float((response**2).sum())
    if not height > 0:
        return nothing

    def gaussian(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        """Evaluates a Gaussian with height (relative to the response's), centre (3) in mm, log σ (3)."""
        i, j, k = (
            np.exp(-((x - centre) ** 2) / (2 * math.exp(2 * log_sigma)))
            for x, centre, log_sigma in zip(points, parameters[1:4], parameters[4:], strict=True)
        )
        return np.asarray(height * parameters[0] * i[:, None, None] * j[:, None] * k)

    narrowest, widest = math.log(voxel / 10), math.log(REACH * fwhm_mm)
    low = np.array([0.0, *[-fwhm_mm] * 3, *[narrowest] * 3])
    high = np.array([10.0, *[fwhm_mm] * 3, *[widest] * 3])
    start = np.array([1.0, 0.0, 0.0, 0.0, *[math.log(fwhm_mm / FWHM_PER_SIGMA)] * 3])
    fit = least_squares(lambda x: ((gaussian(x) - response) / height).ravel(), start, bounds=(low, high))
    widths = fit.x[4:]
    # A fit at a bound has no width: the response has one voxel, or fills the window.
    if not fit.success or widths.min() < narrowest + 0.01 or widths.max() > widest - 0.01:
        return nothing
    i, j, k = (FWHM_PER_SIGMA * math.exp(width) for width in widths)
    return (i, j, k), 1 - 2 * float(fit.cost) * height**2 / squares


def _restored(restore: Callable[[Array], Array], image: Array) -> Array:
    """Returns a copy of the restored image, since a method may reuse its own buffer."""
    restored = np.array(restore(image.copy()), dtype=np.float64)
    if restored.shape != image.shape or not np.isfinite(restored).all():
        raise ValueError(
            f"restore returned shape {restored.shape} with {int((~np.isfinite(restored)).sum())} voxels NaN or "
            f"infinite; expected finite SUV of shape {image.shape}"
        )
    return restored


def _blob(
    shape: tuple[int, ...],
    position: tuple[int, int, int],
    spacing: tuple[float, float, float],
    fwhm_mm: float,
    peak: float,
) -> Array:
    window = _window(shape, position, spacing, fwhm_mm)
    i, j, k = (np.exp(-(x**2) / 2 * (FWHM_PER_SIGMA / fwhm_mm) ** 2) for x in _millimetres(window, position, spacing))
    blob = np.zeros(shape, dtype=np.float32)
    blob[window] = peak * i[:, None, None] * j[:, None] * k
    return blob


def _background(
    volume: Array, mask: Mask, position: tuple[int, int, int], spacing: tuple[float, float, float], fwhm_mm: float
) -> float:
    if not all(0 <= p < n for p, n in zip(position, mask.shape, strict=True)) or not mask[position]:
        raise ValueError(f"position {tuple(position)} is not inside the mask of shape {mask.shape}")
    box = tuple(
        slice(max(p - round(fwhm_mm / s), 0), p + round(fwhm_mm / s) + 1)
        for p, s in zip(position, spacing, strict=True)
    )
    background = float(volume[box][mask[box]].mean(dtype=np.float64))
    if not background > 0:
        raise ValueError(f"position {tuple(position)} has a background of {background:g} SUV; expected uptake")
    return background


def _window(
    shape: tuple[int, ...], position: tuple[int, int, int], spacing: tuple[float, float, float], fwhm_mm: float
) -> tuple[slice, ...]:
    reach = [math.ceil(REACH * fwhm_mm / s) for s in spacing]
    return tuple(slice(max(p - r, 0), min(p + r + 1, n)) for p, r, n in zip(position, reach, shape, strict=True))


def _millimetres(
    window: tuple[slice, ...], position: tuple[int, int, int], spacing: tuple[float, float, float]
) -> list[NDArray[np.float64]]:
    """Returns each axis's voxel centres in the window, relative to the position."""
    return [(np.arange(w.start, w.stop) - p) * s for w, p, s in zip(window, position, spacing, strict=True)]


def _check_width(fwhm_mm: float) -> None:
    if not (math.isfinite(fwhm_mm) and fwhm_mm > 0):
        raise ValueError(f"fwhm_mm is {fwhm_mm}; expected a positive width in mm")


def _check_apart(
    positions: Sequence[tuple[int, int, int]], spacing: tuple[float, float, float], fwhm_mm: float
) -> None:
    points = np.asarray(positions) * np.asarray(spacing)
    distance = np.abs(points[:, None] - points).max(axis=2)  # (count, count)
    distance[np.diag_indices(len(points))] = math.inf
    if distance.min() < 2 * REACH * fwhm_mm:
        raise ValueError(
            f"positions are {distance.min():g} mm apart along their furthest axis; expected at least "
            f"{2 * REACH * fwhm_mm:g} mm, eight FWHM, or together=False"
        )
