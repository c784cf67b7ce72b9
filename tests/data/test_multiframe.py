# SPDX-License-Identifier: Apache-2.0
"""Multi-frame PET is read like the same slices in files of their own; frames in time are listed and chosen; pixels
that can't be decoded name what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from medaccel.data import (
    load_series,
    open_series,
    read_dicom_series,
    read_pet_series,
    suv_rule,
    write_derived_pet,
)
from tests.data.dicom_series import (
    DOSE_BQ,
    HALF_LIFE_S,
    SLICE_SPACING,
    SLICES,
    SUV_PER_BQML,
    WEIGHT_KG,
    injection,
    slices,
    slope,
    stored_pixels,
    volume,
    write_series,
)

ENHANCED, LEGACY = "1.2.840.10008.5.1.4.1.1.130", "1.2.840.10008.5.1.4.1.1.128.1"


def item(**fields: object) -> list[Dataset]:
    dataset = Dataset()
    for keyword, value in fields.items():
        setattr(dataset, keyword, value)
    return [dataset]


def multi_frame(
    folder: Path,
    *,
    units: str = "Bq/ml",
    scale: float = 1.0,
    legacy: bool = False,
    edit: Callable[[Dataset], None] | None = None,
) -> Path:
    """Writes `slices()` as one file, frames in descending order."""
    folder.mkdir(exist_ok=True)
    classic = slices()
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = LEGACY if legacy else ENHANCED
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["multi"])
    first = classic[0]
    for keyword in (
        *("SeriesInstanceUID", "Modality", "Manufacturer", "SeriesDate", "SeriesTime", "PatientWeight", "Rows"),
        *("Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit"),
        "PixelRepresentation",
    ):
        setattr(ds, keyword, getattr(first, keyword))
    injected = injection(first)
    if not legacy:
        ds.RadiopharmaceuticalInformationSequence = [injected]
        injected.RadiopharmaceuticalStartDateTime = "20240229100000"
        del injected.RadiopharmaceuticalStartTime
        ds.AcquisitionDateTime = "20240229110000"
        ds.DecayCorrected, ds.DecayCorrectionDateTime, ds.AttenuationCorrected = "YES", "20240229110000", "YES"
    ds.NumberOfFrames = SLICES
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=first.ImageOrientationPatient)
    shared.PixelMeasuresSequence = item(PixelSpacing=first.PixelSpacing, SliceThickness=SLICE_SPACING)
    if legacy:
        shared.UnassignedSharedConvertedAttributesSequence = item(
            Units="BQML",
            DecayCorrection="START",
            CorrectedImage=["DECY", "ATTN"],
            RadiopharmaceuticalInformationSequence=[injected],
            AcquisitionDate="20240229",
        )
    ds.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for k in reversed(range(SLICES)):
        group = Dataset()
        group.PlanePositionSequence = item(ImagePositionPatient=classic[k].ImagePositionPatient)
        group.FrameContentSequence = item(
            FrameAcquisitionDateTime="20240229110000",
            FrameReferenceDateTime="20240229110230",
            FrameAcquisitionDuration=300000.0,
        )
        group.PixelValueTransformationSequence = item(RescaleSlope=slope(k), RescaleIntercept=0, RescaleType="US")
        if legacy:
            group.UnassignedPerFrameConvertedAttributesSequence = item(AcquisitionTime="110000")
        else:
            code = item(CodeValue=units, CodingSchemeDesignator="UCUM", CodeMeaning=units)
            mapping = item(MeasurementUnitsCodeSequence=code)[0]
            mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = scale * slope(k), 0.0
            group.RealWorldValueMappingSequence = [mapping]
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = groups
    ds.PixelData = b"".join(stored_pixels(k).tobytes() for k in reversed(range(SLICES)))
    if edit is not None:
        edit(ds)
    ds.save_as(folder / "enhanced.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize("legacy", [False, True], ids=["enhanced", "legacy converted"])
def test_a_multi_frame_series_equals_its_single_slices(tmp_path: Path, legacy: bool) -> None:
    folder = multi_frame(tmp_path / "m", legacy=legacy)
    single = read_pet_series(write_series(tmp_path / "s"))
    image = read_pet_series(folder)
    np.testing.assert_allclose(np.asarray(image.dataobj), np.asarray(single.dataobj), rtol=1e-6)
    np.testing.assert_array_equal(image.affine, single.affine)
    np.testing.assert_allclose(np.asarray(read_dicom_series(folder).dataobj), volume())
    np.testing.assert_allclose(suv_rule(open_series(folder).headers).factors, SUV_PER_BQML)


@pytest.mark.parametrize(
    ("units", "scale", "expected"),
    [
        ("Bq/ml", 1.0, SUV_PER_BQML),
        ("kBq/ml", 0.001, SUV_PER_BQML),
        ("g/ml{SUVbw}", 1.0, 1.0),
        ("{SUVbw}g/ml", 1.0, 1.0),
        ("g/ml", 1.0, 1.0),
    ],
)
def test_the_units_of_the_real_world_value_mapping_count(
    tmp_path: Path, units: str, scale: float, expected: float
) -> None:
    image = read_pet_series(multi_frame(tmp_path / "m", units=units, scale=scale))
    np.testing.assert_allclose(np.asarray(image.dataobj), volume() * expected, rtol=1e-6)


def test_other_units_of_a_multi_frame_series_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"enhanced\.dcm: Units \(0054,1001\) is missing"):
        read_pet_series(multi_frame(tmp_path / "m", units="mm"))


def test_lean_mass_in_a_multi_frame_series_needs_the_height(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PatientSize \(0010,1020\) is missing"):
        read_pet_series(multi_frame(tmp_path / "m", units="g/ml{SUVlbm}"))


def test_a_multi_frame_series_without_decay_correction_has_the_frames_times(tmp_path: Path) -> None:
    def edit(ds: Dataset) -> None:
        ds.DecayCorrected = "NO"
        del ds.DecayCorrectionDateTime
        for k, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
            content = group.FrameContentSequence[0]
            content.FrameAcquisitionDateTime = "20240229110000" if k < 3 else "20240229110500"
            content.FrameReferenceDateTime = "20240229110230" if k < 3 else "20240229110730"

    rule = suv_rule(open_series(multi_frame(tmp_path / "m", edit=edit)).headers)
    elapsed = np.array([3600 + 450] * 3 + [3600 + 150] * 3)  # frames are stored from the last slice to the first
    expected = 1000 * WEIGHT_KG / DOSE_BQ * 2 ** (elapsed / HALF_LIFE_S)
    np.testing.assert_allclose(rule.factors, expected, rtol=1e-9)


def test_the_decay_correction_time_counts_where_the_series_was_sent_later(tmp_path: Path) -> None:
    folder = multi_frame(tmp_path / "m", edit=lambda ds: setattr(ds, "SeriesTime", "160000"))
    rule = suv_rule(open_series(folder).headers)
    np.testing.assert_allclose(rule.factors, SUV_PER_BQML)
    assert rule.origin == "DecayCorrectionDateTime (0018,9701)"


def test_groups_that_do_not_fit_the_frames_are_refused(tmp_path: Path) -> None:
    folder = multi_frame(tmp_path / "m", edit=lambda ds: setattr(ds, "NumberOfFrames", 5))
    with pytest.raises(ValueError, match=r"NumberOfFrames \(0028,0008\) is 5, but PerFrame.* has 6 items"):
        open_series(folder)


def test_a_multi_frame_series_is_no_template(tmp_path: Path) -> None:
    series = open_series(multi_frame(tmp_path / "m"))
    values = np.asarray(load_series(series, suv=True).dataobj)
    with pytest.raises(ValueError, match="multi-frame file, which can't be a template"):
        write_derived_pet(tmp_path / "out", values, series, description="x")


# --- Frames in time ---


def dynamic(folder: Path, *, gated: bool = False, leave_out: int | None = None) -> Path:
    """Writes two frames of `slices()`, the second of twice the values."""
    folder.mkdir()
    for frame in (1, 2):
        for k, ds in enumerate(slices()):
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[f"{frame} {k}"])
            ds.SeriesType = ["GATED" if gated else "DYNAMIC", "IMAGE"]
            ds.RescaleSlope = frame * slope(k)
            if gated:
                ds.TriggerTime = 400.0 * (frame - 1)
            else:
                ds.AcquisitionTime = f"110{frame - 1}00"
                ds.FrameReferenceTime, ds.ActualFrameDuration = 60000.0 * (frame - 1), 60000
            if (frame, k) != (2, leave_out):
                ds.save_as(folder / f"{frame}{k}.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize(
    ("gated", "listed"),
    [
        (False, r"DYNAMIC.* of 2 frames.*1: .*110000.*; 2: .*AcquisitionTime 110100, FrameReferenceTime 60000.*"),
        (True, r"GATED.* of 2 frames.*1: .*TriggerTime 0.*; 2: .*TriggerTime 400"),
    ],
)
def test_frames_are_listed_and_chosen(tmp_path: Path, gated: bool, listed: str) -> None:
    folder = dynamic(tmp_path / "d", gated=gated)
    with pytest.raises(ValueError, match=listed):
        open_series(folder)
    for frame in (1, 2):
        image = read_pet_series(folder, frame=frame)
        np.testing.assert_allclose(np.asarray(image.dataobj), frame * volume() * SUV_PER_BQML, rtol=1e-5)
    for frame in (0, 3):
        with pytest.raises(ValueError, match=rf"frame is {frame}, expected 1 to 2"):
            open_series(folder, frame=frame)


def test_a_series_of_one_frame_has_no_second(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s")
    assert read_pet_series(folder, frame=1).shape[2] == SLICES
    with pytest.raises(ValueError, match="frame is 2, expected 1 to 1"):
        open_series(folder, frame=2)


def test_incomplete_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 slice\(s\) at its position.*where others have 2"):
        open_series(dynamic(tmp_path / "d", leave_out=4), frame=1)


# --- Compression ---


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_slices_are_decoded(tmp_path: Path, syntax: str) -> None:
    if syntax == JPEGLSLossless:
        pytest.importorskip("jpeg_ls")
    folder = write_series(tmp_path / "s", lambda ds, k: ds.compress(syntax))
    np.testing.assert_allclose(np.asarray(read_dicom_series(folder).dataobj), volume())


def test_a_missing_decoder_is_named_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        ds.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
        ds["PixelData"].is_undefined_length = True

    folder = write_series(tmp_path / "s", edit)
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", property(lambda self: False))
    with pytest.raises(ValueError, match=r"compressed as JPEG Lossless.*pip install 'medaccel\[dicom\]'"):
        open_series(folder)
