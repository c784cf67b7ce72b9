# SPDX-License-Identifier: Apache-2.0
"""Tests tables as files, and digests."""

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medaccel.studies.digest import file_sha256
from medaccel.studies.tables import json_text, nan_for_null, write_csv, write_json


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (math.inf, None),
        (np.float32("nan"), None),
        (np.float64(0.1), 0.1),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (True, True),
        ({1: (math.nan, [2.0, -math.inf])}, {"1": [None, [2.0, None]]}),
        ({"σ": {"deep": [{"x": math.nan}]}}, {"σ": {"deep": [{"x": None}]}}),
    ],
)
def test_json_has_null_for_what_is_not_finite(value: Any, expected: Any, tmp_path: Path):
    def refuse(token: str) -> None:
        raise AssertionError(token)

    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == json_text(value)
    assert json.loads(text, parse_constant=refuse) == expected


def test_null_is_nan_again():
    row = nan_for_null(json.loads(json_text({"a": math.nan, "b": 2.0})))
    assert math.isnan(row["a"])
    assert row["b"] == 2.0


def test_a_table_has_all_columns_of_its_rows(tmp_path: Path):
    write_csv(tmp_path / "a.csv", [{"study": "ä, b", "x": 0.1}, {"study": "c", "y": math.nan}])
    assert (tmp_path / "a.csv").read_bytes() == 'study,x,y\n"ä, b",0.1,\nc,,nan\n'.encode()
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        assert [row["study"] for row in csv.DictReader(file)] == ["ä, b", "c"]
    write_csv(tmp_path / "a.csv", [], ["epoch", "loss"])
    assert (tmp_path / "a.csv").read_text() == "epoch,loss\n"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_the_sha256_is_of_all_that_a_file_holds(size: int, tmp_path: Path):
    content = bytes(n % 251 for n in range(1000)) * (size // 1000 + 1)
    (tmp_path / "a").write_bytes(content[:size])
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content[:size]).hexdigest()
