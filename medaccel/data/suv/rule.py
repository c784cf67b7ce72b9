# SPDX-License-Identifier: Apache-2.0
"""Computes standardised uptake values (SUV) from the header of a PET series, and says by which rule.

    SUV = activity concentration [Bq/mL] · weight [g] / (dose [Bq] · 2^(-Δt / T½))

where the dose has decayed from the injection to the time that the image is decay-corrected to. The field
DecayCorrection states this time (DICOM PS3.3 C.8.9.1; the rules are those of QIBA's SUV consensus pseudocode and of
IBSI's manual "Standardizing SUV computation"):

- START: the start of the scan, which `medaccel.data.suv.times.scan_start` finds;
- ADMIN: the injection itself, Δt = 0;
- NONE: no correction was made: a slice's value is the average over its frame, which the activity equals T_ave after
  the frame's start.

docs/suv.md has all rules in a table.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medaccel.data._fields import label, optional, require, same, source
from medaccel.data.suv.clock import TOLERANCE
from medaccel.data.suv.findings import Findings
from medaccel.data.suv.injection import injection
from medaccel.data.suv.nuclides import half_life as read_half_life
from medaccel.data.suv.patient import KINDS, SUV_TYPES, UNIT, WORDS, radiopharmaceutical, read_dose, read_patient
from medaccel.data.suv.times import Frames, check_decay_factor, decay_factors, frame_averages, read_frames, scan_start
from medaccel.data.suv.vendors import PHILIPS_ACTIVITY_SCALE, PHILIPS_SUV_SCALE, is_made_by, philips_scales

if TYPE_CHECKING:
    from pydicom import Dataset

Kind = Literal["bw", "lbm", "lbm_james", "bsa", "ibw"]
_SPELLINGS = {"BQ/ML": "BQML", "G/ML": "GML", "CM2/ML": "CM2ML"}


@dataclass(frozen=True)
class SuvRule:
    """Says how a series' values become SUV, or Bq/mL.

    Attributes:
        factors: the factors from the rescaled values to the result, one per slice, float64.
        kind: the normalisation of SUV (bw, lbm, lbm_james, bsa, ibw), or bqml for Bq/mL.
        units: the header's units.
        decay_correction: START, ADMIN or NONE; None where no dose was needed.
        reference: the time that the values are decay-corrected to, a date and time or words.
        origin: where the reference was found.
        inputs: weight, dose and the like, as they were used.
        warnings: sentences, which were also given as warnings.
    """

    factors: np.ndarray  # (slices,)
    kind: str
    units: str
    decay_correction: str | None = None
    reference: str | None = None
    origin: str | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def quantity(self) -> str:
        """Returns the result's name and unit, such as `SUV body weight (g/mL)`."""
        if self.kind == "bqml":
            return "activity concentration (Bq/mL)"
        return f"SUV {WORDS[self.kind]} ({UNIT[self.kind]})"

    @property
    def sentence(self) -> str:
        """Returns the rule in a sentence."""
        low, high = float(self.factors.min()), float(self.factors.max())
        span = (
            f"factor {low:.6g}" if low == high else f"factors {low:.6g} to {high:.6g} over {len(self.factors)} slices"
        )
        when = ""
        if self.decay_correction is not None:
            by = "" if self.origin is None else f" (from {self.origin})"
            when = f", decay correction {self.decay_correction}, reference {self.reference}{by}"
        return f"{self.quantity} from {self.units}{when}, {span}"

    def plain(self) -> dict[str, Any]:
        """Returns the content of `suv.json`."""
        return {
            "quantity": self.quantity,
            "kind": self.kind,
            "units": self.units,
            "decay_correction": self.decay_correction,
            "reference_time": self.reference,
            "reference_time_source": self.origin,
            "factor": {
                "min": float(self.factors.min()),
                "max": float(self.factors.max()),
                "slices": len(self.factors),
            },
            "inputs": self.inputs,
            "warnings": list(self.warnings),
        }


