# SPDX-License-Identifier: Apache-2.0
"""Finds the time of the injection."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from datetime import time as time_of_day
from typing import TYPE_CHECKING

from medaccel.data._fields import label, optional, parsed, require, same, source
from medaccel.data.suv.clock import SECOND, full
from medaccel.data.suv.findings import Findings
from medaccel.data.suv.patient import radiopharmaceutical

if TYPE_CHECKING:
    from pydicom import Dataset

# A scan starts neither before the injection nor after the whole dose has decayed: such dates are wrong.
_MAX_HALF_LIVES = 10
_USUAL_HALF_LIVES = 5
# With a longer half-life, scans days after the injection are usual, and a time of day doesn't identify the day.
_MAX_HALF_LIFE_WITHOUT_DATE = 6 * 3600.0
_TIME, _MOMENT = "RadiopharmaceuticalStartTime", "RadiopharmaceuticalStartDateTime"


def injection(
    headers: Sequence[Dataset], half_life: float, reference: datetime, first_end: datetime, findings: Findings
) -> datetime:
    """Returns the time of the injection, in the scanner's local time.

    If only its time of day is known and is later than the reference, it was on the day before, and the scan ran past
    midnight. So it is where the dates contradict the times by more than a dose lives, as after anonymisation, if the
    half-life is so short that the time of day suffices.

    Args:
        headers: the slices' headers.
        half_life: seconds.
        reference: the time of decay correction.
        first_end: the end of the first frame; a dynamic scan may have begun before the injection.
        findings: takes the warnings.

    Raises:
        ValueError: the time is missing, or contradicts itself or the scan.
    """
    first = headers[0]
    latest = max(reference, first_end)

    def possible(injected: datetime) -> bool:
        return injected <= latest and (reference - injected).total_seconds() <= _MAX_HALF_LIVES * half_life

    time, dated = _fields(headers, findings)
    if dated is not None:
        injected = dated
        if not possible(dated) and half_life <= _MAX_HALF_LIFE_WITHOUT_DATE:
            injected = _on_day(reference, latest, dated.time())
            if possible(injected):
                findings.warn(
                    f"{source(first)}: {label(_MOMENT)} is {dated}, but the image's reference time is {reference}: "
                    f"the dates can't be right, so only the time of day is used, for an injection at {injected}"
                )
    elif time is None:
        require(first, _TIME, within=radiopharmaceutical(first))
        raise AssertionError("unreachable")
    elif half_life > _MAX_HALF_LIFE_WITHOUT_DATE:
        raise ValueError(
            f"{source(first)}: {label(_MOMENT)} is missing: with a half-life of {half_life:g} s the time of day "
            "alone doesn't tell the day of the injection"
        )
    else:
        injected = _on_day(reference, latest, time)
    elapsed = (reference - injected).total_seconds() / half_life
    if not possible(injected):
        raise ValueError(
            f"{source(first)}: {label(_TIME)} puts the injection at {injected if dated is None else dated}, but the "
            f"image's reference time is {reference}: expected 0 to {_MAX_HALF_LIVES} half-lives ({half_life:g} s) "
            "between them"
        )
    if elapsed > _USUAL_HALF_LIVES:
        findings.warn(
            f"{source(first)}: the injection at {injected} lies {elapsed:.1f} half-lives before the image's "
            f"reference time, {reference}: are both right?"
        )
    return injected


def _on_day(reference: datetime, latest: datetime, time: time_of_day) -> datetime:
    """Returns the last time of day that doesn't lie after the scan."""
    injected = datetime.combine(date(reference.year, reference.month, reference.day), time)
    return injected - timedelta(days=1) if injected > latest else injected


def _fields(headers: Sequence[Dataset], findings: Findings) -> tuple[time_of_day | None, datetime | None]:
    """Returns the time of day, and the moment, of which either may be None."""
    from pydicom.valuerep import DT, TM

    first = headers[0]

    def read(keyword: str) -> Callable[[Dataset], object]:
        return lambda h: optional(radiopharmaceutical(h), keyword, header=h)

    given_time = same(headers, label(_TIME), read(_TIME))
    given = same(headers, label(_MOMENT), read(_MOMENT))
    time = None if given_time is None else parsed(first, label(_TIME), given_time, TM)
    if given is None:
        return time, None
    if time is not None and re.fullmatch(r"\d{8}", str(given)):  # the date alone
        day = parsed(first, label(_MOMENT), given, DT)
        return time, datetime.combine(date(day.year, day.month, day.day), time)
    injected = full(first, label(_MOMENT), given)
    if time is not None:
        apart = abs((datetime.combine(injected.date(), time) - injected).total_seconds())
        if min(apart, abs(apart - 86400)) > SECOND:
            raise ValueError(f"{source(first)}: {label(_TIME)} is {time}, but {label(_MOMENT)} is {injected}")
    elif parsed(first, label(_MOMENT), given, DT).tzinfo and optional(first, "TimezoneOffsetFromUTC") is None:
        findings.warn(
            f"{source(first)}: {label(_MOMENT)} is {given!s}, but {label('TimezoneOffsetFromUTC')} is missing: the "
            "other times are taken to be of the same time zone"
        )
    return time, injected
