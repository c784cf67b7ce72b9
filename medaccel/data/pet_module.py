# SPDX-License-Identifier: Apache-2.0
"""Completes a derived PET slice to what the standard asks of one (PS3.3 A.21), where its source fell short of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medaccel.data._fields import optional

if TYPE_CHECKING:
    from pydicom import Dataset

# Type 2: a field that has to be there, and may be empty.
_MAY_BE_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID"),
    *("Manufacturer", "PositionReferenceIndicator", "CorrectedImage", "CollimatorType"),
    *("PatientOrientationCodeSequence", "PatientGantryRelationshipCodeSequence"),
    *("AcquisitionDate", "AcquisitionTime", "SliceThickness", "ActualFrameDuration"),
)
#: PS3.3 C.8.9.4.1.1: the second value of a PET's image type is PRIMARY, also where the first one is DERIVED.
IMAGE_TYPE = ("DERIVED", "PRIMARY")
# These parts exist twice, so that the side has a field, which may be empty; an unnamed part may be one of them.
_PAIRED = (
    "",
    "EXTREMITY",
    "ARM",
    "LEG",
    "HAND",
    "FOOT",
    "KNEE",
    "HIP",
    "SHOULDER",
    "ELBOW",
    "ANKLE",
    "WRIST",
    "BREAST",
)
_RECUMBENT = ("102538003", "recumbent")
_LYING = {
    "S": ("40199007", "supine"),
    "P": ("1240000", "prone"),
    "DR": ("102535000", "right lateral decubitus"),
    "DL": ("102536004", "left lateral decubitus"),
}
_ENTERING = {"HF": ("102540008", "headfirst"), "FF": ("102541007", "feet-first")}


def complete(derived: Dataset, number: int, shared: Dataset) -> None:
    """Adds what the source lacked, and removes what contradicts other fields.

    What nobody can know, such as a missing FrameReferenceTime, stays missing.

    Args:
        derived: the slice, changed in place.
        number: the slice's number in the series, from 1.
        shared: has StudyInstanceUID and FrameOfReferenceUID for series without.
    """
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if optional(derived, keyword) is None:
            setattr(derived, keyword, shared.get(keyword))
    kind = optional(derived, "SeriesType")
    if kind is None:
        derived.SeriesType = ["STATIC", "IMAGE"]
    elif str(kind[0]) == "WHOLEBODY":  # a frequent misspelling
        derived.SeriesType = ["WHOLE BODY", *kind[1:]]
    if str(derived.SeriesType[0]) != "DYNAMIC" and "NumberOfTimeSlices" in derived:
        del derived.NumberOfTimeSlices
    if str(optional(derived, "DecayCorrection")) == "NONE" and "DecayFactor" in derived:
        del derived.DecayFactor
    _orient(derived)
    for keyword, value in (("ImageIndex", number), ("InstanceNumber", number), ("CountsSource", "EMISSION")):
        if optional(derived, keyword) is None:
            setattr(derived, keyword, value)
    if str(optional(derived, "BodyPartExamined") or "") in _PAIRED and "ImageLaterality" not in derived:
        derived.setdefault("Laterality", "")
    for keyword in _MAY_BE_EMPTY:
        derived.setdefault(keyword, None)


def _orient(derived: Dataset) -> None:
    """States how the patient lies in codes; a PET has these or PatientPosition, not both."""
    position = str(optional(derived, "PatientPosition") or "")
    if optional(derived, "PatientOrientationCodeSequence") is None:
        lying, entering = _LYING.get(position[2:]), _ENTERING.get(position[:2])
        if lying is None or entering is None:
            return
        recumbent = _code(*_RECUMBENT)
        recumbent.PatientOrientationModifierCodeSequence = [_code(*lying)]
        derived.PatientOrientationCodeSequence = [recumbent]
        derived.PatientGantryRelationshipCodeSequence = [_code(*entering)]
    if "PatientPosition" in derived:
        del derived.PatientPosition


def _code(value: str, meaning: str) -> Dataset:
    from pydicom import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return item
