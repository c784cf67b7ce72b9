# SPDX-License-Identifier: Apache-2.0
"""Writes figures of a study to files: CSV, and JSON in which null stands for NaN."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medaccel.data.files import write_text


def write_csv(
    path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Writes a table, replacing an existing file.

    Args:
        path: the file.
        rows: values by column.
        columns: the order of columns; by default the rows' own.

    Raises:
        OSError: the file can't be written.
    """
    listed = list(rows)
    if columns is None:
        columns = list(dict.fromkeys(column for row in listed for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    write_text(path, text.getvalue(), force=True)


def write_json(path: str | os.PathLike[str], value: Any, *, force: bool = True, indent: int = 1) -> None:
    """Writes `json_text` of a value atomically; raises the OSError of `medaccel.data.files.atomic_path`."""
    write_text(path, json_text(value, indent=indent), force=force)


def json_text(value: Any, *, indent: int = 1) -> str:
    """Formats plain and NumPy values as JSON.

    JSON has no NaN and no infinity: null stands for a number that is not finite.
    """
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def nan_for_null(row: Mapping[str, Any]) -> dict[str, Any]:
    """Restores a row of figures from JSON: null, which stood for NaN, becomes NaN again."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
