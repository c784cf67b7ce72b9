# SPDX-License-Identifier: Apache-2.0
"""Defines the physical parameters of the simulated scanner and acquisition."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from medaccel.studies.typed import Settings


@dataclass(frozen=True, eq=False)
class SimulatorConfig(Settings):
    """Holds the physical parameters of the simulated scanner and acquisition.

    The defaults fix the difficulty of the restoration task and are frozen: on the built-in phantoms the liver's
    coefficient of variation is 10-13 % at 90 s, and the best single Gaussian filter scores 9-15 % from 60 s to 90 s
    (published on a real scanner: 11.8 %). `sensitivity`, the iterations and the post-filter were chosen for that, the
    post-filter's shape also for the noise correlation of a real reconstruction.

    Args:
        durations: exposures in s, increasing; each contains the ones before it.
        psf_fwhm: full width at half maximum of the scanner's point spread, mm, along every axis.
        fine_factor: the activity is projected from a grid this much finer transaxially.
        attenuation: model photon attenuation; False gives an unattenuated acquisition.
        scatter_fraction: scattered / (scattered + true) coincidences.
        scatter_fwhm: width of the blur that makes scatter of trues, mm, radial and axial.
        randoms_fraction: randoms / trues at the reference dose, over the whole volume.
        sensitivity: true coincidences per second that 1 mL of SUV 1 gives at the reference dose without attenuation.
            With 5 MBq/kg and an hour of decay, SUV 1 is about 3.4 kBq/mL, so the default is 17 cps/kBq within the
            field of view, the order of a clinical 3-D scanner.
        dose_fraction: injected dose / reference dose; trues and scatter go with it, randoms with its square.
        n_angles: projections over 180 degrees.
        bin_width: width of a projection's radial bins, mm.
        iterations: iterations of OSEM.
        n_subsets: subsets of OSEM, a divisor of n_angles.
        postfilter_fwhm: transaxial width of the Gaussian filter after the reconstruction, mm; 0 is none.
        postfilter_axial_fwhm: axial width of that filter, mm; 0 is none.
    """

    separator: ClassVar[str] = "."
    unknown_names: ClassVar[str] = " has an unknown parameter: {names}"

    durations: tuple[int, ...] = (30, 60, 90)
    psf_fwhm: float = 5.0
    fine_factor: int = 2
    attenuation: bool = True
    scatter_fraction: float = 0.35
    scatter_fwhm: float = 200.0
    randoms_fraction: float = 0.5
    sensitivity: float = 58.0
    dose_fraction: float = 1.0
    n_angles: int = 96
    bin_width: float = 4.0
    iterations: int = 2
    n_subsets: int = 12
    postfilter_fwhm: float = 6.5
    postfilter_axial_fwhm: float = 4.5

    def __post_init__(self) -> None:
        super().__post_init__()
        durations = tuple(int(t) for t in self.durations)
        if not durations or durations != tuple(self.durations) or min(durations) < 1:
            raise ValueError(f"durations is {self.durations}; expected whole seconds, at least one, each >= 1")
        if list(durations) != sorted(set(durations)):
            raise ValueError(f"durations is {self.durations}; expected increasing durations: exposures nest")
        object.__setattr__(self, "durations", durations)
        for field in ("psf_fwhm", "randoms_fraction", "postfilter_fwhm", "postfilter_axial_fwhm"):
            self._check(field, 0.0, math.inf, "a finite number >= 0")
        for field in ("sensitivity", "dose_fraction", "bin_width", "scatter_fwhm"):
            self._check(field, math.ulp(0.0), math.inf, "a finite number > 0")
        self._check("scatter_fraction", 0.0, 1.0, "a share in [0, 1)")
        for field in ("fine_factor", "n_angles", "iterations", "n_subsets"):
            self._check(field, 1, math.inf, "a whole number >= 1")
            if getattr(self, field) != int(getattr(self, field)):
                raise ValueError(f"{field} is {getattr(self, field)}; expected a whole number >= 1")
        if self.n_angles % self.n_subsets:
            raise ValueError(f"n_subsets={self.n_subsets} does not divide n_angles={self.n_angles}")

    def _check(self, field: str, low: float, high: float, expected: str) -> None:
        value = getattr(self, field)
        if not low <= value < high:  # NaN fails too
            raise ValueError(f"{field} is {value}; expected {expected}")

    def to_json(self) -> dict[str, object]:
        """Returns the parameters as plain JSON values."""
        return dataclasses.asdict(self) | {"durations": list(self.durations)}
