# SPDX-License-Identifier: Apache-2.0
"""Paints varied people for the training of a model that is to serve many patients.

There are three kinds: phantoms of the ``standard`` generator, phantoms whose bodies, uptakes, textures and lesions
are drawn far more widely, with further structures at random, and bodies filled with random shapes ("dead leaves",
Lee et al. 2001), which know no anatomy at all. Nothing here is taken from the ``shifted`` generator, which test
studies are made with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from medaccel.phantoms.painting import random_field
from medaccel.phantoms.pet import GENERATORS
from medaccel.phantoms.pet_anatomy import HU, ORGANS, Painter, PhantomConfig, Range
from medaccel.phantoms.pet_lesions import LesionConfig, add_lesions

#: The kinds of people, and how often each is drawn.
KINDS: Mapping[str, float] = {"standard": 0.25, "varied": 0.45, "leaves": 0.3}
_MOST_VOXELS = 800_000
_HEIGHT: Range = (-430.0, 445.0)  # a person reaches from here to there, mm

_UPTAKES: dict[str, Range] = {
    "fat": (0.1, 0.6),
    "muscle": (0.3, 1.5),
    "bone": (0.4, 4.0),
    "skull": (0.2, 1.5),
    "lung": (0.15, 0.9),
    "liver": (1.0, 5.0),
    "spleen": (0.8, 5.0),
    "kidney": (1.0, 8.0),
    "blood": (0.7, 3.0),
    "myocardium": (0.8, 15.0),
    "bowel": (0.4, 7.0),
    "bladder": (1.0, 60.0),
    "brain": (2.0, 16.0),
}


def _log_uniform(rng: np.random.Generator, bounds: Range) -> float:
    return float(np.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1]))))


def _part(rng: np.random.Generator, bounds: Range) -> Range:
    """Draws one value log-uniformly, as a range: a person has one."""
    value = _log_uniform(rng, bounds)
    return value, value


def _person(rng: np.random.Generator) -> PhantomConfig:
    width = float(rng.uniform(115, 200))
    lumps = _log_uniform(rng, (0.3, 2.0))  # a person is smooth or rough throughout, and organs differ
    lumpiness = {tissue: float(np.clip(lumps * _log_uniform(rng, (0.015, 0.25)), 0.0, 0.35)) for tissue in _UPTAKES}
    size = _log_uniform(rng, (3.5, 14.0))
    return PhantomConfig(
        half_width=(width, width),
        half_depth=_scaled(float(rng.uniform(0.55, 0.8)), width),
        exponent=(1.8, 3.6),
        fat=(3.0, 0.25 * width),
        organ_scale=(0.8, 1.18),
        deformation=float(rng.uniform(2.0, 8.0)),
        uptake={
            tissue: _part(rng, bounds) if tissue != "bowel" else (bounds[0], _log_uniform(rng, (0.8, bounds[1])))
            for tissue, bounds in _UPTAKES.items()
        },
        lumpiness=lumpiness,
        lump_size=(size, size),
        lesions=LesionConfig(
            count=(0, 24),
            diameter=(5.0, float(rng.uniform(15.0, 50.0))),
            suv=(1.5, float(rng.uniform(5.0, 35.0))),
            cold_share=float(rng.uniform(0.0, 0.4)),
            elongation=float(rng.uniform(1.0, 2.5)),
        ),
    )


def _scaled(factor: float, value: float) -> Range:
    return factor * value, factor * value


class _VariedPainter(Painter):
    """Shows any part of the person, and paints further shapes at random."""

    def _window(self, length: float) -> tuple[str, float]:
        return "any", float(self.rng.uniform(_HEIGHT[0] - 0.2 * length, _HEIGHT[1] - 0.8 * length))

    def leaves(self, count: int, sizes: Range, alone: bool) -> None:
        """Paints rotated ellipsoids and tubes, with random uptakes or their place's (not `alone`)."""
        rng = self.rng
        self.fine_lumps = self._field(self.activity.shape, _log_uniform(rng, (2.5, 6.0)))
        for size in sorted((_log_uniform(rng, sizes) for _ in range(count)), reverse=True):
            self._leaf(size, alone)

    def _leaf(self, size: float, alone: bool) -> None:
        rng = self.rng
        axes = (self.x, self.y, self.z)
        reach = (self.half_width, self.half_depth)
        centre = np.array(
            [*(float(rng.uniform(-0.95 * r, 0.95 * r)) for r in reach), float(rng.uniform(self.z[0], self.z[-1]))]
        )
        ratios = np.exp(rng.uniform(-0.7, 0.7, size=3))
        if rng.random() < 0.2:
            ratios[rng.integers(3)] *= 4.0  # a vessel, a loop of bowel, a muscle
        semi = size / 2 * ratios / np.cbrt(np.prod(ratios))
        far = float(semi.max()) + 2.0 * self.edge
        box = []
        for axis, mid in zip(axes, centre, strict=True):
            near = np.flatnonzero(np.abs(axis - mid) < far)
            if not near.size:
                return
            box.append(slice(int(near[0]), int(near[-1]) + 1))
        region = (box[0], box[1], box[2])
        rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0].astype(np.float32)
        offsets = [self.position[a][region] - np.float32(centre[a]) for a in range(3)]
        exponent = float(rng.uniform(1.6, 4.0))
        radius = np.zeros_like(offsets[0])
        for column in range(3):
            along = sum(offsets[a] * rotation[a, column] for a in range(3))
            radius += np.abs(along / np.float32(semi[column])) ** np.float32(exponent)
        radius **= np.float32(1.0 / exponent)
        width = float(np.sqrt(np.prod(np.sort(semi)[:2])))
        softness = self.edge * (1.0 if rng.random() < 0.7 else float(rng.uniform(1.0, 5.0)))
        cover = np.clip(0.5 + (1.0 - radius) * width / softness, 0.0, 1.0) * self.interior[region]
        if alone:
            suv = float(np.exp(rng.normal(0.0, 0.8)))
            if size < 60 and rng.random() < 0.08:
                suv *= _log_uniform(rng, (3.0, 20.0))
        else:
            inside = cover > 0.5
            if not inside.any():
                return
            suv = float(self.activity[region][inside].mean()) * _log_uniform(rng, (0.3, 3.0))
        lumpiness = _log_uniform(rng, (0.01, 0.3))
        field = self.lumps if rng.random() < 0.6 else self.fine_lumps
        values = np.float32(suv) * np.exp(lumpiness * field[region] - lumpiness**2 / 2)
        self.activity[region] += cover * (values - self.activity[region])
        if alone:
            tissue = str(rng.choice(["fat", "muscle", "bone", "lung"], p=[0.25, 0.55, 0.1, 0.1]))
            self.ct[region] += cover * (HU[tissue] - self.ct[region])
            # Lesions look for their hosts among the organs.
            self.organs[region][cover > 0.5] = ORGANS[tissue]

    def outline(self) -> None:
        """Paints a body that is a torso, a pair of legs, or a head, bent at random."""
        rng = self.rng
        x, y, _ = self.position
        shape = rng.random()
        cover = np.zeros_like(x)
        bend = 12.0 * self._field((len(self.z),), 60.0, 1)
        centres = [-0.52 * self.half_width, 0.52 * self.half_width] if shape < 0.15 else [0.0]
        a = self.half_width * (0.46 if shape < 0.15 else 1.0)
        b = self.half_depth * (0.7 if shape < 0.15 else 1.0)
        for centre in centres:
            radius = (np.abs((x - centre - bend) / a) ** self.exponent + np.abs(y / b) ** self.exponent) ** (
                1.0 / self.exponent
            )
            cover = np.maximum(cover, np.clip(0.5 + (1.0 - radius) * math.sqrt(a * b) / self.edge, 0.0, 1.0))
        self._blend("fat", cover.astype(np.float32), (slice(None),) * 3)
        self.interior = cover.astype(np.float32)

    def _field(self, shape: tuple[int, ...], sigma: float, axes: int = 3) -> np.ndarray:
        return random_field(shape, self.spacing[-axes:], sigma, self.rng)


