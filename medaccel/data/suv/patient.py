# SPDX-License-Identifier: Apache-2.0
"""Reads weight, height, sex and dose, and computes what SUV are normalised by: weight, lean mass, surface, ideal
weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medaccel.data._fields import label, optional, positive, require, same, source
from medaccel.data.suv.findings import Findings

if TYPE_CHECKING:
    from pydicom import Dataset

#: What SUV can be asked for. DICOM's names for them in (0054,1006) are the keys of `SUV_TYPES`.
KINDS = ("bw", "lbm", "lbm_james", "bsa", "ibw")
SUV_TYPES = {
    "BW": "bw",
    "LBM": "lbm_morgan",  # the standard's earliest formula; files have it, but nobody should make more of them
    "LBMJAMES128": "lbm_james",
    "LBMJANMA": "lbm",
    "BSA": "bsa",
    "IBW": "ibw",
}
WORDS = {
    "bw": "body weight",
    "lbm": "lean body mass, Janmahasatian 2005",
    "lbm_james": "lean body mass, James 1976 with 128",
    "lbm_morgan": "lean body mass, Morgan 1994 (James with 120)",
    "bsa": "body surface area, Du Bois 1916",
    "ibw": "ideal body weight, Sugawara 1999",
}
UNIT = {kind: "cm2/mL" if kind == "bsa" else "g/mL" for kind in WORDS}

# Nobody weighs more; a value from 1000 up is in grams.
_MAX_KG, _GRAMS = 300.0, 1000.0
_KG_PER_POUND = 0.45359237
_USUAL_BMI, _POSSIBLE_BMI = (9.0, 60.0), (4.0, 150.0)
_MAX_M = 2.8  # a greater height is in centimetres
_LEAST_HEIGHT_OF_A_PERSON = 0.4
# Doses are 1e6 to 2e10 Bq. A value like 388 is in MBq; one like 10 could be MBq as well as mCi.
_DOSE_BQ, _DOSE_MBQ = (1e6, 1e11), (25.0, 1e4)


@dataclass(frozen=True)
class Patient:
    """Holds the weight in kg, and height in m and sex if the header has them."""

    weight: float
    height: float | None
    sex: str | None
    where: str  # the file, for messages

    def norm(self, kind: str, findings: Findings) -> float:
        """Returns what the dose is divided by: g, or cm2 for the body surface.

        Raises:
            ValueError: a formula's height or sex is missing; the formula gives no positive mass.
        """
        if kind == "bw":
            return 1000 * self.weight
        if self.height is None:
            raise ValueError(f"{self.where}: {label('PatientSize')} is missing or 0, which {WORDS[kind]} needs")
        if kind == "bsa":
            return float(1e4 * 0.007184 * self.weight**0.425 * (100 * self.height) ** 0.725)
        if self.sex not in ("M", "F", "O"):
            state = "missing" if self.sex is None else f"{self.sex}"
            raise ValueError(f"{self.where}: {label('PatientSex')} is {state}; {WORDS[kind]} needs M, F or O")
        if self.sex == "O":
            findings.warn(
                f"{self.where}: {label('PatientSex')} is O; {WORDS[kind]} is taken as the mean of a man's "
                "and a woman's"
            )
        kilograms = [_mass(kind, self.weight, self.height, sex) for sex in ("M", "F") if self.sex in (sex, "O")]
        mass = sum(kilograms) / len(kilograms)
        if mass <= 0:
            raise ValueError(
                f"{self.where}: {WORDS[kind]} is {mass:.3g} kg for {self.weight:g} kg and {self.height:g} m; "
                "expected a body that the formula was made for"
            )
        return 1000 * mass


def _mass(kind: str, weight: float, height: float, sex: str) -> float:
    """Returns kg for a weight in kg and a height in m."""
    man = sex == "M"
    if kind == "ibw":
        return 48.0 + 1.06 * (100 * height - 152) if man else 45.5 + 0.91 * (100 * height - 152)
    if kind == "lbm":
        bmi = weight / height**2
        return 9270 * weight / (6680 + 216 * bmi if man else 8780 + 244 * bmi)
    squared = (weight / (100 * height)) ** 2
    if not man:
        return 1.07 * weight - 148 * squared
    return 1.10 * weight - (120 if kind == "lbm_morgan" else 128) * squared


def read_patient(headers: Sequence[Dataset], findings: Findings) -> Patient:
    """Reads weight, height and sex of a series.

    Raises:
        ValueError: the weight is missing, not positive, or implausible; a field differs between slices.
    """
    first = headers[0]
    weight = same(headers, label("PatientWeight"), lambda h: positive(h, "PatientWeight", "kg"))
    height = _height(headers, findings)
    weight = _plausible_weight(first, weight, height, findings)
    sex = same(headers, label("PatientSex"), lambda h: str(optional(h, "PatientSex") or "").strip().upper())
    return Patient(weight, height, sex or None, source(first))


def _height(headers: Sequence[Dataset], findings: Findings) -> float | None:
    """Returns the height in m; None if it is absent or 0, for many scanners write 0 for an unknown one."""
    name = label("PatientSize")

    def read(header: Dataset) -> float:
        value = optional(header, "PatientSize")
        try:
            absent = value is None or float(value) == 0
        except (TypeError, ValueError):
            absent = False
        return 0.0 if absent else positive(header, "PatientSize", "m")

    height = same(headers, name, read)
    if height > _MAX_M:
        if not 100 * _LEAST_HEIGHT_OF_A_PERSON <= height <= 100 * _MAX_M:
            raise ValueError(f"{source(headers[0])}: {name} is {height:g}, expected m")
        findings.warn(f"{source(headers[0])}: {name} is {height:g}, which as m is impossible; it is taken for cm")
        return height / 100
    return height or None


def _plausible_weight(header: Dataset, weight: float, height: float | None, findings: Findings) -> float:
    """Returns the weight in kg, or raises ValueError if the value can't be one."""
    name = f"{source(header)}: {label('PatientWeight')} is {weight:g}"
    beside = f" for {label('PatientSize')} {height:g} m" if height is not None else ""

    def fits(kilograms: float, limits: tuple[float, float]) -> bool:
        known = height is not None and height >= _LEAST_HEIGHT_OF_A_PERSON
        return not known or limits[0] <= kilograms / height**2 <= limits[1]  # type: ignore[operator]

    if weight >= _GRAMS:
        if not (weight / 1000 <= _MAX_KG and fits(weight / 1000, _POSSIBLE_BMI)):
            raise ValueError(f"{name}{beside}; expected kg")
        findings.warn(f"{name}, which as kg is impossible; it is taken for grams: {weight / 1000:g} kg")
        return weight / 1000
    if weight > _MAX_KG:
        raise ValueError(
            f"{name}{beside}, which as kg is implausible; expected kg (as pounds it would be "
            f"{weight * _KG_PER_POUND:.0f} kg)"
        )
    if weight < 1:
        if height is not None and height >= _LEAST_HEIGHT_OF_A_PERSON:
            raise ValueError(f"{name}{beside}, which as kg is impossible; expected kg")
        if optional(header, "PatientSpeciesDescription") is None:
            findings.warn(f"{name} kg, which only a small animal has; SUV are wrong if the patient is a person")
    elif not fits(weight, _POSSIBLE_BMI):
        raise ValueError(f"{name}{beside}; expected kg and m")
    elif not fits(weight, _USUAL_BMI):
        pounds = f"; as pounds it would be {weight * _KG_PER_POUND:.0f} kg" if weight > 30 else ""
        findings.warn(f"{name} kg{beside}: are they kg and m?{pounds}")
    return weight


