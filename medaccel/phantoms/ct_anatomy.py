# SPDX-License-Identifier: Apache-2.0
"""Lists what phantom CTs are drawn from: organs, their CT numbers with and without contrast agent, and populations.

The CT numbers in `MEASURED` were measured in the abdominal CT of the TotalSegmentator example (3 mm, Apache-2.0),
organ by organ, eroded by two voxels; the others are textbook values. Contrast agent adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Mean and standard deviation were measured in that CT, HU; the deviation of liver and muscle is about its noise.
MEASURED: Mapping[str, tuple[float, float]] = {
    "spleen": (34, 12),
    "kidney": (17, 20),
    "liver": (46, 13),
    "blood": (43, 12),
    "muscle": (26, 18),
    "bowel": (16, 20),
    "lung": (-770, 75),
    "bone": (110, 60),  # vertebrae
    "rib": (210, 95),
}
ORGANS = {
    "air": 0,
    "fat": 1,
    "muscle": 2,
    "bone": 3,
    "lung": 4,
    "airway": 5,
    "vessel": 6,
    "heart": 7,
    "liver": 8,
    "spleen": 9,
    "kidney": 10,
    "stomach": 11,
    "bowel": 12,
    "lesion": 13,
}
# CT numbers without contrast agent, HU.
HU = {name: mean for name, (mean, _) in MEASURED.items()} | {
    "fat": -100.0,
    "airway": -990.0,
    "gas": -900.0,
    "stomach": 20.0,
    "heart": 40.0,
    "lesion": 35.0,
}
# Contrast agent adds so many HU: none; arterial; portal venous, which is the phase of the Decathlon's spleens.
ENHANCEMENT: Mapping[str, Mapping[str, float]] = {
    "none": {},
    "arterial": {"blood": 230, "heart": 160, "spleen": 75, "kidney": 120, "liver": 20, "bowel": 25, "lesion": 20},
    "venous": {"blood": 110, "heart": 85, "spleen": 78, "kidney": 140, "liver": 60, "bowel": 40, "lesion": 35},
}

Range = tuple[float, float]


@dataclass(frozen=True)
class Population:
    """Holds the ranges that persons and scans are drawn from, uniformly; lengths in mm.

    Args:
        name: the population's name in the files.
        half_width, half_depth: semi-axes of the torso.
        fat: thickness under the skin.
        organ_scale: factor on organ sizes, drawn for each organ and axis.
        organ_shift: standard deviation of an organ's place along each axis.
        exponent: exponent of the organs' superellipsoids.
        deformation, deformation_size: standard deviation of the displacements, and their smoothness.
        phases: probabilities of the contrast phases.
        contrast: factor on the HU that contrast agent adds.
        noise: standard deviation, HU, and its blur, mm.
        texture: standard deviation within an organ, HU.
        lesions: least and greatest number in the lungs.
        lesion_diameter: drawn evenly in its logarithm; painted at least a voxel wide.
        tumour_diameter: diameter of the first lesion, if it differs from the others.
    """

    name: str
    half_width: Range = (145.0, 180.0)
    half_depth: Range = (98.0, 125.0)
    fat: Range = (8.0, 30.0)
    organ_scale: Range = (0.75, 1.25)
    organ_shift: float = 7.0
    exponent: Range = (1.9, 2.8)
    deformation: float = 5.0
    deformation_size: Range = (25.0, 40.0)
    phases: Mapping[str, float] = field(default_factory=lambda: {"none": 0.15, "arterial": 0.15, "venous": 0.7})
    contrast: Range = (0.6, 1.25)
    noise: tuple[Range, Range] = ((9.0, 20.0), (1.5, 2.5))
    texture: Range = (3.0, 8.0)
    lesions: tuple[int, int] = (1, 3)
    lesion_diameter: Range = (3.0, 30.0)
    tumour_diameter: Range | None = None


STANDARD = Population("standard")
#: These patients have a lung tumour, as all of Task06_Lung do. With lesions from 3 mm on alone, three in ten would
#: have no lesion of more than five voxels of 4 mm.
TUMOUR = Population("tumour", tumour_diameter=(10.0, 30.0))
SHIFTED = Population(
    "shifted",
    half_width=(130.0, 195.0),
    half_depth=(88.0, 135.0),
    fat=(4.0, 45.0),
    organ_scale=(0.7, 1.4),
    organ_shift=10.0,
    exponent=(1.7, 3.4),
    deformation=6.0,
    deformation_size=(26.0, 45.0),
    phases={"none": 0.5, "arterial": 0.3, "venous": 0.2},
    noise=((6.0, 35.0), (1.0, 3.5)),
    lesions=(0, 4),
)
