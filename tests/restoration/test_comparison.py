# SPDX-License-Identifier: Apache-2.0
"""Paired comparisons between methods, with textbook answers and defined ones where textbooks have none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from medaccel.restoration.evaluation.comparison import compare_methods
from medaccel.studies.statistics import holm


def _values(studies: int = 20) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    base = generator.normal(50, 10, studies)
    return {
        "gaussian": base,
        "better": base + generator.normal(3, 1, studies),
        "same": base + generator.normal(0, 1, studies),
    }


def test_a_gain_far_smaller_than_the_spread_of_studies_is_found():
    values = _values()
    better, same = compare_methods(values, "gaussian")
    assert (better.method, better.against, same.method) == ("better", "gaussian", "same")
    assert better.difference.mean == pytest.approx(np.mean(values["better"] - values["gaussian"]))
    assert better.difference.low < 3 < better.difference.high
    assert better.difference.count == better.larger == 20
    assert better.t_holm < 1e-6
    assert better.wilcoxon_holm < 1e-4
    assert same.difference.low < 0 < same.difference.high
    assert same.t_p > 0.05
    # Unpaired, the spread of the studies hides it.
    assert stats.ttest_ind(values["better"], values["gaussian"]).pvalue > 0.05


def test_the_p_values_are_those_of_the_paired_tests():
    values = _values(9)
    for comparison in compare_methods(values, "gaussian"):
        row, base = values[comparison.method], values["gaussian"]
        assert comparison.t_p == pytest.approx(stats.ttest_rel(row, base).pvalue)
        assert comparison.wilcoxon_p == pytest.approx(stats.wilcoxon(row, base).pvalue)


def test_the_sign_turns_with_the_method_compared_with():
    values = _values()
    forward = compare_methods({key: values[key] for key in ("gaussian", "better")}, "gaussian")[0]
    backward = compare_methods({key: values[key] for key in ("gaussian", "better")}, "better")[0]
    assert backward.difference.mean == pytest.approx(-forward.difference.mean)
    assert backward.t_p == pytest.approx(forward.t_p)
    assert (backward.method, backward.larger, backward.smaller) == ("gaussian", 0, 20)


def test_holm_by_hand():
    # Ordered 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1; the third may not fall below the second.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
    corrected = holm([0.02, math.nan, 0.03])
    assert corrected[::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(corrected[1])


def test_corrected_values_count_the_methods_compared():
    comparisons = compare_methods(_values(), "gaussian")
    assert [c.t_holm for c in comparisons] == pytest.approx(holm([c.t_p for c in comparisons]))
    assert [c.wilcoxon_holm for c in comparisons] == pytest.approx(holm([c.wilcoxon_p for c in comparisons]))
    assert comparisons[0].t_holm == pytest.approx(2 * comparisons[0].t_p)


def test_one_study_has_a_difference_and_no_t_test():
    result = compare_methods({"a": [1.0], "b": [3.0]}, "a")[0]
    assert (result.difference.mean, result.difference.count, result.larger) == (2.0, 1, 1)
    assert math.isnan(result.difference.low)
    assert math.isnan(result.t_p)
    assert math.isnan(result.t_holm)
    assert result.wilcoxon_p == 1


@pytest.mark.parametrize(("shift", "t_p", "wilcoxon_p"), [(0.0, 1.0, 1.0), (0.1, 0.0, 2 / 2**8)])
def test_equal_differences_have_defined_p_values(shift: float, t_p: float, wilcoxon_p: float):
    base = np.arange(8.0)
    result = compare_methods({"a": base, "b": base + shift}, "a")[0]
    assert result.t_p == result.t_holm == t_p
    assert result.wilcoxon_p == pytest.approx(wilcoxon_p)
    assert (result.difference.low, result.difference.high) == pytest.approx((shift, shift))


def test_studies_without_a_value_are_left_out_of_the_pair():
    result = compare_methods({"a": [1.0, math.nan, 3.0, 5.0], "b": [2.0, 2.0, 5.0, math.inf]}, "a")[0]
    assert result.difference.count == 2
    assert result.difference.mean == pytest.approx(1.5)
    none = compare_methods({"a": [math.nan], "b": [1.0]}, "a")[0]
    assert none.difference.count == 0
    assert math.isnan(none.wilcoxon_holm)


def test_the_flat_row_holds_plain_numbers():
    row = compare_methods(_values(), "gaussian")[0].flat()
    assert row["studies"] == 20
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert {type(value) for value in row.values()} == {str, int, float}


@pytest.mark.parametrize(
    ("values", "against", "message"),
    [
        ({"a": [1.0], "b": [1.0]}, "c", r"against='c' is not among the methods; expected one of a, b"),
        ({"a": [1.0]}, "a", "expected two methods or more"),
        ({"a": [1.0], "b": [1.0, 2.0]}, "a", "studies a method: {'a': 1, 'b': 2}"),
        ({"a": [], "b": []}, "a", "at least one"),
    ],
)
def test_bad_values_are_refused(values: dict, against: str, message: str):
    with pytest.raises(ValueError, match=message):
        compare_methods(values, against)


def test_bad_levels_and_p_values_are_refused():
    with pytest.raises(ValueError, match="level is 95; expected"):
        compare_methods(_values(), "gaussian", level=95)
    for bad in (-0.1, 1.1, math.inf):
        with pytest.raises(ValueError, match="expected values of 0 to 1"):
            holm([0.5, bad])