def radiopharmaceutical(header: Dataset) -> Dataset:
    """Returns the one injection's item."""
    items = require(header, "RadiopharmaceuticalInformationSequence")
    if len(items) != 1:
        raise ValueError(
            f"{source(header)}: {label('RadiopharmaceuticalInformationSequence')} has {len(items)} items, "
            "expected 1 (one injection)"
        )
    item: Dataset = items[0]
    return item


def read_dose(headers: Sequence[Dataset], findings: Findings) -> float:
    """Returns the injected activity in Bq.

    Raises:
        ValueError: it is missing, not positive, or not in a unit that can be told.
    """
    name = label("RadionuclideTotalDose")
    dose = same(headers, name, lambda h: positive(h, "RadionuclideTotalDose", "Bq", within=radiopharmaceutical(h)))
    said = f"{source(headers[0])}: {name} is {dose:g}"
    if _DOSE_MBQ[0] <= dose < _DOSE_MBQ[1]:
        findings.warn(f"{said}, which as Bq is too little to be seen; it is taken for MBq: {dose * 1e6:g} Bq")
        return dose * 1e6
    if dose < _DOSE_BQ[0]:
        guess = "MBq, GBq or mCi" if dose < _DOSE_MBQ[0] else "kBq"
        raise ValueError(f"{said}, which as Bq is too little to be seen; expected Bq; is it {guess}?")
    if dose > _DOSE_BQ[1]:
        raise ValueError(f"{said}, more than any patient gets; expected Bq")
    return dose