def suv_factors(headers: Sequence[Dataset], kind: Kind = "bw") -> np.ndarray:
    """Returns the factors of `suv_rule` from the rescaled values of a PET series to SUV, one per slice, float64; its
    arguments, errors and warnings are the same."""
    rule = _rule(headers, kind)
    _tell(rule, stacklevel=3)
    return rule.factors


def suv_rule(headers: Sequence[Dataset], kind: Kind | Literal["bqml"] = "bw") -> SuvRule:
    """Finds the rule by which the rescaled values of a PET series become SUV.

    Units BQML needs PatientWeight, DecayCorrection, the times, and of RadiopharmaceuticalInformationSequence the
    dose, the half-life and the injection time. GML and CM2ML are SUV already, of the kind that SUVType says; another
    kind needs weight, height and sex. CNTS needs Philips's SUV scale factor (7053,1000), else the activity scale
    factor (7053,1009) and the fields of BQML.

    Args:
        headers: the headers of the slices of one series.
        kind: normalised by body weight (bw), lean body mass (lbm by Janmahasatian's formula, lbm_james by James's),
            body surface area (bsa) or ideal body weight (ibw); or bqml for Bq/mL, which needs no dose.

    Raises:
        ValueError: a field is missing, invalid or differs between slices; other units; times that contradict each
            other; the reference time is unknown. The message names the file and the field.

    Warns:
        UserWarning: what was read otherwise than it is written (a dose in MBq, a weight in grams), what contradicts
            the rule, and corrections that are missing.
    """
    rule = _rule(headers, kind)
    _tell(rule, stacklevel=3)
    return rule


def _tell(rule: SuvRule, *, stacklevel: int) -> None:
    for sentence in rule.warnings:
        warnings.warn(sentence, stacklevel=stacklevel)


def _rule(headers: Sequence[Dataset], kind: str) -> SuvRule:
    if not headers:
        raise ValueError("suv_factors: no headers given, expected those of a series")
    try:
        return _by_units(headers, kind)
    except OverflowError as error:  # the years 1 and 9999 have no yesterday and no tomorrow
        raise ValueError(f"{source(headers[0])}: a date of the header is out of range ({error})") from error


def _by_units(headers: Sequence[Dataset], kind: str) -> SuvRule:
    if kind not in (*KINDS, "bqml"):
        raise ValueError(f"suv is {kind!r}, expected {', '.join(KINDS)} or bqml")
    findings = Findings()
    units = same(headers, label("Units"), lambda h: str(require(h, "Units")).strip().upper())
    units = _SPELLINGS.get(units, units)
    if kind == "bqml":
        return SuvRule(_to_concentration(headers, units), kind, units)
    corrected = optional(headers[0], "CorrectedImage") or ()
    corrections = {corrected} if isinstance(corrected, str) else set(corrected)
    if corrections and "ATTN" not in corrections:
        findings.warn(
            f"{source(headers[0])}: {label('CorrectedImage')} lacks ATTN: without attenuation correction "
            "SUVs are wrong"
        )
    if units in ("GML", "CM2ML"):
        return _from_suv(headers, units, kind, findings)
    if units == "CNTS":
        return _from_counts(headers, kind, corrections, findings)
    if units != "BQML":
        raise ValueError(f"{source(headers[0])}: {label('Units')} is {units}, expected BQML, GML, CM2ML or CNTS")
    return _from_concentration(headers, units, kind, corrections, findings)


def _to_concentration(headers: Sequence[Dataset], units: str) -> np.ndarray:
    if units == "BQML":
        return np.ones(len(headers))
    if units == "CNTS":
        scales = [philips_scales(h)[1] for h in headers]
        if None not in scales:
            return np.array(scales, dtype=np.float64)
        raise ValueError(
            f"{source(headers[scales.index(None)])}: {label('Units')} is CNTS and Philips's "
            f"{PHILIPS_ACTIVITY_SCALE} is missing, which leads to Bq/mL"
        )
    raise ValueError(f"{source(headers[0])}: {label('Units')} is {units}, which can't be converted to Bq/mL")