def paint_varied(
    kind: str, spacing: tuple[float, float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws and paints a person of one of the `KINDS`; returns the activity (SUV) and the CT (HU)."""
    person = GENERATORS["standard"] if kind == "standard" else _person(rng)
    if kind == "standard":
        plane = [384.0, 288.0]
    else:
        if kind == "leaves":
            width = float(rng.uniform(70, 195))
            person = replace(
                person, half_width=(width, width), half_depth=_scaled(float(rng.uniform(0.55, 1)), width)
            )
        plane = [2.0 * 1.02 * person.half_width[1] + 30.0, 2.0 * person.half_depth[1] + 30.0]
    n_i, n_j = (math.ceil(side / step) for side, step in zip(plane, spacing[:2], strict=True))
    length = 448.0 if kind == "standard" else float(rng.uniform(180.0, 460.0))
    n_k = int(np.clip(length / spacing[2], 24, max(_MOST_VOXELS // (n_i * n_j), 24)))
    painter = _VariedPainter((n_i, n_j, n_k), spacing, person, rng)
    if kind == "leaves":
        painter.outline()
        volume = 8.0 * painter.half_width * painter.half_depth * n_k * spacing[2]
        painter.leaves(int(rng.uniform(0.5, 2.0) * 60 * volume / 25e6) + 10, (25.0, 140.0), alone=True)
        painter.leaves(int(rng.uniform(0.3, 2.0) * 120 * volume / 25e6), (5.0, 40.0), alone=True)
    else:
        painter.body()
        painter.abdomen()
        painter.chest()
        painter.upper_abdomen()
        painter.head()
        if kind == "varied":
            painter.leaves(int(rng.integers(0, 60)), (5.0, 60.0), alone=False)
    add_lesions(painter.activity, painter.ct, painter.organs, painter.lumps, spacing, person.lesions, ORGANS, rng)
    return painter.activity, painter.ct
