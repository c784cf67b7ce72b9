# SPDX-License-Identifier: Apache-2.0
"""Adds random hot and cold lesions to a phantom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Hot lesions have at least this contrast to their host, cold ones such a share of its uptake.
_LEAST_CONTRAST = 1.6
_COLD_SHARE_OF_HOST = (0.1, 0.5)
# Large hot lesions may have a core without uptake.
_CORE_DIAMETER, _CORE_PROBABILITY, _CORE_SIZE, _CORE_UPTAKE = 25.0, 0.3, 0.5, 0.3
_GAP = 6.0  # mm between lesions, and to the body's surface at least 2 mm
_SURFACE_GAP = 2.0
_ATTEMPTS = 60
_SUPERSAMPLING = 4
_LESION_HU = 40.0
_LUMPINESS = 0.08


@dataclass(frozen=True)
class LesionConfig:
    """Holds the statistics of lesions.

    Args:
        count: least and greatest number.
        diameter: diameter of the sphere of equal volume, mm; drawn log-uniformly.
        suv: SUV of hot lesions, drawn log-uniformly, but at least 1.6 times the host's uptake.
        cold_share: probability that a lesion is cold (10-50 % of its host's uptake).
        elongation: greatest ratio of longest to shortest axis.
        hosts: relative frequency of organs that hot lesions lie in; muscle stands for lymph nodes and soft
            tissue.
        cold_hosts: the same for cold lesions.
    """

    count: tuple[int, int] = (4, 12)
    diameter: tuple[float, float] = (6.0, 40.0)
    suv: tuple[float, float] = (3.0, 15.0)
    cold_share: float = 0.15
    elongation: float = 1.3
    hosts: Mapping[str, float] = field(
        default_factory=lambda: {"lung": 0.3, "liver": 0.2, "muscle": 0.35, "bone": 0.15}
    )
    cold_hosts: Mapping[str, float] = field(default_factory=lambda: {"liver": 0.7, "spleen": 0.15, "brain": 0.15})


def add_lesions(
    activity: np.ndarray,
    ct: np.ndarray,
    organs: np.ndarray,
    lumps: np.ndarray,
    spacing: Sequence[float],
    config: LesionConfig,
    organ_names: Mapping[str, int],
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Paints lesions into ``activity`` (SUV) and ``ct`` (HU), in place; all arrays (i, j, k).

    Args:
        organs: label map, 0 outside the body.
        lumps: standard normal random field; lesions get 8 % of it.
        spacing: voxel size, mm.
        organ_names: organ -> label.

    Returns:
        Instance labels (uint16) and a table with one row per lesion, row n for label n + 1.
    """
    from scipy.ndimage import distance_transform_edt

    steps = np.asarray(spacing, dtype=float)
    depth = distance_transform_edt(organs > 0, sampling=steps)  # mm to the nearest voxel outside
    labels = np.zeros(organs.shape, dtype=np.uint16)
    table: list[dict[str, Any]] = []
    placed: list[tuple[np.ndarray, float]] = []  # centre in mm, radius
    for _ in range(int(rng.integers(config.count[0], config.count[1] + 1))):
        cold = bool(rng.random() < config.cold_share)
        diameter = _log_uniform(rng, config.diameter)
        ratios = rng.uniform(1.0, config.elongation, size=3)
        semi_axes = diameter / 2 * ratios / np.cbrt(np.prod(ratios))
        place = _place(
            rng,
            organs,
            depth,
            steps,
            config.cold_hosts if cold else config.hosts,
            organ_names,
            semi_axes.max(),
            placed,
        )
        if place is None:
            continue
        host, centre = place
        host_suv = float(activity[organs == organ_names[host]].mean())
        if cold:
            suv = host_suv * rng.uniform(*_COLD_SHARE_OF_HOST)
        else:
            suv = max(_log_uniform(rng, config.suv), _LEAST_CONTRAST * host_suv)
        rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        cover, box = _ellipsoid(organs.shape, steps, centre, semi_axes, rotation)
        core = not cold and diameter >= _CORE_DIAMETER and bool(rng.random() < _CORE_PROBABILITY)
        values = suv * np.exp(_LUMPINESS * lumps[box] - _LUMPINESS**2 / 2)
        if core:
            core_cover, core_box = _ellipsoid(organs.shape, steps, centre, _CORE_SIZE * semi_axes, rotation)
            inner = np.zeros(organs.shape, dtype=np.float32)
            inner[core_box] = core_cover
            values = values * (1.0 - (1.0 - _CORE_UPTAKE) * inner[box])
        activity[box] += cover * (values - activity[box])
        ct[box] += cover * (_LESION_HU - ct[box])
        # A lesion smaller than a voxel fills none by half: it is given the voxel that it fills most.
        labels[box][cover >= min(0.5, float(cover.max()))] = len(table) + 1
        placed.append((centre, float(semi_axes.max())))
        table.append(
            {
                "label": len(table) + 1,
                "kind": "cold" if cold else "hot",
                "organ": host,
                "diameter_mm": round(float(diameter), 2),
                "suv": round(float(suv), 3),
                "core": core,
            }
        )
    return labels, table


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def _place(
    rng: np.random.Generator,
    organs: np.ndarray,
    depth: np.ndarray,
    steps: np.ndarray,
    hosts: Mapping[str, float],
    organ_names: Mapping[str, int],
    radius: float,
    placed: Sequence[tuple[np.ndarray, float]],
) -> tuple[str, np.ndarray] | None:
    """Finds a host and a centre (mm), inside the body and away from the others; returns None if it finds none."""
    for _ in range(_ATTEMPTS):
        weights = np.array(list(hosts.values()))
        host = str(rng.choice(list(hosts), p=weights / weights.sum()))
        candidates = np.flatnonzero((organs == organ_names[host]) & (depth > radius + _SURFACE_GAP))
        if not candidates.size:
            continue
        index = np.array(np.unravel_index(rng.choice(candidates), organs.shape))
        centre = (index + rng.uniform(-0.5, 0.5, size=3)) * steps
        last = (np.array(organs.shape) - 1) * steps
        if np.any(centre - radius < 0) or np.any(centre + radius > last):
            continue
        if all(np.linalg.norm(centre - other) > radius + other_radius + _GAP for other, other_radius in placed):
            return host, centre
    return None


def _ellipsoid(
    shape: tuple[int, ...], steps: np.ndarray, centre: np.ndarray, semi_axes: np.ndarray, rotation: np.ndarray
) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Returns the share of each voxel inside a rotated ellipsoid, and the box of voxels that the shares belong to;
    lengths in mm."""
    reach = float(semi_axes.max())
    low = np.maximum(np.floor((centre - reach) / steps).astype(int), 0)
    high = np.minimum(np.ceil((centre + reach) / steps).astype(int) + 1, shape)
    sub = (np.arange(_SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - 0.5
    axes = [
        (np.add.outer(np.arange(a, b), sub).ravel() * step - mid)
        for a, b, step, mid in zip(low, high, steps, centre, strict=True)
    ]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) @ rotation  # (…, 3)
    inside = (np.square(points / semi_axes).sum(axis=-1) <= 1.0).astype(np.float32)
    n = high - low
    s = _SUPERSAMPLING
    cover = inside.reshape(n[0], s, n[1], s, n[2], s).mean(axis=(1, 3, 5))
    return cover, tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