def _converted(
    headers: Sequence[Dataset], stored: str, kind: str, findings: Findings
) -> tuple[float, dict[str, Any]]:
    """Returns the factor from SUV of one kind to those of another, and what it was computed from."""
    if stored == kind:
        return 1.0, {}
    patient = read_patient(headers, findings)
    factor = patient.norm(kind, findings) / patient.norm(stored, findings)
    return factor, {"weight_kg": patient.weight, "height_m": patient.height, "sex": patient.sex}


def _from_suv(headers: Sequence[Dataset], units: str, kind: str, findings: Findings) -> SuvRule:
    name = label("SUVType")
    default = "BSA" if units == "CM2ML" else "BW"
    stated = same(headers, name, lambda h: str(optional(h, "SUVType") or default).strip().upper())
    stored = SUV_TYPES.get(stated)
    if stored is None or (stored == "bsa") != (units == "CM2ML"):
        expected = "BSA" if units == "CM2ML" else ", ".join(t for t in SUV_TYPES if t != "BSA")
        raise ValueError(f"{source(headers[0])}: {name} is {stated} with units {units}, expected {expected}")
    factor, inputs = _converted(headers, stored, kind, findings)
    if stored == "lbm_morgan":
        other = _converted(headers, "lbm_james", kind, Findings())[0]
        findings.warn(
            f"{source(headers[0])}: {name} is LBM, for which the standard has James's formula with 120; if the "
            f"scanner meant 128, as James wrote, the factor is {other:.6g} instead of {factor:.6g}"
        )
    return SuvRule(
        np.full(len(headers), factor),
        kind,
        units,
        inputs={"suv_type": stated, **inputs},
        warnings=tuple(findings.warnings),
    )


def _from_counts(headers: Sequence[Dataset], kind: str, corrections: set[str], findings: Findings) -> SuvRule:
    scales = [philips_scales(h) for h in headers]
    to_suv, to_activity = [s[0] for s in scales], [s[1] for s in scales]
    if None in to_suv and None in to_activity:
        missing = next(k for k, pair in enumerate(scales) if None in pair)
        maker = optional(headers[missing], "Manufacturer") or "missing"
        other = "" if is_made_by(headers[missing], "PHILIPS") else f" ({label('Manufacturer')} is {maker})"
        raise ValueError(
            f"{source(headers[missing])}: {label('Units')} is CNTS, but neither {PHILIPS_SUV_SCALE} nor its "
            f"{PHILIPS_ACTIVITY_SCALE} is there in all slices{other}"
        )
    if None in to_suv:
        rule = _from_concentration(headers, "CNTS", kind, corrections, findings)
        return _with(rule, np.array(to_activity, dtype=np.float64) * rule.factors, scale=PHILIPS_ACTIVITY_SCALE)
    factor, inputs = _converted(headers, "bw", kind, findings)
    factors = np.array(to_suv, dtype=np.float64) * factor
    if None not in to_activity:
        _check_scales(headers, kind, corrections, factors, np.array(to_activity, dtype=np.float64), findings)
    return SuvRule(
        factors, kind, "CNTS", inputs={"scale": PHILIPS_SUV_SCALE, **inputs}, warnings=tuple(findings.warnings)
    )


def _with(rule: SuvRule, factors: np.ndarray, **inputs: Any) -> SuvRule:
    return SuvRule(
        factors,
        rule.kind,
        rule.units,
        rule.decay_correction,
        rule.reference,
        rule.origin,
        {**inputs, **rule.inputs},
        rule.warnings,
    )


def _check_scales(
    headers: Sequence[Dataset],
    kind: str,
    corrections: set[str],
    factors: np.ndarray,
    to_activity: np.ndarray,
    findings: Findings,
) -> None:
    """Warns where Philips's two factors lead to different SUV."""
    try:
        others = to_activity * _from_concentration(headers, "CNTS", kind, corrections, Findings()).factors
    except ValueError:  # what the other way needs isn't there
        return
    k = int(np.argmax(np.abs(others / factors - 1)))
    if abs(others[k] / factors[k] - 1) > 2 * TOLERANCE:
        findings.warn(
            f"{source(headers[k])}: {PHILIPS_SUV_SCALE} gives a factor of {factors[k]:.6g}, but Philips's "
            f"{PHILIPS_ACTIVITY_SCALE} with dose, weight and times gives {others[k]:.6g}; the former is used"
        )


