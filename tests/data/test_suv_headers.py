# SPDX-License-Identifier: Apache-2.0
"""A table of PET headers, vendor by units by decay correction by oddity of time: each gives the right factor, which
is computed here by hand, or is refused in a sentence; whatever was guessed or contradicts is said."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medaccel.data import suv_rule
from tests.data.dicom_series import DOSE_BQ, HALF_LIFE_S, WEIGHT_KG, injection, slices

F18 = HALF_LIFE_S
HOUR = 3600.0
#: F-18 an hour after the injection of 3.7e8 Bq into 70 kg.
BASE = 1000 * WEIGHT_KG / DOSE_BQ * 2 ** (HOUR / F18)
IN_ITEM = {
    *("RadionuclideTotalDose", "RadionuclideHalfLife", "RadionuclideCodeSequence", "Radiopharmaceutical"),
    *("RadiopharmaceuticalStartTime", "RadiopharmaceuticalStartDateTime", "RadiopharmaceuticalCodeSequence"),
}
VENDORS = {"GE": "GE MEDICAL SYSTEMS", "Siemens": "SIEMENS", "Philips": "Philips Medical Systems", "other": "ACME"}
CREATORS = {0x0009: "GEMS_PETD_01", 0x0071: "SIEMENS MED PT", 0x7053: "Philips PET Private Group"}


def after(seconds: float, half_life: float = F18, weight: float = WEIGHT_KG, dose: float = DOSE_BQ) -> float:
    """The factor by the textbook: so many seconds after the injection."""
    return 1000 * weight / (dose * math.exp(-math.log(2) * seconds / half_life))


def in_frame(duration: float, half_life: float = F18) -> float:
    """The activity at a frame's start by its average, by integrating the decay numerically."""
    t = (np.arange(200_000) + 0.5) / 200_000 * duration
    return 1 / float(np.mean(0.5 ** (t / half_life)))


def average_at(duration: float, half_life: float = F18) -> float:
    return math.log2(in_frame(duration, half_life)) * half_life


def mean_of(man: float, woman: float) -> float:
    return (man + woman) / 2


def code(value: str, scheme: str, meaning: str) -> list[Dataset]:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return [item]


@dataclass
class Case:
    """One header: fields that differ from `slices()`, and the factor or the refusal, and what is warned of."""

    name: str
    fields: dict[str, Any]
    factor: float | list[float] | None = None
    refused: str | None = None
    warned: tuple[str, ...] = ()
    vendor: str = "other"
    private: dict[tuple[int, int], Any] = field(default_factory=dict)
    creator: bool = True
    kind: str = "bw"
    per_slice: Callable[[int], dict[str, Any]] | None = None
    tolerance: float = 1e-6

    def headers(self) -> list[Dataset]:
        def edit(ds: Dataset, k: int) -> None:
            ds.filename = f"slice{k}.dcm"
            ds.Manufacturer = VENDORS[self.vendor]
            more = {} if self.per_slice is None else self.per_slice(k)
            for keyword, value in {**self.fields, **more}.items():
                item = injection(ds) if keyword in IN_ITEM else ds
                if value is None:
                    if keyword in item:
                        delattr(item, keyword)
                else:
                    setattr(item, keyword, value)
            for (group, element), value in self.private.items():
                vr = "DT" if group != 0x7053 else "DS"
                if self.creator:
                    ds.private_block(group, CREATORS[group], create=True).add_new(element, vr, value)
                else:
                    ds.add_new((group, 0x1000 + element), vr, value)

        return slices(edit)


GE_SCAN, SIEMENS_SCAN, PHILIPS_SUV, PHILIPS_ACTIVITY = (0x9, 0x0D), (0x71, 0x22), (0x7053, 0), (0x7053, 9)
NONE = {"DecayCorrection": "NONE", "CorrectedImage": ["ATTN"]}
LATE = {"SeriesTime": "150000"}
TALL = {"PatientSize": 1.75}


