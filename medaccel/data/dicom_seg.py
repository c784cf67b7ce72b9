# SPDX-License-Identifier: Apache-2.0
"""Writes a label map as a DICOM segmentation (SEG) of the series that it was made from, with highdicom.

There is no RTSTRUCT: no well-kept library writes one, and contours would change the voxels that were found.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from medaccel.data._fields import optional, require
from medaccel.data.dicom import DicomSeries
from medaccel.data.dicom_write import RESEARCH_ONLY
from medaccel.data.files import atomic_path

if TYPE_CHECKING:
    from pydicom import Dataset

EXTRA = 'pip install "medaccel[dicom]"'
_SIDES = {"left": ("7771000", "Left"), "right": ("24028007", "Right")}
_ABNORMAL = {"lesion", "lesions", "nodule", "mass", "metastasis", "infection", "covid", "consolidation"}
_TUMOUR = {"tumour", "tumor", "cancer", "neoplasm", "tumours", "tumors", "carcinoma"}
# Names of public label maps that aren't the standard's own.
_SYNONYMS = {
    "lungs": "Lung",
    "kidneys": "Kidney",
    "adrenalgland": "AdrenalGland",
    "urinarybladder": "Bladder",
    "hepaticvessel": "HepaticVein",
}
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName"),
)


def check_segmentation(series: DicomSeries | None = None) -> None:
    """Raises ValueError if highdicom isn't installed, or a series lacks what a segmentation refers to."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise ValueError(f"a DICOM segmentation needs highdicom, which is not installed here: {EXTRA}") from error
    for header in [] if series is None else series.headers:
        for keyword in _NEEDED:
            require(header, keyword)


def write_segmentation(
    path: str | os.PathLike[str],
    labels: np.ndarray,
    names: Mapping[int, str],
    template: DicomSeries,
    *,
    description: str,
    force: bool = False,
) -> None:
    """Writes a label map as one binary segment per structure; the file is readable by its owner alone.

    Segments have codes of SNOMED CT: the organ's where the name is one, the lesion's, else that of an anatomical
    structure. Patient and study are the series'.

    Args:
        path: the file, .dcm.
        labels: (columns, rows, slices) of the template, whole numbers; 0 is background.
        names: the name of each label.
        template: the series that was segmented.
        description: the algorithm in words, ASCII.
        force: overwrite an existing file.

    Raises:
        ValueError: highdicom is missing; a header lacks a UID; the shape is another one; a label has no name.
        OSError: the file exists and `force` is False, or can't be written.
    """
    check_segmentation(template)
    headers = template.headers
    expected = (int(headers[0].Columns), int(headers[0].Rows), len(headers))
    if labels.shape != expected:
        raise ValueError(f"{path}: the label map has shape {labels.shape}, expected the series' {expected}")
    found = {int(value) for value in np.unique(labels)} - {0}
    structures = {value: name for value, name in sorted(names.items()) if value}
    if not found <= set(structures):
        raise ValueError(f"{path}: labels {sorted(found - set(structures))} have no name; expected {structures}")
    # Segments are numbered from 1 without gaps.
    masks = np.stack([(labels == value).transpose(2, 1, 0) for value in structures], axis=-1)
    segmentation = _segmentation(masks, list(structures.values()), headers, description)
    with atomic_path(path, force=force) as temporary:
        segmentation.save_as(temporary)
        temporary.chmod(0o600)


def _segmentation(masks: np.ndarray, names: list[str], headers: list[Dataset], description: str) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    from medaccel._version import __version__

    algorithm = hd.AlgorithmIdentificationSequence(
        name="medaccel",
        family=codes.cid7162.ArtificialIntelligence,
        version=__version__,
    )
    segments = []
    for number, name in enumerate(names, 1):
        category, kind, side = segment_codes(name)
        segment = hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=generate_uid(),
            tracking_id=name[:64],
        )
        if side is not None:
            property_type = segment.SegmentedPropertyTypeCodeSequence[0]
            property_type.SegmentedPropertyTypeModifierCodeSequence = [side]
        segments.append(segment)
    number = int(optional(headers[0], "SeriesNumber") or 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty segmentation is a result like another
        segmentation = hd.seg.Segmentation(
            source_images=[_completed(header) for header in headers],
            pixel_array=masks.astype(np.uint8),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=generate_uid(),
            series_number=number + 1000,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="medaccel",
            manufacturer_model_name="medaccel",
            software_versions=__version__,
            device_serial_number="0",
            content_label="RESEARCH_ONLY",
            content_description=f"{RESEARCH_ONLY}: {description}"[:64],
            series_description=f"{RESEARCH_ONLY}: {description}"[:64],
            omit_empty_frames=bool(masks.any()),
        )
    return segmentation


def _completed(header: Dataset) -> Dataset:
    """Copies a header with what the standard lets be empty, where it is missing."""
    result = copy.copy(header)
    for keyword in _MAY_BE_EMPTY:
        result.setdefault(keyword, None)
    return result


def segment_codes(name: str) -> tuple[Any, Any, Any]:
    """Returns a structure's category, its type, and its side (None if the name has none), coded in SNOMED CT."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    side = next((hd.sr.CodedConcept(_SIDES[w][0], "SCT", _SIDES[w][1]) for w in words if w in _SIDES), None)
    words = [word for word in words if word not in _SIDES]
    if set(words) & _TUMOUR:
        return codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm, side
    if set(words) & _ABNORMAL:
        kind = next((k for k in ("Nodule", "Mass") if k.lower() in words), "Lesion")
        return codes.SCT.MorphologicallyAbnormalStructure, getattr(codes.SCT, kind), side
    joined = "".join(words)
    keyword = _SYNONYMS.get(joined, "".join(word.capitalize() for word in words))
    for candidate in (keyword, keyword.removesuffix("s")):
        try:
            return codes.SCT.AnatomicalStructure, getattr(codes.SCT, candidate), side
        except AttributeError:
            continue
    return codes.SCT.AnatomicalStructure, codes.SCT.AnatomicalStructure, side
