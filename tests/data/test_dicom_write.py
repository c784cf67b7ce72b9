# SPDX-License-Identifier: Apache-2.0
"""A processed PET goes back to DICOM: the same patient and place, new identity, values to half a slope step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from medaccel.data import files, open_series, read_dicom_series, read_pet_series, write_derived_pet
from medaccel.data.dicom import DicomSeries, load_series
from medaccel.data.suv import suv_factors
from tests.data.dicom_series import COLUMNS, ROWS, SLICES, Edit, write_series

STUDY_UID, FRAME_UID = "1.2.3.9", "1.2.3.8"


def series(folder: Path, edit: Edit | None = None) -> DicomSeries:
    """Makes a series of a patient, with some of the fields that scanners add."""

    def patient(ds: Dataset, k: int) -> None:
        ds.StudyInstanceUID, ds.FrameOfReferenceUID = STUDY_UID, FRAME_UID
        ds.PatientName, ds.PatientID = "Doe^Jane", "P1"
        ds.SeriesNumber, ds.InstanceNumber = 4, k + 1
        ds.ImageType = ["ORIGINAL", "PRIMARY"]
        ds.BurnedInAnnotation = "NO"
        ds.add_new("SmallestImagePixelValue", "SS", 0)
        ds.add_new("LargestImagePixelValue", "SS", 500)
        ds.add_new("PixelPaddingValue", "SS", -7)
        ds.private_block(0x0011, "SOME VENDOR", create=True).add_new(0x01, "LO", "of these very pixels")
        ds.private_block(0x0009, "GEMS_PETD_01", create=True).add_new(0x0D, "DT", "20240229110000.00")
        if edit is not None:
            edit(ds, k)

    return open_series(write_series(folder, patient))


def restored(template: DicomSeries, low: float = 0.0) -> np.ndarray:
    """SUV on the series' grid that differs from its own; one slice is zero."""
    shape = (COLUMNS, ROWS, len(template.headers))
    volume = np.random.default_rng(0).uniform(low, 20, shape).astype(np.float32)
    volume[:, :, 2] = 0
    return volume


def half_steps(folder: Path, expected: np.ndarray) -> np.ndarray:
    """The greatest error of each slice that the reader gives, in half slope steps."""
    written = open_series(folder)
    found = np.asarray(load_series(written, suv=True).dataobj, dtype=np.float64)
    slopes = np.array([float(h.RescaleSlope) for h in written.headers])
    return np.abs(found - expected).max(axis=(0, 1)) / (slopes * suv_factors(written.headers) / 2)


@pytest.mark.parametrize("low", [0.0, -3.0])
@pytest.mark.parametrize("signed", [0, 1])
def test_the_reader_gives_the_volume_back_within_half_a_slope_step(tmp_path: Path, low: float, signed: int) -> None:
    template = series(tmp_path / "in", lambda ds, k: setattr(ds, "PixelRepresentation", signed))
    volume = restored(template, low)
    write_derived_pet(tmp_path / "out", volume, template, description="test")
    assert half_steps(tmp_path / "out", volume).max() < 1.01  # the reader's float32 adds a little
    np.testing.assert_array_equal(open_series(tmp_path / "out").affine, template.affine)
    step = np.abs(volume).max(axis=(0, 1)) / (65535 if low == 0 and signed == 0 else 32767)
    found = np.asarray(read_pet_series(tmp_path / "out").dataobj)
    assert (np.abs(found - volume).max(axis=(0, 1)) <= 0.51 * step + 1e-12).all()


@pytest.mark.parametrize(("units", "unit"), [("GML", 1.0), ("CNTS", 0.25)])
def test_values_return_to_the_unit_of_the_source(tmp_path: Path, units: str, unit: float) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.Units = units
        ds.private_block(0x7053, "Philips PET Private Group", create=True).add_new(0x00, "DS", "0.25")

    template = series(tmp_path / "in", edit)
    volume = restored(template)
    write_derived_pet(tmp_path / "out", volume, template, description="test")
    raw = np.asarray(read_dicom_series(tmp_path / "out").dataobj)
    np.testing.assert_allclose(raw, volume / unit, atol=1e-3 / unit)
    assert half_steps(tmp_path / "out", volume).max() < 1.01
    assert open_series(tmp_path / "out").headers[0].Units == units