def beds(k: int) -> dict[str, Any]:
    """Two beds of 5 min from 11:00 on, at each of which activity is measured for 5 min."""
    return {"AcquisitionTime": "110000" if k < 3 else "110500", "ActualFrameDuration": 300000}


def beds_with_reference(to_average: bool) -> Callable[[int], dict[str, Any]]:
    extra = average_at(300) if to_average else 0.0
    return lambda k: {**beds(k), "FrameReferenceTime": 1000 * (extra + (0 if k < 3 else 300))}


def whole_scan(k: int) -> dict[str, Any]:
    """Every slice, as GE writes them, has the scan's start, and only the frame reference time tells the bed."""
    return {"FrameReferenceTime": 0 if k < 3 else 300000, "ActualFrameDuration": 300000}


def factors_of(k: int, seconds: float) -> str:
    return f"{2 ** (seconds / F18) * in_frame(300):.6f}"


def per_bed(first: float, second: float) -> list[float]:
    return [first] * 3 + [second] * 3


HOUR_LATER = "11:00:00"
CASES = [
    # --- START: whose time ---
    *(Case(f"{v}: series time", {}, BASE, vendor=v) for v in VENDORS),
    *(Case(f"{v}: two beds, series time", {}, BASE, vendor=v, per_slice=beds) for v in VENDORS),
    Case("Siemens: beds and reference times fit", {}, BASE, vendor="Siemens", per_slice=beds_with_reference(True)),
    Case("GE: beds and reference times fit", {}, BASE, vendor="GE", per_slice=beds_with_reference(False)),
    Case("GE: all slices have the scan's start", {}, BASE, vendor="GE", per_slice=whole_scan),
    Case(
        "GE: the same, decay factors fit",
        {},
        BASE,
        vendor="GE",
        per_slice=lambda k: {**whole_scan(k), "DecayFactor": factors_of(k, 0 if k < 3 else 300)},
    ),
    Case("frame reference time 0", {"FrameReferenceTime": 0, "ActualFrameDuration": 300000}, BASE, vendor="Siemens"),
    *(
        Case(
            f"{v}: later series, reference times to the average",
            LATE,
            BASE,
            vendor=v,
            per_slice=beds_with_reference(True),
        )
        for v in ("Siemens", "Philips", "other")
    ),
    Case(
        "GE: later series, reference times to the start",
        LATE,
        BASE,
        vendor="GE",
        per_slice=beds_with_reference(False),
    ),
    Case("GE: later series, all slices have the scan's start", LATE, BASE, vendor="GE", per_slice=whole_scan),
    Case(
        "later series, nothing else", LATE, refused=r"derived series\), and GE's scan time \(0009,100D\) is missing"
    ),
    Case(
        "later series, decay factors alone",
        LATE,
        BASE,
        warned=("found from DecayFactor",),
        per_slice=lambda k: {**beds(k), "DecayFactor": factors_of(k, 0 if k < 3 else 300)},
        tolerance=1e-5,
    ),
    Case(
        "later series, reference times contradict each other",
        LATE,
        refused="derived series",
        per_slice=lambda k: {**beds(k), "FrameReferenceTime": 150000 + 1000 * k * k * 40},
    ),
    Case("GE: private time, series later", LATE, BASE, vendor="GE", private={GE_SCAN: "20240229110000"}),
    Case("GE: no creator", LATE, BASE, vendor="GE", private={GE_SCAN: "20240229110000.00"}, creator=False),
    Case("no creator, not GE's", LATE, refused="is missing", private={GE_SCAN: "20240229110000"}, creator=False),
    Case(
        "GE: private time, series 10 minutes early",
        {"SeriesTime": "105000"},
        BASE,
        vendor="GE",
        private={GE_SCAN: "20240229110000"},
        warned=("SeriesTime .* 10:50:00, but GE's scan time .* 11:00:00 .*6.5%",),
    ),
    Case(
        "GE: private time, later bed's acquisition",
        {**LATE, "AcquisitionTime": "113000", "FrameReferenceTime": 150000, "ActualFrameDuration": 300000},
        BASE,
        vendor="GE",
        private={GE_SCAN: "20240229110000"},
        warned=("FrameReferenceTime .* 11:27:30, but GE's scan time .* 11:00:00",),
    ),
    Case(
        "GE: private time after the scan",
        LATE,
        refused="11:05:00, after the first acquisition",
        vendor="GE",
        private={GE_SCAN: "20240229110500"},
    ),
    Case(
        "GE: private time of another day",
        LATE,
        refused="long before the first acquisition",
        vendor="GE",
        private={GE_SCAN: "20230101110000"},
    ),
    Case(
        "GE: private time that kept its date in anonymisation",
        {},
        BASE,
        vendor="GE",
        private={GE_SCAN: "20010101110000"},
        warned=("only the former's time of day is used",),
    ),
    Case(
        "Siemens: private time, series later", LATE, BASE, vendor="Siemens", private={SIEMENS_SCAN: "20240229110000"}
    ),
    Case(
        "series early, reference times contradict, no decay factor",
        {"SeriesTime": "105000", "FrameReferenceTime": 1000 * average_at(300), "ActualFrameDuration": 300000},
        refused=r"at 2024-02-29 10:50:00, but FrameReferenceTime .* 11:00:00.*DecayFactor .* doesn't tell",
    ),
    Case(
        "series early, decay factor fits the reference times",
        {
            "SeriesTime": "105000",
            "FrameReferenceTime": 1000 * average_at(300),
            "ActualFrameDuration": 300000,
            "DecayFactor": f"{in_frame(300):.5f}",
        },
        BASE,
        warned=("fits FrameReferenceTime",),
        tolerance=1e-5,
    ),
    Case(
        "series early, decay factor fits it",
        {
            "SeriesTime": "105000",
            "FrameReferenceTime": 1000 * average_at(300),
            "ActualFrameDuration": 300000,
            "DecayFactor": f"{in_frame(300) * 2 ** (600 / F18):.5f}",
        },
        after(3000),
        warned=("fits SeriesDate",),
    ),
    Case(
        "decay factor contradicts",
        {"DecayFactor": "1.45951", "ActualFrameDuration": 1200000},
        BASE,
        warned=(r"DecayFactor \(0054,1321\) is 1.45951, but a decay correction to .* has 1.064",),
    ),
    Case(
        "decay factor of a known case",
        {"AcquisitionTime": "114959", "DecayFactor": "1.45951", "ActualFrameDuration": 1200000},
        BASE,
        vendor="Siemens",
    ),
    Case(
        "decay factor without the frame's part",
        {"AcquisitionTime": "114959", "DecayFactor": f"{2 ** (2999 / F18):.5f}", "ActualFrameDuration": 1200000},
        BASE,
    ),
    # --- ADMIN ---
    *(Case(f"{v}: ADMIN", {"DecayCorrection": "ADMIN"}, after(0), vendor=v) for v in VENDORS),
    Case(
        "ADMIN, decay factor fits", {"DecayCorrection": "ADMIN", "DecayFactor": f"{2 ** (HOUR / F18):.6f}"}, after(0)
    ),
    Case(
        "ADMIN, decay factor doesn't",
        {"DecayCorrection": "ADMIN", "DecayFactor": "1.02"},
        after(0),
        warned=("DecayFactor .* is 1.02, but a decay correction to 2024-02-29 10:00:00",),
    ),
    # --- NONE ---
    *(
        Case(
            f"{v}: NONE, two beds",
            NONE,
            per_bed(in_frame(300) * after(3600), in_frame(300) * after(3900)),
            vendor=v,
            per_slice=beds,
        )
        for v in VENDORS
    ),
    Case("NONE, 10 minutes", {**NONE, "ActualFrameDuration": 603000}, in_frame(603) * BASE),
    Case(
        "NONE, C-11",
        {**NONE, "ActualFrameDuration": 1200000, "RadionuclideHalfLife": 1221.8, "RadionuclideCodeSequence": None},
        in_frame(1200, 1221.8) * after(3600, 1221.8),
    ),
    Case("NONE, no duration", NONE, refused=r"slice0.dcm: ActualFrameDuration \(0018,1242\) is missing"),
    Case("NONE, duration 0", {**NONE, "ActualFrameDuration": 0}, refused="ActualFrameDuration .* in ms"),
    Case(
        "NONE, decay factor",
        {**NONE, "ActualFrameDuration": 300000, "DecayFactor": "1.2"},
        in_frame(300) * BASE,
        warned=("DecayFactor .* is 1.2, but DecayCorrection .* is NONE",),
    ),
    Case(
        "GE: NONE, all slices have the scan's start",
        NONE,
        per_bed(in_frame(300) * after(3600), in_frame(300) * after(3900)),
        vendor="GE",
        per_slice=whole_scan,
        warned=("is that of all slices, but by FrameReferenceTime",),
    ),
    Case("NONE, but DECY", {"DecayCorrection": "NONE", "ActualFrameDuration": 300000}, refused="expected DECY in it"),
    # --- Philips's counts ---
    Case("Philips: SUV scale", {"Units": "CNTS"}, 0.0005, vendor="Philips", private={PHILIPS_SUV: "0.0005"}),
    Case(
        "Philips: SUV scale, no creator",
        {"Units": "CNTS"},
        0.0005,
        vendor="Philips",
        private={PHILIPS_SUV: "0.0005"},
        creator=False,
    ),
    Case(
        "Philips: activity scale, no creator",
        {"Units": "CNTS"},
        2.5 * BASE,
        vendor="Philips",
        private={PHILIPS_ACTIVITY: "2.5"},
        creator=False,
    ),
    Case(
        "counts, no creator, not Philips's",
        {"Units": "CNTS"},
        refused=r"7053,1000.*7053,1009.*Manufacturer .* ACME",
        private={PHILIPS_SUV: "0.0005"},
        creator=False,
    ),
    Case("Philips: neither", {"Units": "CNTS"}, refused=r"\(7053,1000\) nor its .*\(7053,1009\)", vendor="Philips"),
    Case(
        "Philips: SUV scale 0",
        {"Units": "CNTS"},
        2.5 * BASE,
        vendor="Philips",
        private={PHILIPS_SUV: "0", PHILIPS_ACTIVITY: "2.5"},
    ),
    Case(
        "Philips: scales that agree",
        {"Units": "CNTS"},
        2.5 * BASE,
        vendor="Philips",
        private={PHILIPS_SUV: f"{2.5 * BASE:.10f}", PHILIPS_ACTIVITY: "2.5"},
    ),
    Case(
        "Philips: scales that don't",
        {"Units": "CNTS"},
        0.001,
        vendor="Philips",
        private={PHILIPS_SUV: "0.001", PHILIPS_ACTIVITY: "2.5"},
        warned=("gives a factor of 0.001, but",),
    ),
    Case(
        "Philips: activity scale, NONE",
        {"Units": "CNTS", **NONE},
        vendor="Philips",
        per_slice=beds,
        factor=per_bed(2.5 * in_frame(300) * after(3600), 2.5 * in_frame(300) * after(3900)),
        private={PHILIPS_ACTIVITY: "2.5"},
    ),
    Case(
        "Philips: activity scale, ADMIN",
        {"Units": "CNTS", "DecayCorrection": "ADMIN"},
        2.5 * after(0),
        vendor="Philips",
        private={PHILIPS_ACTIVITY: "2.5"},
    ),
    Case(
        "Philips: to Bq/mL", {"Units": "CNTS"}, 2.5, vendor="Philips", private={PHILIPS_ACTIVITY: "2.5"}, kind="bqml"
    ),
    Case(
        "Philips: SUV scale alone to Bq/mL",
        {"Units": "CNTS"},
        refused=r"\(7053,1009\) is missing",
        vendor="Philips",
        private={PHILIPS_SUV: "0.0005"},
        kind="bqml",
    ),
    # --- Units ---
    Case("GML", {"Units": "GML"}, 1.0),
    Case("GML BW", {"Units": "GML", "SUVType": "BW", "PatientWeight": None}, 1.0),
    Case(
        "GML James, man",
        {"Units": "GML", "SUVType": "LBMJAMES128", "PatientSex": "M", **TALL},
        70 / (1.10 * 70 - 128 * (70 / 175) ** 2),
    ),
    Case(
        "GML James, woman",
        {"Units": "GML", "SUVType": "LBMJAMES128", "PatientSex": "F", **TALL},
        70 / (1.07 * 70 - 148 * (70 / 175) ** 2),
    ),
    Case(
        "GML James, other",
        {"Units": "GML", "SUVType": "LBMJAMES128", "PatientSex": "O", **TALL},
        70 / mean_of(1.10 * 70 - 128 * 0.16, 1.07 * 70 - 148 * 0.16),
        warned=("PatientSex .* is O",),
    ),
    Case(
        "GML Janma, man",
        {"Units": "GML", "SUVType": "LBMJANMA", "PatientSex": "M", **TALL},
        (6680 + 216 * 70 / 1.75**2) / 9270,
    ),
    Case(
        "GML Janma, woman",
        {"Units": "GML", "SUVType": "LBMJANMA", "PatientSex": "F", **TALL},
        (8780 + 244 * 70 / 1.75**2) / 9270,
    ),
    Case(
        "GML LBM",
        {"Units": "GML", "SUVType": "LBM", "PatientSex": "M", **TALL},
        70 / (1.10 * 70 - 120 * 0.16),
        warned=("is LBM, .* 120; .* 128",),
    ),
    Case("GML IBW, man", {"Units": "GML", "SUVType": "IBW", "PatientSex": "M", **TALL}, 70 / (48 + 1.06 * 23)),
    Case("GML IBW, woman", {"Units": "GML", "SUVType": "IBW", "PatientSex": "F", **TALL}, 70 / (45.5 + 0.91 * 23)),
    Case("GML IBW, no sex", {"Units": "GML", "SUVType": "IBW", **TALL}, refused="PatientSex .* is missing"),
    Case(
        "GML IBW, sex U", {"Units": "GML", "SUVType": "IBW", "PatientSex": "U", **TALL}, refused="PatientSex .* is U"
    ),
    Case(
        "GML IBW, no height", {"Units": "GML", "SUVType": "IBW", "PatientSex": "M"}, refused="PatientSize .* missing"
    ),
    Case(
        "GML IBW, height 0",
        {"Units": "GML", "SUVType": "IBW", "PatientSex": "M", "PatientSize": 0},
        refused="PatientSize .* missing or 0",
    ),
    Case(
        "GML James, height in cm",
        {"Units": "GML", "SUVType": "LBMJAMES128", "PatientSex": "M", "PatientSize": 175},
        70 / (1.10 * 70 - 128 * 0.16),
        warned=("taken for cm",),
    ),
    Case("GML BSA", {"Units": "GML", "SUVType": "BSA"}, refused="SUVType .* is BSA with units GML"),
    Case("GML of another type", {"Units": "GML", "SUVType": "FFM"}, refused="SUVType .* is FFM"),
    Case("CM2ML", {"Units": "CM2ML", "SUVType": "BSA", **TALL}, 70000 / (71.84 * 70**0.425 * 175**0.725)),
    Case("CM2ML, no type", {"Units": "CM2ML", **TALL}, 70000 / (71.84 * 70**0.425 * 175**0.725)),
    Case("CM2ML, no height", {"Units": "CM2ML"}, refused="PatientSize .* missing"),
    Case("CM2ML BW", {"Units": "CM2ML", "SUVType": "BW"}, refused="SUVType .* is BW with units CM2ML"),
    *(Case(u, {"Units": u}, refused=f"Units .* is {u}, expected") for u in ("PROPCNTS", "PROPCPS", "CPS", "NONE")),
    Case("GML to Bq/mL", {"Units": "GML"}, refused="can't be converted to Bq/mL", kind="bqml"),
    Case("to lean mass", {"PatientSex": "F", **TALL}, BASE * 9270 / (8780 + 244 * 70 / 1.75**2), kind="lbm"),
    Case("to James's lean mass", {"PatientSex": "M", **TALL}, BASE * (77 - 128 * 0.16) / 70, kind="lbm_james"),
    Case("to surface", TALL, BASE * 71.84 * 70**0.425 * 175**0.725 / 70000, kind="bsa"),
    Case("to ideal weight", {"PatientSex": "M", **TALL}, BASE * (48 + 1.06 * 23) / 70, kind="ibw"),
    Case("to lean mass without height", {"PatientSex": "M"}, refused="PatientSize .* missing", kind="lbm"),
    # --- Dose and weight ---
    *(
        Case(f"{mbq} MBq", {"RadionuclideTotalDose": mbq}, after(HOUR, dose=mbq * 1e6), warned=("taken for MBq",))
        for mbq in (74, 185.5, 370, 5200)
    ),
    Case("10 (MBq or mCi)", {"RadionuclideTotalDose": 10}, refused="MBq, GBq or mCi"),
    Case("0.37 (GBq)", {"RadionuclideTotalDose": 0.37}, refused="MBq, GBq or mCi"),
    Case("370000 (kBq)", {"RadionuclideTotalDose": 370000}, refused="is it kBq"),
    Case("negative dose", {"RadionuclideTotalDose": -3.7e8}, refused="expected a positive number of Bq"),
    Case("dose of 1e20", {"RadionuclideTotalDose": "1e20"}, refused="more than any patient gets"),
    Case("weight in grams", {"PatientWeight": 70000}, BASE, warned=("taken for grams: 70 kg",)),
    Case("weight of 400", {"PatientWeight": 400}, refused="as pounds it would be 181 kg"),
    Case(
        "weight in pounds",
        {"PatientWeight": 240, **TALL},
        after(HOUR, weight=240),
        warned=("pounds it would be 109",),
    ),
    Case("weight in tonnes", {"PatientWeight": 0.07, **TALL}, refused="as kg is impossible"),
    Case("a mouse", {"PatientWeight": 0.025}, after(HOUR, weight=0.025), warned=("only a small animal",)),
    Case("weight of 0", {"PatientWeight": 0}, refused="PatientWeight .* is 0.*, expected a positive number of kg"),
    Case("weight of 0 to Bq/mL", {"PatientWeight": 0}, 1.0, kind="bqml"),
    # --- Times ---
    Case(
        "fractions of a second",
        {"SeriesTime": "110000.75", "AcquisitionTime": "110000.750000", "RadiopharmaceuticalStartTime": "100000.25"},
        after(3600.5),
        tolerance=1e-9,
    ),
    Case(
        "past midnight",
        {"RadiopharmaceuticalStartTime": "233000", "SeriesTime": "003000", "AcquisitionTime": "003000"},
        BASE,
    ),
    Case(
        "past midnight, with dates",
        {
            "RadiopharmaceuticalStartTime": None,
            "SeriesTime": "003000",
            "RadiopharmaceuticalStartDateTime": "20240228233000",
            "AcquisitionTime": "003000",
        },
        BASE,
    ),
    Case(
        "AcquisitionDateTime alone",
        {"AcquisitionDate": None, "AcquisitionTime": None, "AcquisitionDateTime": "20240229110000.5"},
        BASE,
    ),
    Case(
        "NONE, AcquisitionDateTime alone",
        {
            **NONE,
            "AcquisitionDate": None,
            "AcquisitionTime": None,
            "ActualFrameDuration": 300000,
            "AcquisitionDateTime": "20240229111000",
        },
        in_frame(300) * after(4200),
    ),
    Case(
        "AcquisitionDateTime contradicts",
        {**NONE, "ActualFrameDuration": 300000, "AcquisitionDateTime": "20240229120000"},
        in_frame(300) * BASE,
        warned=("AcquisitionDateTime .* 12:00:00, but",),
    ),
    Case(
        "AcquisitionDateTime without time",
        {"AcquisitionTime": None, "AcquisitionDateTime": "20240229"},
        refused="AcquisitionDateTime .* expected a date with the time of day",
    ),
    Case("injection by date and time", {"RadiopharmaceuticalStartDateTime": "20240229100000.00"}, BASE),
    Case("the date of injection alone", {"RadiopharmaceuticalStartDateTime": "20240229"}, BASE),
    Case(
        "injection in UTC",
        {"RadiopharmaceuticalStartDateTime": "20240229090000+0000", "TimezoneOffsetFromUTC": "+0100"},
        BASE,
    ),
    Case(
        "injection in UTC, time zone unknown",
        {"RadiopharmaceuticalStartDateTime": "20240229100000+0000", "RadiopharmaceuticalStartTime": None},
        BASE,
        warned=("TimezoneOffsetFromUTC .* is missing",),
    ),
    Case(
        "time and date-time contradict",
        {"RadiopharmaceuticalStartDateTime": "20240229093000"},
        refused="StartTime .* is 10.*, but .*09:30",
    ),
    Case(
        "injection with an anonymised date",
        {"RadiopharmaceuticalStartDateTime": "19000101100000"},
        BASE,
        warned=("only the time of day is used",),
    ),
    Case(
        "acquisition with an anonymised date",
        {
            "RadiopharmaceuticalStartDateTime": "20240228233000",
            "RadiopharmaceuticalStartTime": "233000",
            "SeriesDate": "19000101",
            "AcquisitionDate": "19000101",
            "SeriesTime": "003000",
            "AcquisitionTime": "003000",
        },
        BASE,
        warned=("only the time of day is used",),
    ),
    Case(
        "injection after the scan", {"RadiopharmaceuticalStartTime": "110500"}, refused="expected 0 to 10 half-lives"
    ),
    Case(
        "injection during a dynamic frame",
        {"RadiopharmaceuticalStartTime": "110030", "ActualFrameDuration": 60000},
        after(-30),
    ),
    Case(
        "injection seven half-lives ago",
        {"RadiopharmaceuticalStartTime": "220000"},
        after(13 * HOUR),
        warned=("7.1 half-lives before",),
    ),
    Case("no time of injection", {"RadiopharmaceuticalStartTime": None}, refused="StartTime .* is missing"),
    Case("a scan of eleven days", {**NONE, "ActualFrameDuration": 999999999}, refused="ActualFrameDuration .* in ms"),
    Case("a senseless frame reference time", {"FrameReferenceTime": "1e30"}, BASE),
    Case(
        "the first day of all",
        {
            "SeriesDate": "00010101",
            "AcquisitionDate": "00010101",
            "SeriesTime": "000500",
            "AcquisitionTime": "000500",
            "RadiopharmaceuticalStartTime": "235000",
        },
        refused="a date of the header is out of range",
    ),
    Case(
        "injection in UTC, senseless time zone",
        {"RadiopharmaceuticalStartDateTime": "20240229090000+0000", "TimezoneOffsetFromUTC": "CET"},
        refused="TimezoneOffsetFromUTC .* expected one time zone",
    ),
    # --- Nuclides ---
    *(
        Case(
            f"{name} three days later, half-life {'of the code' if coded else 'stated'}",
            {
                "RadionuclideHalfLife": None if coded else half_life,
                "RadionuclideCodeSequence": code(value, scheme, meaning),
                "RadiopharmaceuticalStartDateTime": "20240226100000",
            },
            after(73 * HOUR, half_life),
            warned=("RadionuclideHalfLife .* is missing",) if coded else (),
        )
        for name, value, scheme, meaning, half_life in (
            ("Y-90", "C-162A7", "SRT", "^90^Yttrium", 230580.0),
            ("I-124", "40937006", "SCT", "^124^Iodine", 360806.0),
            ("Zr-89", "C-168A4", "SNM3", "89Zr", 282276.0),
        )
        for coded in (False, True)
    ),
    Case(
        "Zr-89 without a date",
        {"RadionuclideHalfLife": 282276.0, "RadionuclideCodeSequence": None},
        refused="StartDateTime .* is missing",
    ),
    Case(
        "Zr-89 with an anonymised date",
        {
            "RadionuclideHalfLife": 282276.0,
            "RadionuclideCodeSequence": None,
            "RadiopharmaceuticalStartDateTime": "19000101100000",
        },
        refused="expected 0 to 10 half-lives",
    ),
    *(
        Case(
            f"{meaning or value} in {scheme}, by code",
            {"RadionuclideHalfLife": None, "RadionuclideCodeSequence": code(value, scheme, meaning)},
            after(HOUR, half_life),
            warned=("RadionuclideHalfLife .* is missing",),
        )
        for value, scheme, meaning, half_life in (
            ("C-111A1", "SRT", "", F18),
            ("C-131A3", "99SDM", "68Ga", 4062.6),
            ("C-105A1", "SNM3", "^11^Carbon", 1221.8),
            ("", "99X", "Fluorine F^18^", F18),
            ("3932008", "SCT", "^64^Copper", 45723.6),
        )
        if half_life < 6 * HOUR
    ),
    Case(
        "no half-life, no nuclide",
        {"RadionuclideHalfLife": None, "RadionuclideCodeSequence": None},
        refused="HalfLife .* is missing, and neither",
    ),
    Case(
        "no half-life, FDG",
        {
            "RadionuclideHalfLife": None,
            "RadionuclideCodeSequence": None,
            "RadiopharmaceuticalCodeSequence": code("C-B1031", "SRT", "Fluorodeoxyglucose F^18^"),
        },
        BASE,
        warned=("F-18's is taken",),
    ),
    Case(
        "no half-life, code and name contradict",
        {"RadionuclideHalfLife": None, "RadionuclideCodeSequence": code("C-131A3", "SRT", "^18^Fluorine")},
        refused="code C-131A3 of Ga-68, but",
    ),
    Case("half-life in minutes", {"RadionuclideHalfLife": 109.77}, refused="is 109.77 s, F-18's is 6586.2"),
    Case("half-life of another nuclide", {"RadionuclideHalfLife": 4062.6}, refused="expected them to agree"),
    Case(
        "half-life two hundredths off",
        {"RadionuclideHalfLife": 6700.0},
        after(HOUR, 6700),
        warned=("6700 s, F-18's",),
    ),
]


def test_the_table_is_long_and_its_names_are_unique() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_header_gives_the_right_factor_or_a_sentence(case: Case) -> None:
    headers = case.headers()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if case.refused is not None:
            with pytest.raises(ValueError, match=case.refused) as error:
                suv_rule(headers, case.kind)  # type: ignore[arg-type]
            assert "slice" in str(error.value)  # the file is named
            return
        rule = suv_rule(headers, case.kind)  # type: ignore[arg-type]
    np.testing.assert_allclose(rule.factors, np.broadcast_to(case.factor, len(headers)), rtol=case.tolerance)
    said = [str(w.message) for w in caught if w.category is UserWarning and w.filename == __file__]
    assert tuple(said) == rule.warnings
    assert len(said) == len(case.warned), said
    for pattern, sentence in zip(case.warned, said, strict=True):
        assert re.search(pattern, sentence), sentence
