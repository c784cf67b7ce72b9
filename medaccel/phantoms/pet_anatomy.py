# SPDX-License-Identifier: Apache-2.0
"""Draws the anatomy of PET phantoms: the ranges of a person, and the painting of the organs.

A person has coordinates of its own in mm: x to the right, y to the front, z up, 0 near the liver's dome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medaccel.phantoms.painting import random_field, superellipsoid
from medaccel.phantoms.pet_lesions import LesionConfig

ORGANS = {
    "background": 0,
    "fat": 1,
    "muscle": 2,
    "bone": 3,
    "lung": 4,
    "liver": 5,
    "spleen": 6,
    "kidney": 7,
    "blood": 8,
    "myocardium": 9,
    "bowel": 10,
    "bladder": 11,
    "brain": 12,
}
HU = {
    "fat": -95.0,
    "muscle": 45.0,
    "bone": 250.0,
    "skull": 900.0,
    "lung": -740.0,
    "liver": 55.0,
    "spleen": 50.0,
    "kidney": 35.0,
    "blood": 42.0,
    "myocardium": 45.0,
    "bowel": 20.0,
    "bladder": 8.0,
    "brain": 36.0,
}

# Half-widths (x) and half-depths (y) of the body from pelvis to crown are shares of the torso's; z is in mm.
_PROFILE_Z = (-430, -330, -200, -60, 60, 150, 185, 205, 235, 265, 300, 360, 400, 425, 440)
_PROFILE_X = (0.97, 1.00, 0.90, 0.96, 0.98, 1.02, 0.94, 0.60, 0.36, 0.40, 0.46, 0.48, 0.42, 0.27, 0.0)
_PROFILE_Y = (0.95, 1.00, 0.93, 1.00, 1.00, 0.92, 0.78, 0.62, 0.54, 0.72, 0.84, 0.90, 0.80, 0.50, 0.0)
# The person ends here, mm.
_BOTTOM, _TOP = -430.0, 445.0
# The liver lies here, mm: every window but a head scan's holds it whole.
_LIVER_BOTTOM, _LIVER_TOP = -140.0, 20.0

# A person of nominal size has these half-axes, mm: torso to the skin, and within the fat.
_NOMINAL_OUTER = (155.0, 105.0)
_NOMINAL_INNER = (140.0, 90.0)
# The torso's width and fat end between shoulder and neck.
_SHOULDER, _NECK = 185.0, 235.0
_DEFORMATION_SIGMA = 35.0  # mm
_LUMPINESS = 0.15  # used if the configuration names none

Range = tuple[float, float]


@dataclass(frozen=True)
class PhantomConfig:
    """Holds the ranges that a person is drawn from, uniformly: lengths in mm, uptakes in SUV (g/mL).

    Args:
        half_width, half_depth: semi-axes of the torso.
        exponent: exponent of the torso's superellipse; 2 is an ellipse.
        fat: thickness under the skin.
        organ_scale: factor on organ sizes.
        deformation: standard deviation of the displacement field, mm.
        uptake: SUV per tissue.
        lumpiness: relative standard deviation of the uptake within a tissue; 0.15 for tissues that are not listed.
        lump_size: σ of the blur that makes the random field, mm.
        coverage: probabilities of the windows chest, pelvis and head.
        lesions: see `LesionConfig`.
    """

    half_width: Range = (142.0, 168.0)
    half_depth: Range = (95.0, 115.0)
    exponent: Range = (2.2, 2.8)
    fat: Range = (8.0, 22.0)
    organ_scale: Range = (0.92, 1.06)
    deformation: float = 3.5
    uptake: Mapping[str, Range] = field(
        default_factory=lambda: {
            "fat": (0.2, 0.35),
            "muscle": (0.5, 0.75),
            "bone": (1.0, 1.8),
            "skull": (0.4, 0.7),
            "lung": (0.35, 0.5),
            "liver": (1.8, 2.5),
            "spleen": (1.6, 2.2),
            "kidney": (2.4, 3.6),
            "blood": (1.3, 1.7),
            "myocardium": (2.0, 8.0),
            "bowel": (0.8, 2.8),
            "bladder": (10.0, 40.0),
            "brain": (6.0, 10.0),
        }
    )
    lumpiness: Mapping[str, float] = field(
        default_factory=lambda: {"liver": 0.04, "spleen": 0.05, "blood": 0.02, "bladder": 0.02, "brain": 0.12}
    )
    lump_size: Range = (5.0, 8.0)
    coverage: tuple[float, float, float] = (0.2, 0.4, 0.4)
    lesions: LesionConfig = field(default_factory=LesionConfig)


@dataclass
class Person:
    """Holds a painted person on a grid, before lesions; arrays (i, j, k).

    Args:
        z: height of each slice in the person's coordinates, mm.
        activity: SUV. ct: HU. organs: values of `ORGANS`.
        lumps: the random field of the uptake, standard normal.
        parameters: drawn values.
    """

    z: np.ndarray
    activity: np.ndarray
    ct: np.ndarray
    organs: np.ndarray
    lumps: np.ndarray
    parameters: dict[str, Any]


def paint_person(
    shape: tuple[int, ...], spacing: tuple[float, ...], config: PhantomConfig, rng: np.random.Generator
) -> Person:
    """Draws and paints a person on a grid of ``shape`` voxels of ``spacing`` mm."""
    painter = Painter(shape, spacing, config, rng)
    painter.body()
    painter.abdomen()
    painter.chest()
    painter.upper_abdomen()
    painter.head()
    return Person(painter.z, painter.activity, painter.ct, painter.organs, painter.lumps, painter.parameters)


class Painter:
    """Paints one person with soft-edged shapes, one over another within the body."""

    def __init__(
        self,
        shape: tuple[int, ...],
        spacing: tuple[float, ...],
        config: PhantomConfig,
        rng: np.random.Generator,
    ) -> None:
        self.config, self.rng, self.spacing = config, rng, spacing
        self.edge = float(np.mean(spacing))  # mm over which an edge fades: one voxel
        # Two voxels of air stay around the widest part, however narrow the grid.
        self.half_width = min(rng.uniform(*config.half_width), (shape[0] / 2 - 2) * spacing[0] / max(_PROFILE_X))
        self.half_depth = min(rng.uniform(*config.half_depth), (shape[1] / 2 - 2) * spacing[1])
        self.exponent = rng.uniform(*config.exponent)
        self.fat = rng.uniform(*config.fat)
        self.scale = rng.uniform(*config.organ_scale)
        # Organs fill the space inside the fat.
        self.stretch = (
            self.scale * (self.half_width - self.fat) / _NOMINAL_INNER[0],
            self.scale * (self.half_depth - self.fat) / _NOMINAL_INNER[1],
            self.scale,
        )
        self.uptake = {tissue: rng.uniform(*bounds) for tissue, bounds in config.uptake.items()}
        coverage, z_start = self._window(shape[2] * spacing[2])
        self.x = (np.arange(shape[0]) - (shape[0] - 1) / 2) * spacing[0]
        self.y = (np.arange(shape[1]) - (shape[1] - 1) / 2) * spacing[1]
        self.z = z_start + np.arange(shape[2]) * spacing[2]
        self.position = [
            (axis + config.deformation * self._field(shape, _DEFORMATION_SIGMA)).astype(np.float32)
            for axis in np.meshgrid(self.x, self.y, self.z, indexing="ij")
        ]  # deformed x, y, z of each voxel, mm
        self.lumps = self._field(shape, rng.uniform(*config.lump_size))
        self.activity = np.zeros(shape, dtype=np.float32)
        self.ct = np.full(shape, -1000.0, dtype=np.float32)
        self.organs = np.zeros(shape, dtype=np.uint8)
        self.interior = np.ones(shape, dtype=np.float32)
        self.parameters = {
            "coverage": coverage,
            "half_width_mm": self.half_width,
            "half_depth_mm": self.half_depth,
            "fat_mm": self.fat,
            "organ_scale": self.scale,
            "uptake_suv": dict(self.uptake),
        }

    def body(self) -> None:
        """Paints the body from skin to skin: fat, muscle within it, and the bones of the trunk."""
        x, y, _ = self.position
        heights = self.z  # the profile varies slowly: its height needs no deformation
        torso = np.interp(heights, [_SHOULDER, _NECK], [1.0, 0.0])
        nominal = self.scale * np.array(_NOMINAL_OUTER)
        half_x = np.interp(heights, _PROFILE_Z, _PROFILE_X) * (torso * self.half_width + (1 - torso) * nominal[0])
        half_y = np.interp(heights, _PROFILE_Z, _PROFILE_Y) * (torso * self.half_depth + (1 - torso) * nominal[1])
        fat = torso * self.fat + (1 - torso) * 3.0
        exponent = torso * self.exponent + (1 - torso) * 2.0
        whole = (slice(None),) * 3
        covers = []
        for margin in (np.zeros_like(fat), fat):
            a, b = np.maximum(half_x - margin, 1.0), np.maximum(half_y - margin, 1.0)
            radius = (np.abs(x / a) ** exponent + np.abs(y / b) ** exponent) ** (1.0 / exponent)
            cover = np.clip(0.5 + (1.0 - radius) * np.sqrt(a * b) / self.edge, 0.0, 1.0)
            covers.append((cover * (heights < _TOP)).astype(np.float32))
        self._blend("fat", covers[0], whole)
        self._blend("muscle", covers[1], whole)
        self.interior = covers[1]
        self.organ("bone", (0, -54, -100), (18, 17, 340), exponent=6.0)  # spine
        for side in (-1, 1):
            self.organ("bone", (side * 78, -18, -340), (24, 42, 58))  # pelvis

    def abdomen(self) -> None:
        """Paints bowel loops, kidneys and bladder."""
        for _ in range(int(self.rng.integers(8, 15))):
            centre = (self.rng.uniform(-90, 90), self.rng.uniform(-5, 55), self.rng.uniform(-285, -165))
            suv = self.rng.uniform(*self.config.uptake["bowel"])
            self.organ("bowel", centre, self.rng.uniform(12, 26, size=3), suv=suv)
        for side in (-1, 1):
            centre = (side * 58, -42, -140 + 8 * side + self.rng.uniform(-8, 8))
            self.organ("kidney", centre, (25, 23, 52))
            self.organ(
                "kidney",
                (centre[0] - 6 * side, centre[1] + 4, centre[2]),
                (8, 8, 18),
                suv=2.5 * self.uptake["kidney"],
            )
        fill = self.rng.uniform(0.75, 1.15)
        self.organ("bladder", (0, 15, -350), (40 * fill, 32 * fill, 32 * fill))

    def chest(self) -> None:
        """Paints lungs, aorta and heart."""
        for side in (-1, 1):
            self.organ("lung", (side * 70, 0, 82), (53, 70, 115), exponent=2.5)
        self.organ("blood", (-14, -30, -60), (11, 11, 215), exponent=6.0)  # aorta
        self.organ("blood", (-20, 24, 56), (48, 42, 48))
        self.organ("myocardium", (-42, 22, 48), (33, 31, 42))
        self.organ("blood", (-42, 22, 54), (21, 19, 33))

    def upper_abdomen(self) -> None:
        """Paints spleen, stomach and liver."""
        self.organ("spleen", (-94, -26, -58), (28, 26, 48))
        self.organ("bowel", (-56, 28, -62), (36, 30, 40), suv=self.rng.uniform(*self.config.uptake["bowel"]))
        self.organ("liver", (4, 32, -42), (60, 36, 36))
        self.organ("liver", (62, 4, -60), (62, 62, 70), exponent=2.3)

    def head(self) -> None:
        """Paints skull and brain: cortex, white matter, deep grey matter. A head is no wider in a wider body."""
        ratio = [self.scale / stretch for stretch in self.stretch]
        brain = self.uptake["brain"]

        def paint(tissue: str, centre: Sequence[float], semi: Sequence[float], organ: str, suv: float) -> None:
            scaled = [[value * r for value, r in zip(triple, ratio, strict=True)] for triple in (centre, semi)]
            self.organ(tissue, scaled[0], scaled[1], organ=organ, suv=suv)

        paint("skull", (0, 0, 352), (68, 86, 76), "bone", self.uptake["skull"])
        paint("brain", (0, 0, 352), (61, 79, 69), "brain", brain)
        paint("brain", (0, 0, 350), (44, 60, 48), "brain", 0.35 * brain)
        for side in (-1, 1):
            paint("brain", (side * 20, 5, 346), (13, 21, 16), "brain", 0.95 * brain)

    def organ(
        self,
        tissue: str,
        centre: Sequence[float],
        semi_axes: Sequence[float] | np.ndarray,
        *,
        organ: str | None = None,
        exponent: float = 2.0,
        suv: float | None = None,
    ) -> None:
        """Paints a superellipsoid, given in mm of a person of nominal size, with the tissue's uptake and CT
        number."""
        drawn = superellipsoid(
            self.position,
            (self.x, self.y, self.z),
            [float(value) * stretch for value, stretch in zip(centre, self.stretch, strict=True)],
            [float(value) * stretch for value, stretch in zip(semi_axes, self.stretch, strict=True)],
            exponent=exponent,
            margin=4.0 * self.config.deformation + self.edge,
            edge=self.edge,
        )
        if drawn is None:
            return  # outside the window
        region, cover = drawn
        self._blend(tissue, cover * self.interior[region], region, organ=organ, suv=suv)

    def _blend(
        self,
        tissue: str,
        cover: np.ndarray,
        region: tuple[slice, ...],
        *,
        organ: str | None = None,
        suv: float | None = None,
    ) -> None:
        lumpiness = self.config.lumpiness.get(tissue, _LUMPINESS)
        lumps = np.exp(lumpiness * self.lumps[region] - lumpiness**2 / 2)  # mean 1, > 0
        values = (self.uptake[tissue] if suv is None else suv) * lumps
        self.activity[region] += cover * (values - self.activity[region])
        self.ct[region] += cover * (HU[tissue] - self.ct[region])
        self.organs[region][cover > 0.5] = ORGANS[organ or tissue]

    def _window(self, length: float) -> tuple[str, float]:
        """Draws the part of the person that a grid of ``length`` mm shows: returns its name and the z of the first
        slice."""
        coverage = str(self.rng.choice(["chest", "pelvis", "head"], p=self.config.coverage))
        jitter = self.rng.uniform(0.0, 20.0)
        if length >= _TOP - _BOTTOM:
            return "whole body", (_TOP + _BOTTOM - length) / 2
        if coverage == "pelvis":  # down to the bladder, but up to the liver's dome
            return coverage, max(_BOTTOM + 20.0, _LIVER_TOP + jitter - length)
        if coverage == "head":  # up to the crown, but half of the liver stays in
            return coverage, min(_TOP - length, -60.0 - jitter)
        return coverage, min(max(_LIVER_BOTTOM - jitter - 20.0, _BOTTOM), _TOP - length)

    def _field(self, shape: tuple[int, ...], sigma: float) -> np.ndarray:
        return random_field(shape, self.spacing, sigma, self.rng)