def test_identity_is_new_and_patient_and_place_are_the_sources(tmp_path: Path) -> None:
    template = series(tmp_path / "in")
    write_derived_pet(
        tmp_path / "out", restored(template), template, description="nlm, 60 s to 90 s", derivation="A."
    )
    written = open_series(tmp_path / "out")
    sources = {h.SOPInstanceUID: h for h in template.headers}
    uids = {h.SOPInstanceUID for h in written.headers}
    assert len(uids) == SLICES
    assert not uids & set(sources)
    assert len({h.SeriesInstanceUID for h in written.headers} - {"1.2.3"}) == 1
    for header in written.headers:
        [reference] = header.SourceImageSequence
        origin = sources[reference.ReferencedSOPInstanceUID]
        for keyword in ("ImagePositionPatient", "InstanceNumber", "PatientName", "SeriesTime", "BurnedInAnnotation"):
            assert header[keyword].value == origin[keyword].value
        assert (header.StudyInstanceUID, header.FrameOfReferenceUID) == (STUDY_UID, FRAME_UID)
        assert list(header.ImageType) == ["DERIVED", "PRIMARY"]
        assert header.SeriesDescription == "research only: nlm, 60 s to 90 s"
        assert header.SeriesNumber == 1004
        assert "not for diagnosis. nlm, 60 s to 90 s. A. Stored in 16 bits" in header.DerivationDescription
        assert header.DerivationCodeSequence[0].CodingSchemeDesignator == "DCM"
        assert header.file_meta.MediaStorageSOPInstanceUID == header.SOPInstanceUID