def _from_concentration(
    headers: Sequence[Dataset], units: str, kind: str, corrections: set[str], findings: Findings
) -> SuvRule:
    """Finds the rule from Bq/mL to SUV."""
    first = headers[0]
    patient = read_patient(headers, findings)
    norm = patient.norm(kind, findings)
    dose = read_dose(headers, findings)
    # The warnings of the first slice are everyone's, since the fields are the same.
    half_life = read_half_life(first, radiopharmaceutical(first), findings)
    same(headers, label("RadionuclideHalfLife"), lambda h: read_half_life(h, radiopharmaceutical(h), Findings()))
    correction = same(headers, label("DecayCorrection"), lambda h: str(require(h, "DecayCorrection")).strip().upper())
    if correction not in ("START", "ADMIN", "NONE"):
        raise ValueError(
            f"{source(first)}: {label('DecayCorrection')} is {correction}, expected START, ADMIN or NONE"
        )
    if corrections and ("DECY" in corrections) != (correction != "NONE"):
        raise ValueError(
            f"{source(first)}: {label('DecayCorrection')} is {correction}, but {label('CorrectedImage')} is "
            f"{sorted(corrections)}; expected DECY in it exactly where the decay is corrected"
        )
    inputs = {"weight_kg": patient.weight, "dose_bq": dose, "half_life_s": half_life}
    if kind != "bw":
        inputs |= {"height_m": patient.height, "sex": patient.sex}  # type: ignore[dict-item]
    if correction == "ADMIN":
        _check_administration(headers, half_life, findings)
        factors, reference, origin = np.full(len(headers), norm / dose), "the injection", label("DecayCorrection")
        return SuvRule(factors, kind, units, correction, reference, origin, inputs, tuple(findings.warnings))
    frames = read_frames(headers, half_life, findings)
    if correction == "START":
        start, origin = scan_start(headers, frames, half_life, findings)
        references, reference = [start] * len(headers), start.isoformat(sep=" ")
    else:
        references = frame_averages(headers, frames, half_life, findings)
        _check_no_correction(headers, findings)
        reference, origin = "each frame's", "acquisition time + T_ave, when the activity equals the frame's average"
    injected = injection(headers, half_life, min(references), frames.first_end, findings)
    elapsed = np.array([(moment - injected).total_seconds() for moment in references])
    inputs |= {"injection_time": injected.isoformat(sep=" ")}  # type: ignore[dict-item]
    if correction == "NONE":
        inputs |= {"frame_seconds": frames.durations[0]}  # type: ignore[dict-item]
    factors = norm / (dose * 2.0 ** (-elapsed / half_life))
    return SuvRule(factors, kind, units, correction, reference, origin, inputs, tuple(findings.warnings))


def _check_no_correction(headers: Sequence[Dataset], findings: Findings) -> None:
    factors = decay_factors(headers)
    wrong = [k for k, factor in enumerate(factors or ()) if abs(factor - 1) > TOLERANCE]
    if factors and wrong:
        findings.warn(
            f"{source(headers[wrong[0]])}: {label('DecayFactor')} is {factors[wrong[0]]:g}, but "
            f"{label('DecayCorrection')} is NONE, for which it is 1; the latter is used"
        )


def _check_administration(headers: Sequence[Dataset], half_life: float, findings: Findings) -> None:
    """Warns where the decay factors don't fit a correction to the injection, if its time is known."""
    if decay_factors(headers) is None:
        return
    try:
        frames: Frames = read_frames(headers, half_life, Findings())
        injected = injection(headers, half_life, frames.first, frames.first_end, Findings())
    except ValueError:  # the times aren't there, and nothing else needs them
        return
    check_decay_factor(headers, frames, [injected] * len(headers), half_life, label("DecayCorrection"), findings)
