# SPDX-License-Identifier: Apache-2.0
"""Knows the nuclides of PET: their half-lives, and how headers name them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medaccel.data._fields import label, optional, positive, source
from medaccel.data.suv.findings import Findings

if TYPE_CHECKING:
    from pydicom import Dataset

# A header's half-life that is further off than the first is said, one beyond the second is refused.
_WARNED, _REFUSED = 0.01, 0.1


@dataclass(frozen=True)
class Nuclide:
    """Names a nuclide: `F`, `fluorine`, `18`, half-life in seconds (NuDat 3), and its codes of DICOM's CID 4020:
    SNOMED's old one (SRT, SNM3, 99SDM), and SNOMED CT's (SCT) or DICOM's own (DCM)."""

    symbol: str
    name: str
    mass: str
    half_life: float
    codes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.symbol}-{self.mass}"


_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
NUCLIDES = (
    Nuclide("C", "carbon", "11", 1221.8, ("C-105A1", "40565003")),
    Nuclide("N", "nitrogen", "13", 597.9, ("C-107A1", "21576001")),
    Nuclide("O", "oxygen", "14", 70.62, ("C-1018C", "424875009")),
    Nuclide("O", "oxygen", "15", 122.24, ("C-B1038", "129504001")),
    Nuclide("F", "fluorine", "18", 6586.2, ("C-111A1", "77004003")),
    Nuclide("Na", "sodium", "22", 2.6018 * 365.2422 * _DAY, ("C-155A1", "71633006")),
    Nuclide("K", "potassium", "38", 7.636 * _MINUTE, ("C-135A4", "423764008")),
    Nuclide("Sc", "scandium", "43", 3.891 * _HOUR, ("126605",)),
    Nuclide("Sc", "scandium", "44", 4.042 * _HOUR, ("126600",)),
    Nuclide("Ti", "titanium", "45", 184.8 * _MINUTE, ("C-166A2", "75696008")),
    Nuclide("Mn", "manganese", "51", 46.2 * _MINUTE, ("126601",)),
    Nuclide("Mn", "manganese", "52", 5.591 * _DAY, ("C-149A1", "37225000")),
    Nuclide("Mn", "manganese", "52m", 21.1 * _MINUTE, ("126607",)),
    Nuclide("Fe", "iron", "52", 8.275 * _HOUR, ("C-130A1", "69089000")),
    Nuclide("Cu", "copper", "60", 23.7 * _MINUTE, ("C-127A4", "425364008")),
    Nuclide("Cu", "copper", "61", 3.339 * _HOUR, ("C-127A1", "71425003")),
    Nuclide("Cu", "copper", "62", 9.673 * _MINUTE, ("C-127A5", "422934004")),
    Nuclide("Cu", "copper", "64", 45723.6, ("C-127A2", "3932008")),
    Nuclide("Zn", "zinc", "62", 9.193 * _HOUR, ("C-141A1", "65054007")),
    Nuclide("Ga", "gallium", "66", 9.49 * _HOUR, ("C-131A1", "79477007")),
    Nuclide("Ga", "gallium", "68", 4062.6, ("C-131A3", "35337001")),
    Nuclide("Ge", "germanium", "68", 270.93 * _DAY, ("C-128A2", "53315004")),
    Nuclide("Br", "bromine", "75", 96.7 * _MINUTE, ("C-113A1", "17910003")),
    Nuclide("Br", "bromine", "76", 16.2 * _HOUR, ("C-113A2", "79523006")),
    Nuclide("Br", "bromine", "77", 57.04 * _HOUR, ("C-113A3", "86521004")),
    Nuclide("Rb", "rubidium", "82", 75.45, ("C-159A2", "79197006")),
    Nuclide("Y", "yttrium", "86", 14.74 * _HOUR, ("C-162A3", "10738001")),
    Nuclide("Y", "yttrium", "90", 230580.0, ("C-162A7", "14691008")),
    Nuclide("Zr", "zirconium", "89", 282276.0, ("C-168A4", "63360001")),
    Nuclide("Tc", "technetium", "94m", 52.0 * _MINUTE, ("C-163AA", "424079002")),
    Nuclide("I", "iodine", "124", 360806.0, ("C-114A5", "40937006")),
    Nuclide("Tb", "terbium", "152", 17.5 * _HOUR, ("126606",)),
)
_BY_CODE = {code: nuclide for nuclide in NUCLIDES for code in nuclide.codes}


