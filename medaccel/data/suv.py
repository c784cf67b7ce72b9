# SPDX-License-Identifier: Apache-2.0
"""Computes standardised uptake values (SUV, body weight) from the header of a PET series.

    SUV = activity concentration [Bq/mL] · weight [g] / (dose [Bq] · 2^(-Δt / T½))

where the dose has decayed from the injection to the time that the image is decay-corrected to. The field
DecayCorrection states this time (DICOM PS3.3 C.8.9.1; the rules for START, and the scan time tag of GE, are those of
QIBA's SUV consensus pseudocode, "Vendor-neutral"):

- START: the start of the scan, so Δt = series time - injection time;
- ADMIN: the injection itself, Δt = 0;
- NONE: each slice is as acquired, Δt = its acquisition time - injection time.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from medaccel.data._fields import label, moment, optional, parsed, positive, require, same, source

if TYPE_CHECKING:
    from pydicom import Dataset

# Half-lives in seconds (NuDat 3) by symbol, name and mass number.
HALF_LIFE = {
    ("c", "carbon", 11): 1221.8,
    ("n", "nitrogen", 13): 597.9,
    ("o", "oxygen", 15): 122.24,
    ("f", "fluorine", 18): 6586.2,
    ("cu", "copper", 64): 45723.6,
    ("ga", "gallium", 68): 4062.6,
    ("rb", "rubidium", 82): 75.45,
    ("zr", "zirconium", 89): 282276.0,
    ("y", "yttrium", 90): 230580.0,
    ("i", "iodine", 124): 360806.0,
}
# A scan starts neither before the injection nor after the whole dose has decayed: such dates are wrong.
_MAX_HALF_LIVES = 10
# With a longer half-life, scans days after the injection are usual, and a time of day doesn't identify the day.
_MAX_HALF_LIFE_WITHOUT_DATE = 6 * 3600.0
# Doses are 1e6 to 1e9 Bq; a value like 388 is in MBq.
_MIN_DOSE = 1e4
_CLOCK_TOLERANCE = timedelta(seconds=1)


def suv_factors(headers: Sequence[Dataset]) -> np.ndarray:
    """Returns the factors from the rescaled values of a PET series to SUV, one per slice.

    Units BQML needs PatientWeight, DecayCorrection, the times, and of RadiopharmaceuticalInformationSequence
    the dose, the half-life and the injection time. GML is SUV already: factor 1. CNTS needs Philips's SUV
    scale factor (7053,1000), else the activity scale factor (7053,1009) and the fields of BQML.

    Args:
        headers: the headers of the slices of one series.

    Returns:
        The factors, (len(headers),), float64.

    Raises:
        ValueError: a field is missing, invalid or differs between slices; other units; times that contradict
            each other; the reference time is unknown. The message names the file and the field.

    Warns:
        UserWarning: the half-life is over 1 % off the nuclide's; the series is not attenuation-corrected.
    """
    if not headers:
        raise ValueError("suv_factors: no headers given, expected those of a series")
    units = same(headers, label("Units"), lambda h: str(require(h, "Units")).upper())
    corrected = optional(headers[0], "CorrectedImage") or ()
    corrections = {corrected} if isinstance(corrected, str) else set(corrected)
    if corrections and "ATTN" not in corrections:
        warnings.warn(
            f"{source(headers[0])}: {label('CorrectedImage')} lacks ATTN: without attenuation correction "
            "SUVs are wrong",
            stacklevel=2,
        )
    if units == "GML":
        kind = same(headers, label("SUVType"), lambda h: str(optional(h, "SUVType") or "BW"))
        if kind != "BW":
            raise ValueError(f"{source(headers[0])}: {label('SUVType')} is {kind}, expected BW (body weight)")
        return np.ones(len(headers))
    if units == "BQML":
        return _from_concentration(headers, corrections)
    if units == "CNTS":
        suv_scales = [_philips_scale(h, 0x00) for h in headers]
        if all(suv_scales):
            return np.array(suv_scales)
        activity_scales = [_philips_scale(h, 0x09) for h in headers]
        if not all(activity_scales):
            missing = source(headers[activity_scales.index(0.0)])
            raise ValueError(
                f"{missing}: {label('Units')} is CNTS, but neither Philips's SUV scale factor (7053,1000) "
                "nor its activity concentration scale factor (7053,1009) is there"
            )
        return np.array(activity_scales) * _from_concentration(headers, corrections)
    raise ValueError(f"{source(headers[0])}: {label('Units')} is {units}, expected BQML, GML or CNTS")


def _from_concentration(headers: Sequence[Dataset], corrections: set[str]) -> np.ndarray:
    """Returns the factors from Bq/mL to SUV."""
    weight = 1000.0 * same(headers, label("PatientWeight"), lambda h: positive(h, "PatientWeight", "kg"))
    dose = same(headers, label("RadionuclideTotalDose"), _dose)
    half_life = same(
        headers,
        label("RadionuclideHalfLife"),
        lambda h: positive(h, "RadionuclideHalfLife", "seconds", within=_radiopharmaceutical(h)),
    )
    _check_half_life(headers[0], half_life)
    correction = same(headers, label("DecayCorrection"), lambda h: str(require(h, "DecayCorrection")).upper())
    if correction not in ("START", "ADMIN", "NONE"):
        raise ValueError(
            f"{source(headers[0])}: {label('DecayCorrection')} is {correction}, expected START, ADMIN or NONE"
        )
    if corrections and ("DECY" in corrections) != (correction != "NONE"):
        raise ValueError(
            f"{source(headers[0])}: {label('DecayCorrection')} is {correction}, but "
            f"{label('CorrectedImage')} "
            f"is {sorted(corrections)}; expected DECY in it exactly where the decay is corrected"
        )
    if correction == "ADMIN":
        return np.full(len(headers), weight / dose)
    acquired = [moment(h, "AcquisitionDate", "AcquisitionTime") for h in headers]
    references = [_scan_start(headers, min(acquired))] * len(headers) if correction == "START" else acquired
    injected = _injection(headers, half_life, min(references))
    elapsed = np.array([(reference - injected).total_seconds() for reference in references])
    if elapsed.min() < 0 or elapsed.max() > _MAX_HALF_LIVES * half_life:
        raise ValueError(
            f"{source(headers[0])}: {label('RadiopharmaceuticalStartTime')} puts the injection at "
            f"{injected}, "
            f"but the image's reference time is {min(references)}: expected 0 to {_MAX_HALF_LIVES} "
            "half-lives "
            f"({half_life:g} s) between them"
        )
    return weight / (dose * 2.0 ** (-elapsed / half_life))


def _radiopharmaceutical(header: Dataset) -> Dataset:
    items = require(header, "RadiopharmaceuticalInformationSequence")
    if len(items) != 1:
        raise ValueError(
            f"{source(header)}: {label('RadiopharmaceuticalInformationSequence')} has {len(items)} items, "
            "expected 1 (one injection)"
        )
    return items[0]


def _dose(header: Dataset) -> float:
    dose = positive(header, "RadionuclideTotalDose", "Bq", within=_radiopharmaceutical(header))
    if dose < _MIN_DOSE:
        raise ValueError(
            f"{source(header)}: {label('RadionuclideTotalDose')} is {dose:g}, which as Bq is too little to "
            "be seen; expected Bq; is it MBq?"
        )
    return dose


def _scan_start(headers: Sequence[Dataset], first_acquisition: datetime) -> datetime:
    """Returns the time that a START series is decay-corrected to.

    A derived series (reformatted, post-filtered) has the time of its making as series time: later than the
    acquisition. Then GE's private scan time is the reference; without it the reference is unknown.
    """
    name = f"{label('SeriesDate')}, {label('SeriesTime')}"
    series = same(headers, name, lambda h: moment(h, "SeriesDate", "SeriesTime"))
    if series <= first_acquisition + _CLOCK_TOLERANCE:
        return series
    scan = same(headers, "GE's scan time (0009,100D)", _ge_scan_time)
    if scan is None:
        raise ValueError(
            f"{source(headers[0])}: {name} is {series}, after the first acquisition at {first_acquisition} "
            "(a derived series), and GE's scan time (0009,100D) is missing: the time of decay correction is "
            "unknown"
        )
    if scan > first_acquisition + _CLOCK_TOLERANCE:
        raise ValueError(
            f"{source(headers[0])}: GE's scan time (0009,100D) is {scan}, after the first acquisition at "
            f"{first_acquisition}: the time of decay correction is unknown"
        )
    return scan


def _injection(headers: Sequence[Dataset], half_life: float, reference: datetime) -> datetime:
    """Returns the time of the injection; if only its time of day is known and is later than the reference, it was on
    the day before, and the scan ran past midnight."""
    from pydicom.valuerep import DT, TM

    time_name, moment_name = label("RadiopharmaceuticalStartTime"), label("RadiopharmaceuticalStartDateTime")
    times = same(
        headers, time_name, lambda h: optional(_radiopharmaceutical(h), "RadiopharmaceuticalStartTime", header=h)
    )
    moments = same(
        headers,
        moment_name,
        lambda h: optional(_radiopharmaceutical(h), "RadiopharmaceuticalStartDateTime", header=h),
    )
    first = headers[0]
    time = None if times is None else parsed(first, time_name, times, TM)
    if moments is not None:
        injected = _local(first, parsed(first, moment_name, moments, DT))
        if time is not None:
            apart = abs(datetime.combine(injected.date(), time) - injected)
            if apart > _CLOCK_TOLERANCE:
                raise ValueError(f"{source(first)}: {time_name} is {time}, but {moment_name} is {injected}")
        return injected
    if time is None:
        item = _radiopharmaceutical(first)
        time = parsed(first, time_name, require(first, "RadiopharmaceuticalStartTime", within=item), TM)
    if half_life > _MAX_HALF_LIFE_WITHOUT_DATE:
        raise ValueError(
            f"{source(first)}: {moment_name} is missing: with a half-life of {half_life:g} s the time of day "
            "alone doesn't tell the day of the injection"
        )
    injected = datetime.combine(reference.date(), time)
    return injected - timedelta(days=1) if injected > reference else injected


def _local(header: Dataset, value: datetime) -> datetime:
    """Removes the time zone: converts to the scanner's local time, in which the other fields are given."""
    from pydicom.valuerep import DT

    offset = optional(header, "TimezoneOffsetFromUTC")
    if value.tzinfo is not None and offset is not None:
        zone = parsed(header, label("TimezoneOffsetFromUTC"), f"20000101000000{offset}", DT).tzinfo
        value = value.astimezone(zone)
    # pydicom's DT has its own constructor, which datetime's methods don't know.
    return datetime(value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond)


