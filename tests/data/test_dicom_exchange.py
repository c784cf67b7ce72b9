# SPDX-License-Identifier: Apache-2.0
"""Written DICOM passes a validator, keeps or loses the patient as asked, and is for its owner alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from medaccel.data import open_series, read_pet_series, write_derived_pet
from medaccel.data.dicom import DicomSeries, load_series
from tests.data.dicom_series import write_series
from tests.data.validator import errors

SECRETS = ("Doe^Jane", "ID-4711", "St. Elsewhere", "19610203", "plays the cello", "Dr^Who", "1.2.3.9.77")


def whole(ds: Dataset, k: int) -> None:
    """Adds what the standard asks of a PET, and what identifies a patient."""
    ds.StudyInstanceUID, ds.FrameOfReferenceUID = "1.2.3.9.77", "1.2.3.9.78"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Doe^Jane", "ID-4711", "19610203", "F"
    ds.InstitutionName, ds.ReferringPhysicianName, ds.ImageComments = "St. Elsewhere", "Dr^Who", "plays the cello"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20240229", "103000", "1", "A1"
    ds.FrameReferenceTime, ds.DecayFactor, ds.ActualFrameDuration = 0, 1, 60000
    ds.SeriesType, ds.ImageIndex, ds.InstanceNumber, ds.SeriesNumber = ["STATIC", "IMAGE"], k + 1, k + 1, 4
    ds.PatientPosition, ds.BodyPartExamined = "HFS", "CHEST"
    item = ds.RadiopharmaceuticalInformationSequence[0]
    item.RadiopharmaceuticalStartDateTime = "20240229100000.00"
    other = Dataset()
    other.PatientID, other.IssuerOfPatientID, other.TypeOfPatientID = "ID-4711", "St. Elsewhere", "TEXT"
    ds.OtherPatientIDsSequence = [other]
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = ds.SOPClassUID, "1.2.3.9.77.5"
    ds.ReferencedImageSequence = [reference]


def both(*edits: Callable[[Dataset, int], None]) -> Callable[[Dataset, int], None]:
    def edit(ds: Dataset, k: int) -> None:
        for one in edits:
            one(ds, k)

    return edit


def without(*keywords: str) -> Callable[[Dataset, int], None]:
    return lambda ds, k: [delattr(ds, keyword) for keyword in keywords if keyword in ds] and None


def fields(**values: Any) -> Callable[[Dataset, int], None]:
    return lambda ds, k: [setattr(ds, *item) for item in values.items()] and None


SOURCES: dict[str, Callable[[Dataset, int], None]] = {
    "whole": whole,
    "little": both(whole, without("PatientBirthDate", "StudyID", "SeriesNumber", "InstanceNumber", "ImageIndex")),
    "no study": both(whole, without("StudyInstanceUID", "FrameOfReferenceUID", "BodyPartExamined")),
    "misspelt": both(whole, fields(SeriesType=["WHOLEBODY", "IMAGE"], NumberOfTimeSlices=3)),
    "leg": both(whole, fields(BodyPartExamined="LEG", PatientPosition="FFP")),
    "no correction": both(whole, fields(DecayCorrection="NONE", CorrectedImage=["ATTN"])),
}


def written(tmp_path: Path, source: Path, **options: Any) -> tuple[np.ndarray, Path]:
    """Writes a series as it was read."""
    template = open_series(source)
    volume = np.asarray(load_series(template, suv=True).dataobj)
    write_derived_pet(tmp_path / "out", volume, template, description="identity", **options)
    return volume, tmp_path / "out"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_the_validator_finds_no_error(tmp_path: Path, name: str, hidden: bool) -> None:
    volume, out = written(tmp_path, write_series(tmp_path / "in", SOURCES[name]), deidentify=hidden)
    for path in sorted(out.iterdir())[::5]:
        assert errors(path) == []
    np.testing.assert_allclose(np.asarray(read_pet_series(out).dataobj), volume, atol=1e-4 * volume.max(), rtol=0)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_real_series_passes_the_validator_and_comes_back(tmp_path: Path, data_dir: Path, hidden: bool) -> None:
    series = open_series(data_dir / "pet" / "sts_001_fdg_pet_dicom")
    template = DicomSeries(series.headers[100:104], series.affine)
    volume = np.asarray(load_series(template, suv=True).dataobj)
    write_derived_pet(tmp_path / "out", volume, template, description="identity", deidentify=hidden)
    for path in (tmp_path / "out").iterdir():
        assert errors(path) == []
    found = read_pet_series(tmp_path / "out")
    np.testing.assert_allclose(np.asarray(found.dataobj), volume, atol=1e-4 * volume.max(), rtol=0)
    origins = zip(open_series(tmp_path / "out").headers, template.headers, strict=True)
    assert all(a.ImagePositionPatient == b.ImagePositionPatient for a, b in origins)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("syntax", ["implicit", "big"])
def test_other_encodings_are_converted(tmp_path: Path, syntax: str) -> None:
    def edit(ds: Dataset, k: int) -> None:
        whole(ds, k)
        ds.add_new(
            "RedPaletteColorLookupTableData", "OW", b"\x00\x01\x00\x02" if syntax == "big" else b"\x01\x00\x02\x00"
        )

    volume, out = written(tmp_path, write_series(tmp_path / "in", edit, syntax=syntax))
    np.testing.assert_allclose(np.asarray(read_pet_series(out).dataobj), volume, atol=1e-4 * volume.max(), rtol=0)
    first = pydicom.dcmread(next(out.iterdir()))
    assert first.file_meta.TransferSyntaxUID.name == "Explicit VR Little Endian"
    assert first.RedPaletteColorLookupTableData == b"\x01\x00\x02\x00"
    assert first.PatientName == "Doe^Jane"


def test_the_patient_is_kept_unless_that_is_unwanted(tmp_path: Path) -> None:
    source = write_series(tmp_path / "in", whole)
    volume, out = written(tmp_path, source)
    kept = b"".join(path.read_bytes() for path in out.iterdir())
    assert all(word.encode() in kept for word in SECRETS)

    _, out = written(tmp_path, source, deidentify=True, force=True)
    hidden = b"".join(path.read_bytes() for path in out.iterdir())
    assert not [word for word in (*SECRETS, "20240229", "100000.00", "1.2.3.9.78") if word.encode() in hidden]
    series = open_series(out)
    for header in series.headers:
        assert (header.Units, header.SUVType, header.PatientIdentityRemoved) == ("GML", "BW", "YES")
        assert header.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
        assert header.SeriesDescription == "research only: identity"
        assert "not for diagnosis" in header.DerivationDescription
        assert "SourceImageSequence" not in header
    assert len({h.SOPInstanceUID for h in series.headers}) == len(series.headers)
    assert len({(h.StudyInstanceUID, h.FrameOfReferenceUID) for h in series.headers}) == 1
    np.testing.assert_allclose(np.asarray(read_pet_series(out).dataobj), volume, atol=1e-4 * volume.max(), rtol=0)


def test_the_source_is_not_changed_by_hiding_it(tmp_path: Path) -> None:
    template = open_series(write_series(tmp_path / "in", whole))
    volume = np.asarray(load_series(template, suv=True).dataobj)
    write_derived_pet(tmp_path / "out", volume, template, description="x", deidentify=True)
    assert {str(h.PatientName) for h in template.headers} == {"Doe^Jane"}
    assert {h.OtherPatientIDsSequence[0].PatientID for h in template.headers} == {"ID-4711"}


def test_without_the_package_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dicomanonymizer", None)
    with pytest.raises(
        ValueError, match=r"deidentify needs dicom-anonymizer, which is not installed here: pip install"
    ):
        written(tmp_path, write_series(tmp_path / "in", whole), deidentify=True)
    assert not (tmp_path / "out").exists()


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        _, out = written(tmp_path, write_series(tmp_path / "in", whole))
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}
