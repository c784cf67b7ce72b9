# SPDX-License-Identifier: Apache-2.0
"""Makes the headers of single slices from a multi-frame file: enhanced PET, and what was converted to it.

A multi-frame file has the fields of a slice in functional groups, some for all frames, some for each. Here every
frame gets a header as if it had a file of its own, with the names that single-frame PET uses, so that geometry and
SUV are computed by the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from medaccel.data._fields import integer, label, optional, require, source

if TYPE_CHECKING:
    from pydicom import Dataset

# These groups' fields have the names that single-frame files use, or that nothing else uses.
_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameContentSequence"),
    *("PixelValueTransformationSequence", "UnassignedSharedConvertedAttributesSequence"),
    "UnassignedPerFrameConvertedAttributesSequence",
)
# The single-frame names of enhanced PET's fields.
_RENAMED = (("FrameAcquisitionDateTime", "AcquisitionDateTime"), ("FrameAcquisitionDuration", "ActualFrameDuration"))
_LEFT_OUT = {"SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames"}
_CORRECTED = (
    *(("DecayCorrected", "DECY"), ("AttenuationCorrected", "ATTN"), ("ScatterCorrected", "SCAT")),
    *(("DeadTimeCorrected", "DTIM"), ("RandomsCorrected", "RAN")),
)
_PREFERRED = ("BQML", "KBQML", "GML", "CM2ML", "CNTS")
_SUV_TYPES = {"suvbw": "BW", "suvlbm": "LBM", "suvibw": "IBW", "suvbsa": "BSA"}


def frame_headers(header: Dataset) -> list[Dataset]:
    """Returns the headers of a file's frames, or the file's own if it has one slice.

    Each has the attribute `frame_index`, from 0.

    Raises:
        ValueError: the file has several frames, but no functional groups that fit their number.
    """
    count = integer(header, "NumberOfFrames", 1)
    groups = optional(header, "PerFrameFunctionalGroupsSequence")
    if groups is None and count == 1:
        return [header]
    if groups is None or len(groups) != count:
        found = "no" if groups is None else str(len(groups))
        raise ValueError(
            f"{source(header)}: {label('NumberOfFrames')} is {count}, but "
            f"{label('PerFrameFunctionalGroupsSequence')} has {found} items; expected 1 frame, or a multi-frame file "
            "with an item for each"
        )
    shared = optional(header, "SharedFunctionalGroupsSequence") or ()
    return [_flat(header, [*shared[:1], groups[k]], k) for k in range(count)]


def _flat(header: Dataset, groups: Sequence[Dataset], index: int) -> Dataset:
    """Returns one frame's header."""
    from pydicom import Dataset

    flat = Dataset()
    try:
        for element in header:
            if element.keyword not in _LEFT_OUT:
                flat.add(element)
        for item in _items(groups):
            for element in item:
                flat.add(element)
        _rename(flat)
        _read_units(flat, groups)
    except ValueError:
        raise
    except Exception as error:  # pydicom reads a value when it is asked for, and can stumble in any way
        raise ValueError(f"{source(header)}: frame {index + 1} can't be read ({error})") from error
    flat.filename = source(header)
    flat.file_meta = getattr(header, "file_meta", None)
    flat.frame_index = index
    return flat


def _items(groups: Iterable[Dataset]) -> Iterable[Dataset]:
    for group in groups:
        for keyword in _GROUPS:
            yield from list(group.get(keyword) or ())[:1]


def _rename(flat: Dataset) -> None:
    for enhanced, classic in _RENAMED:
        if enhanced in flat and classic not in flat:
            setattr(flat, classic, flat[enhanced].value)
        elif enhanced == "FrameAcquisitionDateTime" and enhanced in flat and "AcquisitionTime" not in flat:
            setattr(flat, classic, flat[enhanced].value)  # the file's own is the whole scan's
    if "DecayCorrection" not in flat and "DecayCorrected" in flat:
        flat.DecayCorrection = "START" if str(flat.DecayCorrected).upper() == "YES" else "NONE"
    if "CorrectedImage" not in flat and "AttenuationCorrected" in flat:
        flat.CorrectedImage = [code for name, code in _CORRECTED if str(flat.get(name) or "").upper() == "YES"]


def _read_units(flat: Dataset, groups: Iterable[Dataset]) -> None:
    """Sets Units, SUVType and the rescaling from the real world value mapping, if units aren't there already."""
    if optional(flat, "Units") is not None:
        return
    mappings = [item for group in groups for item in group.get("RealWorldValueMappingSequence") or ()]
    known = []
    for item in mappings:
        codes = item.get("MeasurementUnitsCodeSequence") or ()
        text = str(codes[0].get("CodeValue") or "") if codes else ""
        units = _units(text)
        linear = item.get("RealWorldValueSlope") is not None and item.get("RealWorldValueIntercept") is not None
        if units is not None and linear:
            known.append((_PREFERRED.index(units[0]), units, item))
    if known:
        _, (name, suv_type), item = min(known, key=lambda entry: entry[0])
        scale = 1000.0 if name == "KBQML" else 1.0
        flat.Units = "BQML" if name == "KBQML" else name
        if suv_type:
            flat.SUVType = suv_type
        # FD holds every bit, where the usual DS has 16 characters.
        flat.add_new("RescaleSlope", "FD", scale * float(item.RealWorldValueSlope))
        flat.add_new("RescaleIntercept", "FD", scale * float(item.RealWorldValueIntercept))
        return
    stated = _units(str(flat.get("RescaleType") or ""))
    if stated is not None and stated[0] != "KBQML":
        flat.Units = stated[0]
        if stated[1]:
            flat.SUVType = stated[1]


