# SPDX-License-Identifier: Apache-2.0
"""Draws random FDG PET phantoms: activity, attenuation, CT, organs and lesions of a torso or a head and chest.

Organs are superellipsoids in a person's own millimetres (x to the right, y to the front, z up, 0 at the
liver's dome), deformed by one smooth random displacement field and painted one over the other with soft
edges, so that partial volumes are right to a fraction of a voxel. Uptake within an organ is lumpy:
multiplied with a band-limited random field. The grid is a window of the person that always holds the liver
or, in a head scan, its upper part.

There are two generators: ``standard``, and ``shifted`` with other body shapes, uptakes and lesion statistics, which
makes test studies that a method has not been fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medaccel.phantoms.attenuation import hu_to_attenuation
from medaccel.phantoms.pet_anatomy import ORGANS, PhantomConfig, Range, paint_person
from medaccel.phantoms.pet_lesions import LesionConfig, add_lesions

MIN_EXTENT = (300.0, 220.0, 180.0)  # mm along i, j, k
DEFAULT_SHAPE = (96, 72, 112)
DEFAULT_SPACING = (4.0, 4.0, 4.0)  # mm

_SHIFTED_UPTAKE: dict[str, Range] = {
    "fat": (0.15, 0.45),
    "muscle": (0.4, 1.1),
    "bone": (0.7, 2.6),
    "skull": (0.3, 0.9),
    "lung": (0.25, 0.65),
    "liver": (1.5, 3.0),
    "spleen": (1.2, 2.8),
    "kidney": (1.8, 5.0),
    "blood": (1.0, 2.1),
    "myocardium": (1.2, 11.0),
    "bowel": (0.6, 5.0),
    "bladder": (5.0, 40.0),
    "brain": (4.5, 12.0),
}

GENERATORS: dict[str, PhantomConfig] = {
    "standard": PhantomConfig(),
    "shifted": PhantomConfig(
        half_width=(128.0, 182.0),
        half_depth=(86.0, 130.0),
        exponent=(1.9, 3.4),
        fat=(4.0, 38.0),
        organ_scale=(0.82, 1.14),
        deformation=5.0,
        uptake=_SHIFTED_UPTAKE,
        lumpiness={"liver": 0.05, "spleen": 0.07, "blood": 0.02, "bladder": 0.02, "brain": 0.16},
        lump_size=(4.0, 11.0),
        lesions=LesionConfig(count=(6, 18), diameter=(6.0, 30.0), suv=(2.5, 15.0), cold_share=0.3, elongation=1.6),
    ),
}


@dataclass(frozen=True)
class Phantom:
    """Holds a person on a grid; arrays (i, j, k).

    Args:
        spacing: mm.
        affine: (4, 4), RAS, mm.
        activity: SUV, float32.
        attenuation: 1/cm at 511 keV, float32.
        ct: HU, float32.
        organs: uint8, values of `ORGANS`; a lesion keeps its host's value.
        lesions: uint16, 1, 2, … in the order of `lesion_table`; 0 is none.
        lesion_table: per lesion its diameter (mm, of the sphere of equal volume), SUV, kind (hot, cold),
            organ.
        parameters: values drawn for the person.
    """

    spacing: tuple[float, float, float]
    affine: np.ndarray
    activity: np.ndarray
    attenuation: np.ndarray
    ct: np.ndarray
    organs: np.ndarray
    lesions: np.ndarray
    lesion_table: list[dict[str, Any]]
    parameters: dict[str, Any]


def make_phantom(
    seed: int,
    generator: str = "standard",
    shape: Sequence[int] = DEFAULT_SHAPE,
    spacing: Sequence[float] = DEFAULT_SPACING,
    *,
    lesions: bool = True,
) -> Phantom:
    """Draws a person; the same arguments give the same bits.

    Args:
        seed: whole number >= 0.
        generator: ``standard`` or ``shifted``.
        shape: voxels; the default covers 384 × 288 × 448 mm.
        spacing: mm; sizes above 6 mm leave little of the smallest lesions.
        lesions: paint lesions into the person; False gives the same person without them.

    Raises:
        ValueError: the generator is unknown, or the grid is smaller than 300 × 220 × 180 mm.
    """
    if generator not in GENERATORS:
        raise ValueError(f"generator is {generator!r}; expected one of {', '.join(GENERATORS)}")
    if len(shape) != 3 or len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(
            f"shape={tuple(shape)}, spacing={tuple(spacing)}; expected three of each, in voxels and mm > 0"
        )
    extent = [n * step for n, step in zip(shape, spacing, strict=True)]
    if any(side < least for side, least in zip(extent, MIN_EXTENT, strict=True)):
        raise ValueError(
            f"the grid covers {' × '.join(f'{side:g}' for side in extent)} mm; "
            f"expected at least {' × '.join(f'{least:g}' for least in MIN_EXTENT)} mm"
        )
    config = GENERATORS[generator]
    # The generator's index is part of the seed, so the two never share a person.
    rng = np.random.default_rng([seed, list(GENERATORS).index(generator)])
    sizes = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    person = paint_person(tuple(shape), sizes, config, rng)
    labels = np.zeros(tuple(shape), dtype=np.uint16)
    table: list[dict[str, Any]] = []
    if lesions:
        labels, table = add_lesions(
            person.activity, person.ct, person.organs, person.lumps, sizes, config.lesions, ORGANS, rng
        )
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-(shape[0] - 1) / 2 * spacing[0], -(shape[1] - 1) / 2 * spacing[1], person.z[0]]
    return Phantom(
        sizes,
        affine,
        person.activity,
        hu_to_attenuation(person.ct),
        person.ct,
        person.organs,
        labels,
        table,
        person.parameters,
    )
