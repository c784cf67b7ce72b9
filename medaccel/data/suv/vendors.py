# SPDX-License-Identifier: Apache-2.0
"""Reads the private fields of GE, Siemens and Philips that SUV depends on.

Anonymisers and converters often drop the private creator, the element that says whose the block of private fields is;
then the field is read where the vendor puts it, if Manufacturer says that the file is this vendor's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from medaccel.data._fields import optional, same
from medaccel.data.suv.clock import full

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.tag import BaseTag


@dataclass(frozen=True)
class _Field:
    """Locates a private field."""

    name: str
    manufacturer: str  # Manufacturer begins with or contains this, in capitals
    group: int
    creator: str
    element: int

    @property
    def label(self) -> str:
        return f"{self.name} ({self.group:04X},{0x1000 + self.element:04X})"


_GE_SCAN = _Field("GE's scan time", "GE", 0x0009, "GEMS_PETD_01", 0x0D)
_SIEMENS_DECAY = _Field("Siemens's decay correction time", "SIEMENS", 0x0071, "SIEMENS MED PT", 0x22)
_PHILIPS_SUV = _Field("Philips's SUV scale factor", "PHILIPS", 0x7053, "Philips PET Private Group", 0x00)
_PHILIPS_ACTIVITY = _Field(
    "activity concentration scale factor", "PHILIPS", 0x7053, "Philips PET Private Group", 0x09
)
_FIELDS = (_GE_SCAN, _SIEMENS_DECAY, _PHILIPS_SUV, _PHILIPS_ACTIVITY)
GE_SCAN_TIME = _GE_SCAN.label
PHILIPS_SUV_SCALE, PHILIPS_ACTIVITY_SCALE = _PHILIPS_SUV.label, _PHILIPS_ACTIVITY.label


def is_made_by(header: Dataset, vendor: str) -> bool:
    """Tells whether Manufacturer names the vendor: GE, SIEMENS or PHILIPS."""
    maker = str(optional(header, "Manufacturer") or "").upper()
    return vendor in re.split("[^A-Z]+", maker) or (vendor == "GE" and "GENERAL ELECTRIC" in maker)


def scan_time(headers: Sequence[Dataset]) -> tuple[str, datetime] | None:
    """Returns the vendor's time of decay correction, and its name, if it is there.

    Raises:
        ValueError: it is no date and time, or differs between slices.
    """
    for field in (_GE_SCAN, _SIEMENS_DECAY):
        found = same(headers, field.label, lambda h, field=field: _time(h, field))  # type: ignore[misc]
        if found is not None:
            return field.label, found
    return None


def philips_scales(header: Dataset) -> tuple[float | None, float | None]:
    """Returns Philips's factors from a slice's rescaled values to SUV and to Bq/mL; None for an absent one, for which
    Philips itself writes 0."""
    return _number(header, _PHILIPS_SUV), _number(header, _PHILIPS_ACTIVITY)


def tags(header: Dataset) -> set[BaseTag]:
    """Returns the tags of the private fields that SUV depends on, and of their blocks' creators."""
    from pydicom.tag import Tag

    found = set()
    for field in _FIELDS:
        tag = _tag(header, field)
        if tag is not None:
            found |= {tag, Tag(field.group, tag.element >> 8)} & set(header.keys())
    return found


def _tag(header: Dataset, field: _Field) -> BaseTag | None:
    """Returns the tag that has the field; None if there is none."""
    from pydicom.tag import Tag

    try:
        block = header.private_block(field.group, field.creator)
        return block.get_tag(field.element) if field.element in block else None
    except KeyError:
        tag = Tag(field.group, 0x1000 + field.element)
        unowned = Tag(field.group, 0x10) not in header
        return tag if tag in header and unowned and is_made_by(header, field.manufacturer) else None


def _value(header: Dataset, field: _Field) -> Any:
    tag = _tag(header, field)
    if tag is None:
        return None
    try:
        value = header[tag].value
    except Exception:  # pydicom reads a value when it is asked for, and can stumble in any way
        return None
    # A file that was written without knowledge of the field stores bytes.
    return value.decode("ascii", "replace").strip(" \0") if isinstance(value, bytes) else value


def _time(header: Dataset, field: _Field) -> datetime | None:
    value = _value(header, field)
    return full(header, field.label, value) if value else None


def _number(header: Dataset, field: _Field) -> float | None:
    try:
        number = float(_value(header, field) or 0)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None
