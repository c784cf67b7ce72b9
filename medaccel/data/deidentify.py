# SPDX-License-Identifier: Apache-2.0
"""Removes what identifies a patient from a DICOM dataset by the standard's basic profile (PS3.15, table E.1-1).

The rules are those of the package dicom-anonymizer, edition 2024b; it leaves sequences to the caller. The pixels are
not looked at: a head can be recognised by its face, whatever its header says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom import Dataset

EXTRA = 'pip install "medaccel[dicom]"'
_PROFILE = ("113100", "Basic Application Confidentiality Profile")
_DATE, _MOMENT = "19000101", "19000101000000"  # the package's year 1 is no date that a validator takes


def check_deidentify() -> None:
    """Raises ValueError if the package that has the rules isn't installed."""
    try:
        import dicomanonymizer  # noqa: F401
    except ImportError as error:
        raise ValueError(f"deidentify needs dicom-anonymizer, which is not installed here: {EXTRA}") from error


def deidentify(dataset: Dataset) -> None:
    """Changes a dataset in place: fields are removed, emptied or replaced, at every depth; private ones are removed.

    Dates become 1900-01-01. UIDs are replaced by new ones, the same one by the same one within a process, so that the
    slices of a series stay together; but references to other images are removed.
    """
    from dicomanonymizer.simpledicomanonymizer import anonymize_dataset, initialize_actions_2024b
    from pydicom import Dataset

    for keyword in ("SourceImageSequence", "ReferencedImageSequence", "ReferencedStudySequence"):
        if keyword in dataset:
            delattr(dataset, keyword)
    for item in _items(dataset):
        anonymize_dataset(item, base_rules_gen=initialize_actions_2024b)
    for item in _items(dataset):
        for element in list(item):
            if element.VR == "DA" and element.value:
                element.value = _DATE
            elif element.VR == "DT" and element.value:
                element.value = _MOMENT
    if "PatientBirthDate" in dataset:
        dataset.PatientBirthDate = ""
    profile = Dataset()
    profile.CodeValue, profile.CodeMeaning = _PROFILE
    profile.CodingSchemeDesignator = "DCM"
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "PS3.15 E basic profile, by dicom-anonymizer; pixels unchanged"
    dataset.DeidentificationMethodCodeSequence = [profile]
    dataset.LongitudinalTemporalInformationModified = "REMOVED"


def _items(dataset: Dataset) -> list[Dataset]:
    """Lists the items of all sequences, the deepest first, and the dataset itself last."""
    inner = [_items(item) for element in dataset if element.VR == "SQ" for item in element.value or ()]
    return [*(item for items in inner for item in items), dataset]
