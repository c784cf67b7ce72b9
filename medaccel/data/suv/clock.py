# SPDX-License-Identifier: Apache-2.0
"""Reads dates and times of a header as the scanner's local time, and knows the arithmetic of decay."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from medaccel.data._fields import label, optional, parsed, source

if TYPE_CHECKING:
    from pydicom import Dataset

#: Clocks are rounded to seconds.
SECOND = 1.0
#: Times count as one where the SUV that follow from them are this close.
TOLERANCE = 0.01
_WHOLE_DT = re.compile(r"^\d{12}")


def full(header: Dataset, name: str, value: Any) -> datetime:
    """Returns a DICOM date-time in the scanner's local time.

    Raises:
        ValueError: it is none, or stops before the minutes (the standard allows a mere year).
    """
    from pydicom.valuerep import DT

    if not _WHOLE_DT.match(str(value)):
        parsed(header, name, value, DT)
        raise ValueError(f"{source(header)}: {name} is {value!s}; expected a date with the time of day")
    return local(header, parsed(header, name, value, DT))


def local(header: Dataset, value: datetime) -> datetime:
    """Removes the time zone: converts to the scanner's local time, in which the other fields are given."""
    zone = optional(header, "TimezoneOffsetFromUTC")
    if value.tzinfo is not None and zone is not None:
        from pydicom.valuerep import DT

        offsets = {str(v) for v in zone} if not isinstance(zone, str) and hasattr(zone, "__iter__") else {str(zone)}
        name = label("TimezoneOffsetFromUTC")
        if len(offsets) > 1 or not all(re.fullmatch(r"[+-]\d{4}", offset.strip()) for offset in offsets):
            raise ValueError(f"{source(header)}: {name} is {sorted(offsets)}; expected one time zone, such as +0100")
        value = value.astimezone(parsed(header, name, f"20000101000000{offsets.pop().strip()}", DT).tzinfo)
    # pydicom's DT has its own constructor, which datetime's methods don't know.
    return datetime(value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond)


def frame_factor(duration: float, half_life: float) -> float:
    """Returns λT / (1 - exp(-λT)): the activity at a frame's start in units of its average over the frame."""
    decay = math.log(2) / half_life * duration
    return decay / -math.expm1(-decay) if decay > 0 else 1.0


def average_time(duration: float, half_life: float) -> float:
    """Returns the seconds from a frame's start to the moment when the activity equals its average over the frame."""
    return math.log(frame_factor(duration, half_life)) * half_life / math.log(2)


def agree(a: datetime, b: datetime, half_life: float) -> bool:
    """Tells whether SUV are the same, to a hundredth, with either time (two seconds are always allowed)."""
    return abs((a - b).total_seconds()) <= max(2 * SECOND, TOLERANCE * half_life / math.log(2))


def percent(seconds: float, half_life: float) -> str:
    """Returns in words by how much SUV change where a time is off by so many seconds."""
    power = abs(seconds) / half_life
    return f"{(2**power - 1):.1%}" if power < 10 else "more than a thousandfold"
