# SPDX-License-Identifier: Apache-2.0
"""SUV factors follow DICOM's rules, and every field they rest on is named where it fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medaccel.data import suv_factors
from tests.data.dicom_series import (
    DOSE_BQ,
    ELAPSED_S,
    HALF_LIFE_S,
    SLICES,
    SUV_PER_BQML,
    WEIGHT_KG,
    injection,
    slices,
)

Change = Callable[[Dataset], None]

INJECTION_FIELDS = {
    *("RadionuclideTotalDose", "RadionuclideHalfLife", "RadionuclideCodeSequence"),
    *("RadiopharmaceuticalStartTime", "RadiopharmaceuticalStartDateTime"),
}
GE_SCAN_TIME = r"GE's scan time \(0009,100D\)"
SUV_WITHOUT_DECAY = 1000 * WEIGHT_KG / DOSE_BQ


def changed(**fields: object) -> list[Dataset]:
    """The series with these fields, of the slice or of the injection; None removes one."""
    return slices(lambda ds, k: change(ds, fields))


def change(ds: Dataset, fields: dict[str, object]) -> None:
    for keyword, value in fields.items():
        item = injection(ds) if keyword in INJECTION_FIELDS else ds
        if value is None:
            delattr(item, keyword)
        else:
            setattr(item, keyword, value)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="pydicom")  # on the values that tests break
        yield


def test_start_decays_the_dose_to_the_series_time() -> None:
    factors = suv_factors(slices())
    assert factors.shape == (SLICES,)
    np.testing.assert_allclose(factors, SUV_PER_BQML, rtol=1e-12)


def test_start_takes_the_series_time_for_every_bed() -> None:
    headers = slices(lambda ds, k: setattr(ds, "AcquisitionTime", f"110{k}00"))
    np.testing.assert_allclose(suv_factors(headers), SUV_PER_BQML, rtol=1e-12)


def test_admin_does_not_decay_the_dose() -> None:
    headers = changed(DecayCorrection="ADMIN", RadiopharmaceuticalStartTime=None, SeriesTime="230000")
    np.testing.assert_allclose(suv_factors(headers), SUV_WITHOUT_DECAY, rtol=1e-12)


def test_none_decays_the_dose_to_each_slices_acquisition() -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.DecayCorrection, ds.CorrectedImage = "NONE", ["ATTN"]
        ds.AcquisitionTime = f"11{10 * k:02d}00"
        ds.ActualFrameDuration = 600000

    elapsed = ELAPSED_S + 600 * np.arange(SLICES)
    decay = np.log(2) / HALF_LIFE_S * 600
    expected = SUV_WITHOUT_DECAY * 2 ** (elapsed / HALF_LIFE_S) * decay / (1 - np.exp(-decay))
    np.testing.assert_allclose(suv_factors(slices(edit)), expected, rtol=1e-9)


def test_injection_before_midnight_is_the_day_before() -> None:
    headers = changed(RadiopharmaceuticalStartTime="233000", SeriesTime="003000", AcquisitionTime="003000")
    np.testing.assert_allclose(suv_factors(headers), SUV_PER_BQML, rtol=1e-12)


def test_acquisition_past_midnight_is_later_than_the_series() -> None:
    def edit(ds: Dataset, k: int) -> None:
        injection(ds).RadiopharmaceuticalStartTime = "225000"
        ds.SeriesTime = "235000"
        ds.AcquisitionDate, ds.AcquisitionTime = ("20240229", "235500") if k < 3 else ("20240301", "000500")

    np.testing.assert_allclose(suv_factors(slices(edit)), SUV_PER_BQML, rtol=1e-12)


def test_date_and_time_of_injection_are_used_where_given() -> None:
    headers = changed(RadiopharmaceuticalStartTime=None, RadiopharmaceuticalStartDateTime="20240229100000.00")
    np.testing.assert_allclose(suv_factors(headers), SUV_PER_BQML, rtol=1e-12)


def test_injection_in_another_time_zone_is_converted() -> None:
    headers = changed(RadiopharmaceuticalStartDateTime="20240229090000.00+0000", TimezoneOffsetFromUTC="+0100")
    np.testing.assert_allclose(suv_factors(headers), SUV_PER_BQML, rtol=1e-12)


def test_time_and_datetime_of_injection_must_agree() -> None:
    headers = changed(RadiopharmaceuticalStartDateTime="20240229093000.00")
    with pytest.raises(ValueError, match=r"StartTime \(0018,1072\) is 100000.*DateTime .* is .*09:30"):
        suv_factors(headers)


def test_long_lived_nuclides_need_the_date_of_injection() -> None:
    zirconium = {"RadionuclideHalfLife": 282276.0, "RadionuclideCodeSequence": None}
    with pytest.raises(ValueError, match=r"RadiopharmaceuticalStartDateTime \(0018,1078\) is missing"):
        suv_factors(changed(**zirconium))
    factors = suv_factors(changed(**zirconium, RadiopharmaceuticalStartDateTime="20240226100000"))
    np.testing.assert_allclose(factors, SUV_WITHOUT_DECAY * 2 ** (73 * 3600 / 282276.0), rtol=1e-12)


# --- Derived series ---


def with_ge_scan_time(ds: Dataset, value: str | bytes) -> None:
    ds.SeriesTime = "150000"
    vr = "UN" if isinstance(value, bytes) else "DT"
    ds.private_block(0x0009, "GEMS_PETD_01", create=True).add_new(0x0D, vr, value)


@pytest.mark.parametrize("value", ["20240229110000.00", b"20240229110000.00 "])
def test_a_derived_series_takes_ges_scan_time(value: str | bytes) -> None:
    headers = slices(lambda ds, k: with_ge_scan_time(ds, value))
    np.testing.assert_allclose(suv_factors(headers), SUV_PER_BQML, rtol=1e-12)


def test_a_derived_series_without_scan_time_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"SeriesTime \(0008,0031\) is .*15:00.*{GE_SCAN_TIME} is missing"):
        suv_factors(changed(SeriesTime="150000"))


def test_a_scan_time_after_the_acquisition_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"{GE_SCAN_TIME} is .*11:05.*after the first acquisition"):
        suv_factors(slices(lambda ds, k: with_ge_scan_time(ds, "20240229110500")))


# --- Units ---


def test_gml_is_suv_already() -> None:
    headers = changed(Units="GML", PatientWeight=None, RadionuclideTotalDose=None)
    np.testing.assert_array_equal(suv_factors(headers), np.ones(SLICES))


def test_suv_of_lean_body_mass_need_the_height() -> None:
    with pytest.raises(ValueError, match=r"PatientSize \(0010,1020\) is missing or 0, which lean body mass"):
        suv_factors(changed(Units="GML", SUVType="LBM"))


def philips(suv_scale: float, activity_scale: float) -> list[Dataset]:
    def edit(ds: Dataset, k: int) -> None:
        ds.Units = "CNTS"
        block = ds.private_block(0x7053, "Philips PET Private Group", create=True)
        block.add_new(0x00, "DS", str(suv_scale))
        block.add_new(0x09, "DS", str(activity_scale))

    return slices(edit)


def test_counts_take_philips_suv_scale() -> None:
    np.testing.assert_allclose(suv_factors(philips(0.00123, 0)), 0.00123)


def test_counts_take_philips_activity_scale_where_the_suv_scale_is_0() -> None:
    np.testing.assert_allclose(suv_factors(philips(0, 2.5)), 2.5 * SUV_PER_BQML)


@pytest.mark.parametrize("headers", [philips(0, 0), changed(Units="CNTS")], ids=["zeros", "absent"])
def test_counts_without_a_scale_are_refused(headers: list[Dataset]) -> None:
    with pytest.raises(ValueError, match=r"Units \(0054,1001\) is CNTS, but.*\(7053,1000\).*\(7053,1009\)"):
        suv_factors(headers)


def test_other_units_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Units \(0054,1001\) is PROPCPS, expected BQML, GML, CM2ML or CNTS"):
        suv_factors(changed(Units="PROPCPS"))


# --- Fields ---


@pytest.mark.parametrize(
    "keyword",
    [
        *("Units", "PatientWeight", "DecayCorrection", "SeriesDate", "SeriesTime"),
        *("AcquisitionDate", "AcquisitionTime", "RadiopharmaceuticalInformationSequence"),
        *("RadionuclideTotalDose", "RadionuclideHalfLife", "RadiopharmaceuticalStartTime"),
    ],
)
@pytest.mark.parametrize("state", ["missing", "empty"])
def test_a_field_that_is_missing_or_empty_is_named_with_its_file(keyword: str, state: str) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.filename = f"slice{k}.dcm"
        if keyword == "RadionuclideHalfLife":  # else the nuclide's is taken
            change(ds, {"RadionuclideCodeSequence": None})
        if state == "missing":
            change(ds, {keyword: None})
        else:
            change(ds, {keyword: [] if keyword.endswith("Sequence") else ""})

    with pytest.raises(ValueError, match=rf"slice0\.dcm: {keyword} \(....,....\) is {state}"):
        suv_factors(slices(edit))


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("PatientWeight", 0, "expected a positive number of kg"),
        ("RadionuclideTotalDose", 3.7, "expected Bq; is it MBq"),
        ("RadionuclideHalfLife", -1, "expected a positive number of seconds"),
        ("DecayCorrection", "LATER", "expected START, ADMIN or NONE"),
        ("RadiopharmaceuticalStartTime", "110500", "expected 0 to 10 half-lives"),
        ("RadiopharmaceuticalStartTime", "257000", "no valid date or time"),
        ("CorrectedImage", ["ATTN"], "expected DECY in it"),
    ],
)
def test_a_senseless_value_is_named(keyword: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{keyword} \(....,....\).*{message}"):
        suv_factors(changed(**{keyword: value}))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("PatientWeight", 71), ("RadionuclideTotalDose", 3.8e8), ("Units", "GML"), ("SeriesTime", "110001")],
)
def test_slices_that_disagree_are_both_named(keyword: str, value: object) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.filename = f"slice{k}.dcm"
        if k == 4:
            change(ds, {keyword: value})

    with pytest.raises(ValueError, match=rf"slice4\.dcm: .*{keyword} \(....,....\) is .* in slice0\.dcm"):
        suv_factors(slices(edit))


def test_two_injections_are_refused() -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.RadiopharmaceuticalInformationSequence = [injection(ds), injection(ds)]

    with pytest.raises(ValueError, match=r"RadiopharmaceuticalInformationSequence \(0054,0016\) has 2 items"):
        suv_factors(slices(edit))


def test_no_headers_are_refused() -> None:
    with pytest.raises(ValueError, match="no headers"):
        suv_factors([])


# --- Warnings ---


@pytest.mark.parametrize("meaning", ["18F", "F-18", "^18^Fluorine", "Fluorine F^18^"])
def test_a_half_life_over_one_percent_off_is_warned_of_and_used(meaning: str) -> None:
    def edit(ds: Dataset, k: int) -> None:
        injection(ds).RadionuclideHalfLife = 6700.0
        injection(ds).RadionuclideCodeSequence[0].CodeMeaning = meaning

    with pytest.warns(UserWarning, match=r"RadionuclideHalfLife \(0018,1075\) is 6700 s.*is 6586\.2 s"):
        factors = suv_factors(slices(edit))
    np.testing.assert_allclose(factors, SUV_WITHOUT_DECAY * 2 ** (ELAPSED_S / 6700))


def test_a_half_life_within_one_percent_is_no_cause_for_a_warning() -> None:
    suv_factors(changed(RadionuclideHalfLife=6588.0))


def test_a_series_without_attenuation_correction_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"CorrectedImage \(0028,0051\) lacks ATTN"):
        suv_factors(changed(CorrectedImage="DECY"))
