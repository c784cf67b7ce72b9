# SPDX-License-Identifier: Apache-2.0
"""The cost of work: memory that was had at once, whatever came before, and nothing where it can't be measured."""

import math
import time
from pathlib import Path

import numpy as np
import pytest

from medaccel.studies import cost
from medaccel.studies.cost import measured

MIB = 2**20
on_linux = pytest.mark.skipif(not cost._RESET.exists(), reason="only Linux keeps a peak that can be set back")


def _fill(size: int) -> float:
    return float(np.ones(size // 8).sum())


@on_linux
@pytest.mark.parametrize("size", [40 * MIB, 200 * MIB])
def test_the_memory_is_the_most_that_the_work_has_at_once(size: int):
    result, found = measured(lambda: _fill(size))
    assert result == size // 8
    assert found.memory == pytest.approx(size, abs=8 * MIB)


@on_linux
def test_a_greater_peak_before_hides_nothing():
    _fill(300 * MIB)
    assert measured(lambda: _fill(60 * MIB))[1].memory == pytest.approx(60 * MIB, abs=8 * MIB)
    kept = [bytearray(1000) for _ in range(100_000)]  # small pieces, which the allocator keeps when they are freed
    del kept
    found = measured(lambda: [bytearray(1000) for _ in range(100_000)])[1]
    assert found.memory == pytest.approx(105 * MIB, rel=0.25)


@on_linux
def test_work_that_needs_nothing_has_nothing():
    assert measured(lambda: None)[1].memory < 2 * MIB


def test_the_time_is_that_of_the_work():
    found = measured(lambda: time.sleep(0.05))[1]
    assert 0.05 <= found.seconds < 1


@pytest.mark.parametrize("content", [None, "Name: python\n"])
def test_memory_that_can_not_be_measured_is_unknown(
    content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if content is None:
        monkeypatch.setattr(cost, "_RESET", tmp_path / "none" / "clear_refs")
    else:
        (tmp_path / "status").write_text(content)
        monkeypatch.setattr(cost, "_STATUS", tmp_path / "status")
    result, found = measured(lambda: 7)
    assert result == 7
    assert math.isnan(found.memory)
