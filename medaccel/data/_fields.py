# SPDX-License-Identifier: Apache-2.0
"""Reads DICOM header fields; an error about a missing or senseless field names the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydicom import Dataset

_T = TypeVar("_T")


def source(header: Dataset) -> str:
    """Returns the file that a header was read from."""
    return str(getattr(header, "filename", None) or "DICOM header")


def label(keyword: str) -> str:
    """Returns a field's name and tag, such as `PatientWeight (0010,1030)`."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.tag import Tag

    tag = Tag(tag_for_keyword(keyword) or 0)
    return f"{keyword} ({tag.group:04X},{tag.element:04X})"


def optional(item: Dataset, keyword: str, *, header: Dataset | None = None) -> Any:
    """Returns the field's value, or None if it is absent or empty; raises ValueError if its bytes are damaged.

    header: the header whose file an error names, if the item stands in a sequence and has no file of its own.
    """
    try:
        value = item.get(keyword)
    except Exception as error:  # pydicom reads a value when it is asked for, and can stumble in any way
        raise ValueError(f"{source(header or item)}: {label(keyword)} can't be read ({error})") from error
    return None if value is None or (hasattr(value, "__len__") and len(value) == 0) else value


def require(header: Dataset, keyword: str, *, within: Dataset | None = None) -> Any:
    """Returns the field's value, from `within` if the field stands in a sequence of `header`.

    Raises:
        ValueError: the field is absent or empty.
    """
    item = header if within is None else within
    value = optional(item, keyword, header=header)
    if value is None:
        state = "empty" if keyword in item else "missing"
        raise ValueError(f"{source(header)}: {label(keyword)} is {state}")
    return value


def integer(header: Dataset, keyword: str, default: int | None = None) -> int:
    """Returns a field's one integer, or `default` (if not None) where the field is absent or empty; raises ValueError
    otherwise."""
    if default is not None and optional(header, keyword) is None:
        return default
    return int(numbers(header, keyword, 1)[0])


def numbers(header: Dataset, keyword: str, count: int) -> list[float]:
    """Returns the `count` finite numbers of a field; raises ValueError otherwise."""
    value = require(header, keyword)
    try:
        listed = hasattr(value, "__len__") and not isinstance(value, str)
        values = [float(v) for v in value] if listed else [float(value)]
    except (TypeError, ValueError):
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(f"{source(header)}: {label(keyword)} is {value!s}, expected {count} number(s)")
    return values


def positive(header: Dataset, keyword: str, unit: str, *, within: Dataset | None = None) -> float:
    """Returns a field's one number, which must be above 0; raises ValueError otherwise."""
    value = require(header, keyword, within=within)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{source(header)}: {label(keyword)} is {value!s}, expected a positive number of {unit}")
    return number


def moment(header: Dataset, date_keyword: str, time_keyword: str) -> datetime:
    """Combines date and time of day from their two fields, in the scanner's local time."""
    from pydicom.valuerep import DA, TM

    date, time = require(header, date_keyword), require(header, time_keyword)
    return datetime.combine(
        parsed(header, label(date_keyword), date, DA), parsed(header, label(time_keyword), time, TM)
    )


def parsed(header: Dataset, name: str, value: Any, kind: Callable[[Any], _T | None]) -> _T:
    """Returns `kind(value)`, where `kind` is pydicom's DA, TM or DT; raises ValueError with file and field if the
    value isn't one."""
    try:
        result = kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source(header)}: {name} is {value!s}, which is no valid date or time") from error
    if result is None:
        raise ValueError(f"{source(header)}: {name} is empty")
    return result


def same(headers: Sequence[Dataset], name: str, value_of: Callable[[Dataset], _T]) -> _T:
    """Returns the one value that all slices have; raises ValueError with the names of two files that differ."""
    first = value_of(headers[0])
    for header in headers[1:]:
        value = value_of(header)
        if value != first:
            raise ValueError(
                f"{source(header)}: {name} is {value!s}, but {first!s} in {source(headers[0])}; expected one value"
            )
    return first