def _units(text: str) -> tuple[str, str | None] | None:
    """Translates UCUM's Bq/ml, g/ml{SUVbw}, {SUVbsa}cm2/ml or {counts}, or DICOM's own terms."""
    low = text.lower().replace(" ", "")
    suv = re.search(r"suv(bw|lbm|ibw|bsa)", low)
    bare = re.sub(r"\{[^}]*\}", "", low).replace("/", "")
    suv_type = _SUV_TYPES[suv[0]] if suv else None
    if bare in ("bqml", "kbqml"):
        return bare.upper(), None
    if bare == "gml" or (suv_type not in (None, "BSA") and bare in ("", "1", suv and suv[0])):
        return "GML", suv_type or "BW"
    if bare == "cm2ml" or (suv_type == "BSA" and bare in ("", "1", "suvbsa")):
        return "CM2ML", "BSA"
    return ("CNTS", None) if low in ("{counts}", "cnts", "counts") else None


# --- Frames in time ---

_ORDER = ("AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime", "FrameReferenceTime", "TriggerTime")
_GATES = ("NominalCardiacTriggerDelayTime", "NominalPercentageOfCardiacPhase", "TemporalPositionIndex")
_KEYS = (*_ORDER, *_GATES, "TemporalPositionIdentifier", "ImageIndex")
_SAME_POSITION_MM = 1e-3


def choose_frame(headers: Sequence[Dataset], frame: int | None) -> list[Dataset]:
    """Returns the slices of one frame of a dynamic or gated series: those with one at each position are all of it.

    Args:
        headers: the series' slices, in any order.
        frame: the frame's number, from 1; None for a series of one.

    Raises:
        ValueError: there are several frames and none was chosen (they are listed); no frame has this number; the
            frames have different numbers of slices.
    """
    stacks: list[list[Dataset]] = []
    for header, where in sorted(((h, _along(h)) for h in headers), key=lambda pair: pair[1]):
        if stacks and where - _along(stacks[-1][0]) < _SAME_POSITION_MM:
            stacks[-1].append(header)
        else:
            stacks.append([header])
    count = max(map(len, stacks))
    if count > 1 and not any(_told_apart(stack) for stack in stacks):
        return list(headers)  # duplicates, which geometry names
    if count == 1 and frame in (None, 1):
        return list(headers)
    first = source(headers[0])
    uneven = next((stack for stack in stacks if len(stack) != count), None)
    if uneven is not None:
        raise ValueError(
            f"{source(uneven[0])}: {len(uneven)} slice(s) at its position, {label('ImagePositionPatient')}, where "
            f"others have {count}: frames of a dynamic or gated series are incomplete"
        )
    ordered = [sorted(stack, key=_key) for stack in stacks]
    if frame is None:
        listed = "; ".join(f"{k + 1}: {_described(ordered[0][k])}" for k in range(count))
        kind = optional(headers[0], "SeriesType")
        kind = kind if isinstance(kind, str) or kind is None else "\\".join(map(str, kind))
        raise ValueError(
            f"{first}: {count} slices share the same position: a dynamic series, or a gated one "
            f"({label('SeriesType')} {kind or 'missing'}) of {count} frames; expected one, which "
            f"frame (--frame) chooses. {listed}"
        )
    if not 1 <= frame <= count:
        raise ValueError(f"{first}: frame is {frame}, expected 1 to {count}, as the series has {count} frame(s)")
    return [stack[frame - 1] for stack in ordered]


def _along(header: Dataset) -> float:
    """Returns the position along the normal in mm; 0 where it can't be told, which geometry refuses."""
    import numpy as np

    try:
        position = np.array([float(v) for v in require(header, "ImagePositionPatient")])
        rows_columns = np.array([float(v) for v in require(header, "ImageOrientationPatient")])
        return float(position @ np.cross(rows_columns[:3], rows_columns[3:]))
    except (TypeError, ValueError):
        return 0.0


def _key(header: Dataset) -> tuple[Any, ...]:
    """Returns what frames at one position are ordered by."""
    return tuple((0, _comparable(optional(header, keyword))) for keyword in _KEYS)


def _comparable(value: Any) -> tuple[float, str]:
    try:
        return float(value), ""
    except (TypeError, ValueError):
        return 0.0, str(value)


def _told_apart(stack: Sequence[Dataset]) -> bool:
    return len({_key(header) for header in stack}) == len(stack) > 1


def _described(header: Dataset) -> str:
    """Returns the fields that tell a frame from the others, in words."""
    shown = []
    for keyword in (*_ORDER, "ActualFrameDuration", *_GATES):
        value = optional(header, keyword)
        if value is not None and not (keyword == "AcquisitionDateTime" and optional(header, "AcquisitionTime")):
            shown.append(f"{keyword} {value}")
    return ", ".join(shown) or "no times"