def _private(header: Dataset, group: int, creator: str, element: int) -> Any:
    """Returns a private field's value, or None if it is absent; a file written without knowledge of the field stores
    bytes."""
    try:
        value = header.private_block(group, creator)[element].value
    except KeyError:
        return None
    return value.decode("ascii", "replace").strip(" \0") if isinstance(value, bytes) else value


def _ge_scan_time(header: Dataset) -> datetime | None:
    from pydicom.valuerep import DT

    value = _private(header, 0x0009, "GEMS_PETD_01", 0x0D)
    return None if not value else _local(header, parsed(header, "GE's scan time (0009,100D)", value, DT))


def _philips_scale(header: Dataset, element: int) -> float:
    """Returns a scale factor of Philips; 0 if it is absent or not a number, since Philips itself writes 0 for an
    absent factor."""
    try:
        scale = float(_private(header, 0x7053, "Philips PET Private Group", element) or 0)
    except (TypeError, ValueError):
        return 0.0
    return scale if np.isfinite(scale) and scale > 0 else 0.0


def _check_half_life(header: Dataset, half_life: float) -> None:
    item = _radiopharmaceutical(header)
    codes = optional(item, "RadionuclideCodeSequence", header=header)
    nuclide = str(optional(codes[0], "CodeMeaning", header=header) or "") if codes else ""
    # Files have 18F, F-18, ^18^Fluorine, Fluorine F^18^, …
    squeezed = re.sub("[^a-z0-9]", "", nuclide.lower())
    for (symbol, name, mass), expected in HALF_LIFE.items():
        spellings = (f"{mass}{symbol}", f"{symbol}{mass}", f"{mass}{name}", f"{name}{mass}")
        if squeezed.endswith(spellings) and abs(half_life / expected - 1) > 0.01:
            warnings.warn(
                f"{source(header)}: {label('RadionuclideHalfLife')} is {half_life:g} s, {nuclide}'s is "
                f"{expected:g} s; the header's value is used",
                stacklevel=4,
            )
