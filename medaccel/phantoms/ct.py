# SPDX-License-Identifier: Apache-2.0
"""Simulates torso CTs of phantoms with their true labels: they exercise the segmentation study, but don't replace
patients.

A person is drawn from ranges (`ct_anatomy.Population`): body, bones, lungs with airway and vessels, heart, great
vessels, liver, spleen, kidneys, stomach, bowel, and lesions in the lungs. Organs are superellipsoids in a randomly
deformed space, with texture within and correlated noise over everything. `STANDARD` is what is labelled; `SHIFTED`
has other shapes, contrast phases and noise, for the unlabelled pool and for tests of transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medaccel.phantoms.ct_anatomy import ENHANCEMENT, HU, ORGANS, STANDARD, Population
from medaccel.phantoms.painting import random_field, superellipsoid


@dataclass
class PhantomCT:
    """Holds a scan and its true labels; arrays (i, j, k), axes to the right, the front and up.

    Args:
        hu: int16. organs: values of `ORGANS`, uint8. lesions: instance labels of lung lesions, uint8, 0 is none.
        affine: (4, 4), maps voxel indices to RAS, mm.
        parameters: the drawn values, plain; "lesion_diameters_mm", in the order of the instance labels, are the
            diameters of spheres of the painted volumes.
    """

    hu: np.ndarray
    organs: np.ndarray
    lesions: np.ndarray
    affine: np.ndarray
    parameters: dict[str, Any]


def make_phantom(
    seed: int,
    *,
    population: Population = STANDARD,
    size_mm: Sequence[float] = (384.0, 304.0, 272.0),
    spacing: Sequence[float] = (4.0, 4.0, 4.0),
    centre_z: float = -20.0,
) -> PhantomCT:
    """Draws a person and scans it.

    Args:
        seed: seed of all randomness.
        population: the ranges to draw from.
        size_mm: size of the field of view.
        spacing: voxel size, mm.
        centre_z: middle of the field of view in the person's coordinates, mm: the liver's dome is near 0, the lungs'
            middle near 80; it is shifted by up to 15 mm at random.

    Raises:
        ValueError: the field of view leaves out the organs by which a person is recognised, or spacing is out of
            bounds.
    """
    if len(spacing) != 3 or not all(0 < step <= 8 for step in spacing):
        raise ValueError(f"spacing is {tuple(spacing)}; expected three numbers above 0 and at most 8 mm")
    shape = tuple(round(length / step) for length, step in zip(size_mm, spacing, strict=True))
    if min(length for length in size_mm) < 96:
        raise ValueError(f"size_mm is {tuple(size_mm)}; expected at least 96 mm along each axis")
    person = _Person(shape, tuple(float(step) for step in spacing), population, centre_z, seed)
    person.trunk()
    person.thorax()
    person.belly()
    person.bones()
    person.lung_lesions()
    return person.scanned()


class _Person:
    """Paints one person."""

    def __init__(
        self, shape: tuple[int, ...], spacing: tuple[float, ...], population: Population, centre_z: float, seed: int
    ) -> None:
        self.population, self.spacing, self.shape = population, spacing, shape
        self.rng = rng = np.random.default_rng([seed, 7])
        self.edge = float(np.mean(spacing))
        self.half_width, self.half_depth = rng.uniform(*population.half_width), rng.uniform(*population.half_depth)
        self.fat = min(rng.uniform(*population.fat), 0.25 * self.half_depth)
        # Organs fill the space within the fat of a person with half-axes of 140 × 90 mm.
        self.stretch = ((self.half_width - self.fat) / 140.0, (self.half_depth - self.fat) / 90.0, 1.0)
        self.phase = str(rng.choice(list(population.phases), p=list(population.phases.values())))
        factor = rng.uniform(*population.contrast)
        self.hu = {
            name: value + factor * ENHANCEMENT[self.phase].get(name, 0.0) + rng.normal(0, 4)
            for name, value in HU.items()
        }
        start = centre_z + rng.uniform(-15, 15) - spacing[2] * (shape[2] - 1) / 2
        middles = [0.0, 0.0, start + spacing[2] * (shape[2] - 1) / 2]
        self.axes = [
            middle + (np.arange(n) - (n - 1) / 2) * step
            for n, step, middle in zip(shape, spacing, middles, strict=True)
        ]
        smoothness = rng.uniform(*population.deformation_size)
        self.position = [
            (axis + population.deformation * random_field(shape, spacing, smoothness, rng)).astype(np.float32)
            for axis in np.meshgrid(*self.axes, indexing="ij")
        ]
        self.texture = random_field(shape, spacing, rng.uniform(3.0, 6.0), rng)
        self.canvas = np.full(shape, -1000.0, dtype=np.float32)
        self.organs = np.zeros(shape, dtype=np.uint8)
        self.lesions = np.zeros(shape, dtype=np.uint8)
        self.interior = np.ones(shape, dtype=np.float32)
        self.diameters: list[float] = []

    def trunk(self) -> None:
        """Paints skin, fat and muscle."""
        x, y, z = self.position
        taper = np.interp(z, [-330, -200, -60, 60, 150, 210], [1.0, 0.92, 0.97, 1.0, 0.96, 0.75]).astype(np.float32)
        exponent = self.rng.uniform(2.1, 2.8)
        for tissue, margin in (("fat", 0.0), ("muscle", self.fat)):
            a, b = (self.half_width - margin) * taper, (self.half_depth - margin) * taper
            radius = (np.abs(x / a) ** exponent + np.abs(y / b) ** exponent) ** (1 / exponent)
            cover = np.clip(0.5 + (1 - radius) * np.sqrt(a * b) / self.edge, 0, 1).astype(np.float32)
            self._blend(tissue, cover, (slice(None),) * 3)
        self.interior = cover
        # Fat lies between the organs of the belly, within its wall.
        self.draw("fat", (0, 8, -140), (112, 66, 150), vary=False, exponent=3.0)

    def thorax(self) -> None:
        """Paints the lungs with vessels and airway, the heart and the great vessels."""
        rng = self.rng
        lungs = np.zeros(self.shape, dtype=bool)
        for side in (-1, 1):
            self.draw("lung", (side * 68, -2, 88 + rng.normal(0, 6)), (54, 70, 112), exponent=2.5)
        lungs |= self.organs == ORGANS["lung"]
        self.draw("fat", (0, 10, 95), (22, 60, 95), exponent=2.5, vary=False)  # mediastinum
        lungs &= self.organs == ORGANS["lung"]
        for side in (-1, 1):
            root = np.array([side * 24.0, -8.0, 78.0])
            for _ in range(int(rng.integers(14, 22))):
                tip = np.array([side * rng.uniform(45, 112), rng.uniform(-60, 55), rng.uniform(-10, 170)])
                self.tube("vessel", root, tip, rng.uniform(2.5, 5.0), 1.0, self.hu["blood"] - 20, within=lungs)
        self.draw("airway", (0, -14, 150), (8, 8, 75), exponent=4.0, vary=False)
        for side in (-1, 1):
            end = np.array([side * 34.0, -16, 58])
            self.tube("airway", np.array([0, -14.0, 82]), end, 6.0, 4.0, self.hu["airway"])
        self.draw("vessel", (-14, -32, -40), (12, 12, 230), exponent=6.0, hu="blood", vary=False)  # aorta
        self.draw("vessel", (16, -26, -110), (11, 9, 125), exponent=5.0, hu="blood", vary=False)  # vena cava
        self.draw("heart", (-22, 24, 48), (52, 42, 50))
        self.draw("vessel", (-18, 14, 62), (26, 22, 28), hu="blood", organ="heart")

    def belly(self) -> None:
        """Paints liver, stomach, bowel, kidneys, and the spleen between them: neighbours of nearly its own CT
        number."""
        rng = self.rng
        for _ in range(int(rng.integers(14, 26))):
            centre = (rng.uniform(-92, 92), rng.uniform(-20, 62), rng.uniform(-290, -110))
            self.draw("bowel", centre, rng.uniform(11, 24, size=3), vary=False)
            if rng.random() < 0.35:
                self.draw("bowel", centre, rng.uniform(5, 11, size=3), hu="gas", vary=False)
        # This is the colon's bend below the spleen.
        self.draw("bowel", (-88, 22, -112 + rng.normal(0, 10)), (22, 24, 26))
        for side in (-1, 1):
            hilum = np.array([side * 47.0, -41.0, -132.0 + 8 * side + rng.normal(0, 6)])
            self.draw("kidney", hilum + np.array([side * 9.0, -5.0, 0.0]), (27, 25, 54))
            self.draw("fat", hilum, (9, 9, 20), vary=False)
        self.draw("spleen", (-92, -28, -52), (27, 34, 50), shift=2.0)
        stomach = np.array([-56.0, 26.0, -62.0]) + rng.normal(0, 6, 3)
        size = np.array([36.0, 32.0, 42.0]) * rng.uniform(0.7, 1.2)
        self.draw("stomach", stomach, size, vary=False)
        if rng.random() < 0.7:  # gas rises to the front in a patient who lies on the back
            self.draw("stomach", stomach + np.array([0, 0.45 * size[1], 0]), 0.55 * size, hu="gas", vary=False)
        self.draw("liver", (6, 32, -44), (62, 36, 38))
        self.draw("liver", (62, 4, -62), (62, 62, 70), exponent=2.3)
        for _ in range(int(rng.integers(4, 8))):
            root, tip = np.array([30.0, 5.0, -70.0]), np.array([rng.uniform(20, 110), rng.uniform(-45, 45), -30.0])
            self.tube("liver", root, tip, 5.0, 2.0, self.hu["blood"], within=self.organs == ORGANS["liver"])

    def bones(self) -> None:
        """Paints the spine and the ribs."""
        self.draw("bone", (0, -58, -60), (20, 18, 340), exponent=5.0, vary=False)
        self.draw("muscle", (0, -54, -60), (8, 7, 340), exponent=4.0, hu="fat", organ="bone", vary=False)  # canal
        x, y, z = self.position
        a, b = 0.97 * (self.half_width - self.fat), 0.95 * (self.half_depth - self.fat)
        radius = np.sqrt((x / a) ** 2 + (y / b) ** 2)
        shell = np.abs(radius - 1) * np.sqrt(a * b) < 4.5
        pitch, tilt = self.rng.uniform(24, 32), self.rng.uniform(0.25, 0.45)
        turn = (z + tilt * (y + b) + self.rng.uniform(0, pitch)) % pitch
        ribs = shell & (np.abs(turn - pitch / 2) < 4.5) & (z > -70) & (self.organs > 0)
        self.canvas[ribs] = self.hu["rib"]
        self.organs[ribs] = ORGANS["bone"]

    def lung_lesions(self) -> None:
        """Paints nodules and masses, solid or, one in five, part-solid; some lie at the pleura or at a vessel."""
        rng, population = self.rng, self.population
        for number in range(int(rng.integers(population.lesions[0], population.lesions[1] + 1))):
            places = np.argwhere(self.organs == ORGANS["lung"])
            if len(places) < 200:
                return  # the field of view shows hardly any lung
            first = population.tumour_diameter if number == 0 else None
            low, high = first or population.lesion_diameter
            diameter = float(np.exp(rng.uniform(np.log(low), np.log(high))))
            place = places[rng.integers(len(places))]
            centre = np.array([self.position[axis][tuple(place)] for axis in range(3)], dtype=float)
            semi = 0.5 * diameter * np.exp(rng.normal(0, 0.12, 3))
            value = self.hu["lesion"] if rng.random() < 0.8 else rng.uniform(-450, -150)
            drawn = self._cover(centre, np.maximum(semi, 0.5 * self.edge), rng.uniform(1.8, 2.4))
            if drawn is None:
                continue
            region, cover = drawn
            cover = cover * np.isin(self.organs[region], (ORGANS["lung"], ORGANS["vessel"]))
            inside = cover > 0.5
            if not inside.any():
                continue
            self.canvas[region] += cover * (value - self.canvas[region])
            self.organs[region][inside] = ORGANS["lesion"]
            # The painted lesion may be wider than the drawn one, or cut off by the lung's border.
            volume = np.count_nonzero(inside) * float(np.prod(self.spacing))
            self.diameters.append(float((6 * volume / np.pi) ** (1 / 3)))
            self.lesions[region][inside] = len(self.diameters)

    def scanned(self) -> PhantomCT:
        """Returns the finished scan, with noise."""
        rng, (deviations, blurs) = self.rng, self.population.noise
        deviation, blur = rng.uniform(*deviations), rng.uniform(*blurs)
        noise = random_field(self.shape, self.spacing, blur, rng)
        hu = np.clip(np.round(self.canvas + deviation * noise), -1024, 3071).astype(np.int16)
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = [float(axis[0]) for axis in self.axes]
        parameters = {
            "population": self.population.name,
            "phase": self.phase,
            "noise_hu": deviation,
            "half_width_mm": self.half_width,
            "half_depth_mm": self.half_depth,
            "fat_mm": self.fat,
            "lesion_diameters_mm": self.diameters,
        }
        return PhantomCT(hu, self.organs, self.lesions, affine, parameters)

    def draw(
        self,
        tissue: str,
        centre: Sequence[float] | np.ndarray,
        semi_axes: Sequence[float] | np.ndarray,
        *,
        hu: str | None = None,
        organ: str | None = None,
        exponent: float | None = None,
        vary: bool = True,
        shift: float = 1.0,
    ) -> None:
        """Paints a superellipsoid, given in mm of a nominal person; with `vary`, its place, size and exponent are
        random."""
        p, rng = self.population, self.rng
        middle, semi = np.array(centre, dtype=float), np.array(semi_axes, dtype=float)
        if vary:
            middle += rng.normal(0, shift * p.organ_shift, 3)
            semi *= rng.uniform(*p.organ_scale, size=3)
            exponent = rng.uniform(*p.exponent) if exponent is None else exponent
        drawn = self._cover(middle * self.stretch, semi * self.stretch, exponent or 2.0)
        if drawn is not None:
            region, cover = drawn
            self._blend(organ or tissue, cover * self.interior[region], region, self.hu[hu or tissue])

    def tube(
        self,
        organ: str,
        start: np.ndarray,
        end: np.ndarray,
        first: float,
        last: float,
        hu: float,
        within: np.ndarray | None = None,
    ) -> None:
        """Paints a straight tube whose radius goes from `first` to `last`, mm."""
        start, end = start * self.stretch, end * self.stretch
        reach = first + self.edge + 4 * self.population.deformation
        box = []
        for axis in range(3):
            low, high = min(start[axis], end[axis]) - reach, max(start[axis], end[axis]) + reach
            near = np.flatnonzero((self.axes[axis] > low) & (self.axes[axis] < high))
            if not near.size:
                return
            box.append(slice(int(near[0]), int(near[-1]) + 1))
        region, direction = tuple(box), end - start
        relative = [self.position[axis][region] - start[axis] for axis in range(3)]
        along = np.clip(sum(r * d for r, d in zip(relative, direction, strict=True)) / (direction @ direction), 0, 1)
        distance = np.sqrt(sum((r - along * d) ** 2 for r, d in zip(relative, direction, strict=True)))
        radius = first + (last - first) * along
        cover = np.clip(0.5 + (radius - distance) / self.edge, 0, 1).astype(np.float32)
        if within is not None:
            cover = cover * within[region]
        self._blend(organ, cover, region, hu)

    def _cover(
        self, centre: np.ndarray, semi_axes: np.ndarray, exponent: float
    ) -> tuple[tuple[slice, ...], np.ndarray] | None:
        return superellipsoid(
            self.position,
            self.axes,
            [float(c) for c in centre],
            [float(s) for s in semi_axes],
            exponent=exponent,
            margin=4.0 * self.population.deformation + self.edge,
            edge=self.edge,
        )

    def _blend(self, organ: str, cover: np.ndarray, region: tuple[slice, ...], hu: float | None = None) -> None:
        value = self.hu[organ] if hu is None else hu
        deviation = 12.0 if organ == "lung" else float(np.mean(self.population.texture))
        self.canvas[region] += cover * (value + deviation * self.texture[region] - self.canvas[region])
        self.organs[region][cover > 0.5] = ORGANS[organ]
