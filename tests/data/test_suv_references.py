# SPDX-License-Identifier: Apache-2.0
"""IBSI's reference objects for SUV give 0.20, 1.00 and 4.00; their twins, made here, do so without the data."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medaccel.data import read_nifti, suv_rule
from medaccel.smooth import smooth
from tests.data.dicom_series import injection, slices

OBJECTS = ("DRO_0_0", "DRO_2_1", "DRO_2_4", "DRO_3_0", "DRO_3_2", "DRO_3_3", "DRO_3_4")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OBJECTS)
def test_a_reference_object_has_its_known_suv(data_dir: Path, tmp_path: Path, name: str) -> None:
    folder = data_dir / "suv_references" / name
    image = smooth(folder / "PT", tmp_path / "out.nii.gz", sigma=0, progress=False)
    inside = np.asarray(read_nifti(folder / "mask" / "DRO_mask.nii.gz").dataobj) > 0
    values = np.asarray(image.dataobj)[inside]
    # The files hold whole numbers: one of them is up to 0.6 % of the smallest value.
    count = json.loads((tmp_path / "out.suv.json").read_text())["factor"]["max"] * (0.001 if name == "DRO_2_1" else 1)
    found = [values.min(), np.median(values), values.max()]
    for value, expected in zip(found, (0.2, 1.0, 4.0), strict=True):
        assert abs(value - expected) <= 1e-3 * expected + (count if expected == 0.2 else 0)


def twin(name: str) -> tuple[list[Dataset], np.ndarray]:
    """Returns the headers of a reference object's slices, as published, and the values that they store for SUV 4."""
    stored = np.full(6, {"DRO_2_1": 3.22972, "DRO_2_4": 8000.0}.get(name, 14400.0))

    def edit(ds: Dataset, k: int) -> None:
        ds.SeriesDate = ds.AcquisitionDate = "20250101"
        ds.PatientWeight, ds.PatientSize, ds.PatientSex = 70.0, 1.75, "O"
        ds.ActualFrameDuration, ds.FrameReferenceTime, ds.DecayFactor = 300000, 150000, 1.0
        item = injection(ds)
        item.RadionuclideTotalDose = 368080000.0
        item.RadiopharmaceuticalStartDateTime = "20250101100000.000000"
        item.RadionuclideCodeSequence[0].CodeValue = "C-111A1"
        item.RadionuclideCodeSequence[0].CodingSchemeDesignator = "SRT"
        late = k >= 3
        if name == "DRO_2_1":
            ds.Units, ds.SUVType, ds.PatientSex = "GML", "LBMJAMES128", "M"
        elif name == "DRO_2_4":
            ds.Units, ds.Manufacturer = "CNTS", "Philips Medical Systems"
            ds.add_new(0x70531000, "DS", "0.0005")  # without its private creator
        elif name == "DRO_3_0":
            item.RadionuclideTotalDose = 368.08
        elif name == "DRO_3_2":
            ds.SeriesTime, ds.ActualFrameDuration = "113000.000000", 603000
            ds.AcquisitionTime = "110500.000000" if late else "110230.000000"
            ds.FrameReferenceTime = 600000.0 if late else 450000.0
        elif name == "DRO_3_3":
            ds.Manufacturer, ds.AcquisitionTime = "GE MEDICAL SYSTEMS", "113000.000000"
            ds.add_new(0x0009100D, "DT", "20250101110000.000000")
        elif name == "DRO_3_4":
            ds.Manufacturer, ds.DecayCorrection, ds.ActualFrameDuration = "GE MEDICAL SYSTEMS", "NONE", 603000
            ds.CorrectedImage = ["NORM", "DTIM", "ATTN", "SCAT", "RAN"]
            ds.AcquisitionTime = "110500.000000" if late else "110000.000000"
            ds.FrameReferenceTime = 600000.0 if late else 300000.0
            stored[k] = 13518.0 if late else 13952.0

    return slices(edit), stored


@pytest.mark.parametrize("name", OBJECTS)
def test_the_twin_of_a_reference_object_has_its_suv(name: str) -> None:
    headers, stored = twin(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        np.testing.assert_allclose(suv_rule(headers).factors * stored, 4.0, rtol=1e-4)


def test_ges_scan_time_wins_where_the_series_time_is_ten_minutes_off() -> None:
    headers, _ = twin("DRO_3_3")
    for header in headers:
        header.SeriesTime = "105000"
    with pytest.warns(UserWarning, match="GE's scan time"):
        np.testing.assert_allclose(suv_rule(headers).factors * 14400, 4.0, rtol=1e-4)
