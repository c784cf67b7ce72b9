# SPDX-License-Identifier: Apache-2.0
"""Measures one segmented structure: overlap, surfaces, volume, lesions found, boundary and interior.

Dice, Hausdorff distance and surface Dice are MONAI's. Values for empty masks are defined here: if both are empty,
overlaps are 1 and distances 0; if one is, overlaps are 0 and distances the length of the volume's diagonal, the worst
possible. Lesions are 26-connected components.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import ndimage

# Surface Dice tolerates this distance, and the boundary's band has this half-width, mm.
TOLERANCE_MM = 3.0
BAND_MM = 6.0
_CONNECTED = np.ones((3, 3, 3), dtype=int)


@dataclass(frozen=True)
class CaseScores:
    """Holds the scores of one structure in one case.

    Args:
        dice: overlap, 0 to 1.
        hausdorff95_mm: 95th percentile of the distances between the surfaces, the larger of both directions.
        surface_dice: share of both surfaces within the tolerance of each other.
        volume_ml, predicted_ml, volume_error_ml: true, predicted, and predicted less true.
        boundary_dice: Dice within the band around the true surface: spatial sensitivity.
        interior_dice: Dice elsewhere: smoothness, islands and holes.
        lesions, lesions_found: true components, and those that the prediction touches.
        false_positives: predicted components that touch no true one.
    """

    dice: float
    hausdorff95_mm: float
    surface_dice: float
    volume_ml: float
    predicted_ml: float
    volume_error_ml: float
    boundary_dice: float
    interior_dice: float
    lesions: int
    lesions_found: int
    false_positives: int

    def plain(self) -> dict[str, float]:
        """Returns the scores by name, for tables."""
        return asdict(self)


def score_case(
    predicted: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    *,
    tolerance: float = TOLERANCE_MM,
    band: float = BAND_MM,
) -> CaseScores:
    """Compares two masks.

    Args:
        predicted, truth: (i, j, k), boolean or 0 and 1, of one structure.
        spacing: voxel size, mm.
        tolerance: distance that surface Dice tolerates, mm.
        band: half-width of the boundary's band, mm; a voxel's largest side at least.

    Raises:
        ValueError: shapes differ or don't have three axes, values beside 0 and 1 occur, or spacing is out of range.
    """
    p, t = (_mask(name, array) for name, array in (("predicted", predicted), ("truth", truth)))
    if p.shape != t.shape:
        raise ValueError(f"predicted has shape {p.shape}; expected the truth's, {t.shape}")
    steps = [float(step) for step in spacing]
    if len(steps) != 3 or not all(0 < step < np.inf for step in steps):
        raise ValueError(f"spacing is {tuple(spacing)}; expected three numbers of mm above 0")
    if tolerance < 0 or not band > 0:
        raise ValueError(f"tolerance is {tolerance:g} and band {band:g}; expected mm, >= 0 and > 0")
    distance, surface = _surfaces(p, t, steps, tolerance)
    near = _near_surface(t, steps, band)
    millilitres = float(np.prod(steps)) / 1000
    true_parts, true_count = ndimage.label(t, _CONNECTED)
    predicted_parts, predicted_count = ndimage.label(p, _CONNECTED)
    touched = set(np.unique(predicted_parts[t])) - {0}
    return CaseScores(
        dice=dice(p, t),
        hausdorff95_mm=distance,
        surface_dice=surface,
        volume_ml=float(t.sum()) * millilitres,
        predicted_ml=float(p.sum()) * millilitres,
        volume_error_ml=(float(p.sum()) - float(t.sum())) * millilitres,
        boundary_dice=dice(p[near], t[near]),
        interior_dice=dice(p[~near], t[~near]),
        lesions=int(true_count),
        lesions_found=len(set(np.unique(true_parts[p])) - {0}),
        false_positives=int(predicted_count) - len(touched),
    )


def dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Returns 2·|A ∩ B| / (|A| + |B|) of boolean arrays of any shape; 1 if both are empty."""
    total = int(predicted.sum()) + int(truth.sum())
    return 1.0 if total == 0 else 2.0 * int((predicted & truth).sum()) / total


def largest_components(mask: np.ndarray, count: int = 1) -> np.ndarray:
    """Returns the largest 26-connected components of a boolean mask; of equal ones, the first.

    Raises:
        ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least 1")
    parts, found = ndimage.label(mask, _CONNECTED)
    if found <= count:
        return mask.astype(bool)
    sizes = np.bincount(parts.ravel())[1:]
    kept = np.argsort(-sizes, kind="stable")[:count] + 1
    return np.isin(parts, kept)


def component_voxels(mask: np.ndarray) -> list[int]:
    """Returns the voxels of each 26-connected component of a boolean mask, the largest first."""
    parts, _ = ndimage.label(mask, _CONNECTED)
    return sorted((int(count) for count in np.bincount(parts.ravel())[1:]), reverse=True)


def bland_altman(true_ml: Sequence[float], predicted_ml: Sequence[float]) -> Mapping[str, float]:
    """Measures the agreement of volumes: mean difference (predicted less true) and limits at ± 1.96 standard
    deviations, mL.

    Source: Bland and Altman, Lancet 1986.

    Raises:
        ValueError: there are fewer than two cases, or the numbers of cases differ.
    """
    if len(true_ml) != len(predicted_ml) or len(true_ml) < 2:
        raise ValueError(f"{len(true_ml)} true and {len(predicted_ml)} predicted volumes; expected two or more pairs")
    difference = np.asarray(predicted_ml, dtype=float) - np.asarray(true_ml, dtype=float)
    mean, deviation = float(difference.mean()), float(difference.std(ddof=1))
    return {"bias_ml": mean, "lower_ml": mean - 1.96 * deviation, "upper_ml": mean + 1.96 * deviation}


def _mask(name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 3:
        raise ValueError(f"{name} has shape {array.shape}; expected three axes")
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} holds values beside 0 and 1; expected the mask of one structure")
    return array.astype(bool)


def _surfaces(p: np.ndarray, t: np.ndarray, spacing: list[float], tolerance: float) -> tuple[float, float]:
    """Returns the Hausdorff distance (95 %), mm, and surface Dice."""
    if not p.any() and not t.any():
        return 0.0, 1.0
    if not p.any() or not t.any():
        return float(np.linalg.norm(np.multiply(p.shape, spacing))), 0.0
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    # Voxels far from both masks change nothing, and take most of the time.
    where = np.nonzero(p | t)
    box = tuple(slice(max(int(w.min()) - 1, 0), int(w.max()) + 2) for w in where)
    one_hot = [torch.from_numpy(np.stack([~m[box], m[box]])[None]).float() for m in (p, t)]
    with warnings.catch_warnings():
        # MONAI 1.6 warns of an argument that it passes itself.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
        distance = compute_hausdorff_distance(*one_hot, include_background=False, percentile=95, spacing=spacing)
        surface = compute_surface_dice(
            *one_hot, class_thresholds=[tolerance], include_background=False, spacing=tuple(spacing)
        )
    return float(distance), float(surface)


def _near_surface(truth: np.ndarray, spacing: list[float], band: float) -> np.ndarray:
    """Marks voxels whose centres lie within the band around the mask's surface; none without a mask.

    If voxels are larger than the band, one voxel on either side is marked: otherwise none would lie within.
    """
    if not truth.any() or truth.all():
        return np.zeros_like(truth)
    inside = ndimage.distance_transform_edt(truth, sampling=spacing)
    outside = ndimage.distance_transform_edt(~truth, sampling=spacing)
    return np.where(truth, inside, outside) <= max(band, *spacing)