def named(text: str) -> Nuclide | None:
    """Finds the nuclide in a phrase such as 18F, F-18, ^18^Fluorine, Fluorodeoxyglucose F^18^ or 68Ga-DOTATATE."""
    words = re.sub(r"[\^\[\]()]", "", text.lower())
    found = set()
    for nuclide in NUCLIDES:
        name = f"(?:{nuclide.name}|{nuclide.symbol.lower()})"
        # "18 F" or "F 18" with nothing, a blank or a dash between; no letter or digit goes on either side.
        mass_first = rf"(?<![a-z0-9]){nuclide.mass}[ -]?{name}(?![a-z0-9])"
        mass_last = rf"(?<![a-z]){name}[ -]?{nuclide.mass}(?![a-z0-9])"
        if re.search(f"{mass_first}|{mass_last}", words):
            found.add(nuclide)
    return found.pop() if len(found) == 1 else None


def half_life(header: Dataset, item: Dataset, findings: Findings) -> float:
    """Returns the half-life in seconds: the header's, else that of the nuclide that the header names.

    Args:
        header: a slice's header.
        item: its item of RadiopharmaceuticalInformationSequence.
        findings: takes the warnings.

    Raises:
        ValueError: neither is there; the two are more than 10 % apart; the nuclide's code and its name contradict
            each other where the half-life depends on it.
    """
    name = label("RadionuclideHalfLife")
    nuclide, why = _nuclide(header, item)
    if optional(item, "RadionuclideHalfLife", header=header) is None:
        if nuclide is None:
            state = "empty" if "RadionuclideHalfLife" in item else "missing"
            raise ValueError(f"{source(header)}: {name} is {state}, and {why}")
        findings.warn(f"{source(header)}: {name} is missing; {nuclide}'s is taken, {nuclide.half_life:g} s ({why})")
        return nuclide.half_life
    value = positive(header, "RadionuclideHalfLife", "seconds", within=item)
    if nuclide is not None:
        off = abs(value / nuclide.half_life - 1)
        said = f"{source(header)}: {name} is {value:g} s, {nuclide}'s is {nuclide.half_life:g} s ({why})"
        if off > _REFUSED:
            raise ValueError(f"{said}; expected them to agree")
        if off > _WARNED:
            findings.warn(f"{said}; the header's value is used")
    return value


def _nuclide(header: Dataset, item: Dataset) -> tuple[Nuclide | None, str]:
    """Returns the nuclide that the header names, if it names one, and where."""
    radionuclide, pharmaceutical = label("RadionuclideCodeSequence"), label("RadiopharmaceuticalCodeSequence")
    codes = optional(item, "RadionuclideCodeSequence", header=header)
    if codes:
        value = str(optional(codes[0], "CodeValue", header=header) or "").strip()
        meaning = str(optional(codes[0], "CodeMeaning", header=header) or "").strip()
        by_code, by_name = _BY_CODE.get(value), named(meaning)
        if by_code is not None and by_name is not None and by_code != by_name:
            return None, f"{radionuclide} has the code {value} of {by_code}, but the meaning {meaning!r}"
        if (found := by_code or by_name) is not None:
            return found, f"{radionuclide} {value}, {meaning}"
    for keyword in ("RadiopharmaceuticalCodeSequence", "Radiopharmaceutical"):
        value = optional(item, keyword, header=header)
        text = str(value or "") if keyword == "Radiopharmaceutical" else _meaning(header, value)
        if (found := named(text)) is not None:
            return found, f"{label(keyword)} {text}"
    return None, f"neither {radionuclide} nor {pharmaceutical} names a known nuclide"


def _meaning(header: Dataset, codes: object) -> str:
    return str(optional(codes[0], "CodeMeaning", header=header) or "") if codes else ""  # type: ignore[index]