def test_what_holds_of_the_old_pixels_alone_is_left_out(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.add_new(0x60000010, "US", ROWS)  # an overlay
        item = ds.RadiopharmaceuticalInformationSequence[0]
        item.private_block(0x0011, "SOME VENDOR", create=True).add_new(0x01, "LO", "nested")

    template = series(tmp_path / "in", edit)
    write_derived_pet(tmp_path / "out", restored(template), template, description="test", series_number=7)
    for header in open_series(tmp_path / "out").headers:
        for keyword in ("SmallestImagePixelValue", "LargestImagePixelValue", "PixelPaddingValue"):
            assert keyword not in header
        assert 0x60000010 not in header
        assert not [e for e in header.RadiopharmaceuticalInformationSequence[0] if e.tag.is_private]
        private = {e.tag for e in header if e.tag.is_private}
        assert private == {0x00090010, 0x0009100D}  # the scan time, which SUV may depend on
        assert header.SeriesNumber == 7
    assert template.headers[0].private_block(0x0011, "SOME VENDOR")[0x01].value == "of these very pixels"


def test_a_series_made_after_the_scan_keeps_its_suv(tmp_path: Path) -> None:
    template = series(tmp_path / "in", lambda ds, k: setattr(ds, "SeriesTime", "150000.00"))
    volume = restored(template)
    write_derived_pet(tmp_path / "out", volume, template, description="test")
    assert half_steps(tmp_path / "out", volume).max() < 1.01


def test_philips_factors_without_their_creator_are_kept(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.Manufacturer, ds.Units = "Philips Medical Systems", "CNTS"
        ds.add_new(0x70531000, "DS", "0.0005")
        ds.add_new(0x70531020, "LO", "about other pixels")

    template = series(tmp_path / "in", edit)
    volume = restored(template)
    write_derived_pet(tmp_path / "out", volume, template, description="test")
    assert half_steps(tmp_path / "out", volume).max() < 1.01
    assert 0x70531020 not in pydicom.dcmread(next((tmp_path / "out").iterdir()))


def test_a_compressed_series_becomes_a_plain_one(tmp_path: Path) -> None:
    template = series(tmp_path / "in", lambda ds, k: ds.compress(RLELossless))
    volume = restored(template)
    write_derived_pet(tmp_path / "out", volume, template, description="test")
    assert half_steps(tmp_path / "out", volume).max() < 1.01
    path = next((tmp_path / "out").iterdir())
    assert not pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed


def test_earlier_equipment_stays_on_record(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        item = Dataset()
        item.Manufacturer = "EARLIER"
        ds.ContributingEquipmentSequence = [item]

    template = series(tmp_path / "in", edit)
    write_derived_pet(tmp_path / "out", restored(template), template, description="test")
    equipment = open_series(tmp_path / "out").headers[0].ContributingEquipmentSequence
    assert [item.Manufacturer for item in equipment] == ["EARLIER", "medaccel"]


# --- Folders ---


def test_an_empty_folder_is_filled_and_a_full_one_refused_unless_forced(tmp_path: Path) -> None:
    template, out = series(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    write_derived_pet(out, restored(template), template, description="first")
    with pytest.raises(FileExistsError, match="not empty"):
        write_derived_pet(out, restored(template), template, description="second")
    assert open_series(out).headers[0].SeriesDescription == "research only: first"
    (out / "left_over.dcm").write_bytes(next(out.iterdir()).read_bytes())
    write_derived_pet(out, restored(template), template, description="second", force=True)
    assert {h.SeriesDescription for h in open_series(out).headers} == {"research only: second"}
    assert len(list(out.iterdir())) == SLICES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_force_replaces_nothing_but_dicom_and_never_the_source(tmp_path: Path) -> None:
    template = series(tmp_path / "in")
    before = sorted(p.read_bytes() for p in (tmp_path / "in").iterdir())
    with pytest.raises(ValueError, match="derived from"):
        write_derived_pet(tmp_path / "in", restored(template), template, description="x", force=True)
    assert sorted(p.read_bytes() for p in (tmp_path / "in").iterdir()) == before
    with pytest.raises(ValueError, match="in is no DICOM file"):
        write_derived_pet(tmp_path, restored(template), template, description="x", force=True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.txt is no DICOM file"):
        write_derived_pet(notes, restored(template), template, description="x", force=True)
    assert (notes / "thesis.txt").read_text() == "years of work"


def test_a_failure_in_the_middle_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template, saved = series(tmp_path / "in"), []
    save = Dataset.save_as

    def failing(self: Dataset, path: Path, **options: object) -> None:
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(self, path, **options)

    monkeypatch.setattr(Dataset, "save_as", failing)
    monkeypatch.setattr(pydicom.dataset.FileDataset, "save_as", failing)
    with pytest.raises(OSError, match="writing failed") as error:
        write_derived_pet(tmp_path / "out", restored(template), template, description="x")
    assert error.value.filename == str(tmp_path / "out")
    assert len(saved) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_old_folder_returns_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    replace, calls = files.os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise PermissionError("not now")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(PermissionError), files.atomic_folder(out, force=True) as temporary:
        (temporary / "new").write_text("new")
    assert [p.name for p in out.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_or_a_missing_parent_is_no_output_folder(tmp_path: Path) -> None:
    template = series(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="this is a file"):
        write_derived_pet(tmp_path / "file", restored(template), template, description="x", force=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_derived_pet(tmp_path / "none" / "out", restored(template), template, description="x")


# --- What is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:, :, :-1], r"shape \(5, 4, 5\), expected the series' \(5, 4, 6\)"),
        (lambda v: np.where(np.arange(SLICES) == 1, np.nan, v), "20 voxels that are NaN"),
    ],
)
def test_a_volume_that_is_not_the_series_is_refused(tmp_path: Path, change, message: str) -> None:
    template = series(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        write_derived_pet(tmp_path / "out", change(restored(template)), template, description="x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("description", ["", " ", "x" * 51, "σ", "a\\b", "two\nlines"])
def test_a_description_that_dicom_cannot_hold_is_refused(tmp_path: Path, description: str) -> None:
    template = series(tmp_path / "in")
    with pytest.raises(ValueError, match=r"description .*expected"):
        write_derived_pet(tmp_path / "out", restored(template), template, description=description)


def test_a_ct_series_is_no_template(tmp_path: Path) -> None:
    template = series(tmp_path / "in", lambda ds, k: setattr(ds, "Modality", "CT"))
    with pytest.raises(ValueError, match=r"Modality \(0008,0060\) is CT, expected PT"):
        write_derived_pet(tmp_path / "out", restored(template), template, description="x")


# --- A real study ---


def test_a_real_series_returns_within_half_a_slope_step(tmp_path: Path, data_dir: Path) -> None:
    whole = open_series(data_dir / "pet" / "sts_001_fdg_pet_dicom")
    template = DicomSeries(whole.headers[100:112], whole.affine)
    volume = 0.987 * np.asarray(load_series(template, suv=True).dataobj)
    write_derived_pet(tmp_path / "out", volume, template, description="scaled")
    assert half_steps(tmp_path / "out", volume).max() < 1.01
    written = open_series(tmp_path / "out")
    assert [h.ImagePositionPatient for h in written.headers] == [h.ImagePositionPatient for h in template.headers]
    assert written.headers[0].StudyInstanceUID == template.headers[0].StudyInstanceUID
    assert written.headers[0].SeriesInstanceUID != template.headers[0].SeriesInstanceUID
