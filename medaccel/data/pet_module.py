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
    *("PatientOrientationCodeSequence", "PatientGantryRelationshipCodeSequence", "EnergyWindowRangeSequence"),
    *("AcquisitionDate", "AcquisitionTime", "SliceThickness"),
)
#: PS3.3 C.8.9.4.1.1: the second value of a PET's image type is PRIMARY, also where the first one is DERIVED.
IMAGE_TYPE = ("DERIVED", "PRIMARY")
_PAIRED = ("EXTREMITY", "ARM", "LEG", "HAND", "FOOT", "KNEE", "HIP", "SHOULDER", "ELBOW", "ANKLE", "WRIST", "BREAST")


def complete(derived: Dataset, shared: Dataset) -> None:
    """Adds what the source lacked, and removes what contradicts other fields.

    Args:
        derived: the slice, changed in place.
        shared: has StudyInstanceUID and FrameOfReferenceUID for series without.
    """
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if optional(derived, keyword) is None:
            setattr(derived, keyword, shared.get(keyword))
    kind = optional(derived, "SeriesType")
    if kind is None:
        derived.SeriesType = ["STATIC", "IMAGE"]
    elif str(kind[0]) != "DYNAMIC" and "NumberOfTimeSlices" in derived:
        del derived.NumberOfTimeSlices
    # The coded orientation takes the place of the position; a standard file has one of the two.
    if optional(derived, "PatientOrientationCodeSequence") is not None and "PatientPosition" in derived:
        del derived.PatientPosition
    if str(optional(derived, "BodyPartExamined") or "") in _PAIRED and "ImageLaterality" not in derived:
        derived.setdefault("Laterality", "")
    for keyword in _MAY_BE_EMPTY:
        derived.setdefault(keyword, None)
