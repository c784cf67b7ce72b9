# SPDX-License-Identifier: Apache-2.0
"""Headers that can't be: each gets a sentence with file and field before work is done; what is odd but clear is read,
and said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medaccel.cli import main
from medaccel.data import open_series, read_dicom_series, voxel_spacing
from tests.data.dicom_series import COLUMNS, ROWS, SLICE_SPACING, file_name, stored_pixels, volume, write_series
from tests.data.test_hostile_files import little_memory

ALL = -1


def setting(keyword: str, value: Any, only: int = 2) -> Callable[[Dataset, int], None]:
    """Returns an edit of one slice, or of all."""

    def edit(ds: Dataset, k: int) -> None:
        if only in (ALL, k):
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)

    return edit


def both(*edits: Callable[[Dataset, int], None]) -> Callable[[Dataset, int], None]:
    def edit(ds: Dataset, k: int) -> None:
        for one in edits:
            one(ds, k)

    return edit


def doubled(ds: Dataset, k: int) -> None:
    ds.PixelData = stored_pixels(k).tobytes() * 2


def halved(ds: Dataset, k: int) -> None:
    ds.PixelData = stored_pixels(k).astype(np.uint8).tobytes()


def two_of(keyword: str, first: str, second: str) -> Callable[[Dataset, int], None]:
    return lambda ds, k: setattr(ds, keyword, second if k == 3 else first)


# name: (edit, sentence); the sentence names the file of the slice that is edited, the third one if only one is
REFUSED: dict[str, tuple[Callable[[Dataset, int], None], str]] = {
    "slope 0 in one slice": (setting("RescaleSlope", 0), r"RescaleSlope \(0028,1053\) is 0, expected"),
    "slope negative": (setting("RescaleSlope", -0.5), r"RescaleSlope \(0028,1053\) is -0\.5, expected"),
    "slope 1e300": (setting("RescaleSlope", "1e300"), r"RescaleSlope \(0028,1053\) is 1e\+300, expected"),
    "slope 1e-300": (setting("RescaleSlope", "1e-300"), r"RescaleSlope \(0028,1053\) is 1e-300, expected"),
    "slope in all": (setting("RescaleSlope", 0, ALL), r"RescaleSlope \(0028,1053\) is 0, expected"),
    "intercept 1e300": (setting("RescaleIntercept", "1e300"), r"RescaleIntercept \(0028,1052\) is 1e\+300, expected"),
    "two patients": (two_of("PatientID", "A", "B"), r"PatientID \(0010,0020\) is .*expected one value in a series"),
    "two frames": (two_of("FrameOfReferenceUID", "1.2", "1.3"), r"FrameOfReferenceUID \(0020,0052\) is .*one value"),
    "two studies": (two_of("StudyInstanceUID", "1.2", "1.3"), r"StudyInstanceUID \(0020,000D\) is .*one value"),
    "two modalities": (two_of("Modality", "PT", "CT"), r"Modality \(0008,0060\) is .*expected one value"),
    "two classes": (two_of("SOPClassUID", "1.2", "1.3"), r"SOPClassUID \(0008,0016\) is .*expected one value"),
    "no instance": (setting("SOPInstanceUID", None), r"SOPInstanceUID \(0008,0018\) is missing"),
    "empty instance": (setting("SOPInstanceUID", ""), r"SOPInstanceUID \(0008,0018\) is empty"),
    "fewer rows": (setting("Rows", ROWS - 1, ALL), r"PixelData \(7FE0,0010\) has 40 bytes, where Rows .*make 30"),
    "more rows": (setting("Rows", ROWS + 1, ALL), r"truncated\? \(PixelData \(7FE0,0010\) has 40 bytes.*make 50"),
    "fewer columns": (setting("Columns", COLUMNS - 1, ALL), r"has 40 bytes, where .*Columns .*make 32"),
    "rows 65535": (setting("Rows", 65535, ALL), r"truncated\? \(PixelData .*Rows \(0028,0010\) 65535"),
    "both 65535": (both(setting("Rows", 65535, ALL), setting("Columns", 65535, ALL)), r"truncated\? \(PixelData"),
    "rows 0": (setting("Rows", 0, ALL), r"Rows \(0028,0010\) is 0"),
    "8 bits said": (setting("BitsAllocated", 8, ALL), r"BitsAllocated \(0028,0100\) is 8, expected 16 or 32"),
    "8 bits stored": (
        both(setting("BitsAllocated", 8, ALL), setting("BitsStored", 8, ALL), setting("HighBit", 7, ALL), halved),
        r"BitsAllocated \(0028,0100\) is 8, expected 16 or 32",
    ),
    "32 bits said": (setting("BitsAllocated", 32, ALL), r"truncated\? \(PixelData .*of 32 bits make 80"),
    "stored over allocated": (
        both(setting("BitsStored", 17), setting("HighBit", 16)),
        r"BitsStored \(0028,0101\) is 17, expected 1 to 16",
    ),
    "high bit": (setting("HighBit", 11), r"HighBit \(0028,0102\) is 11, expected 15"),
    "sign": (setting("PixelRepresentation", 2), r"PixelRepresentation \(0028,0103\) is 2, expected 0 or 1"),
    "palette": (setting("PhotometricInterpretation", "PALETTE COLOR"), r"PhotometricInterpretation .*PALETTE COLOR"),
    "twice the pixels": (doubled, r"PixelData \(7FE0,0010\) has 80 bytes, where .*make 40; expected as many"),
    "half the pixels": (halved, r"the pixels can't be read; truncated\? \(PixelData \(7FE0,0010\) has 20 bytes"),
    "pixels of 1e300 mm": (
        setting("PixelSpacing", ["1e300", "1e300"], ALL),
        r"PixelSpacing \(0028,0030\) is .*positive",
    ),
    "pixels of 1e-9 mm": (setting("PixelSpacing", ["1e-9", "1"], ALL), r"PixelSpacing \(0028,0030\) is .*positive"),
    "far away": (
        setting("ImagePositionPatient", ["0", "0", "1e30"]),
        r"ImagePositionPatient \(0020,0032\) is .*at most",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big"])
@pytest.mark.parametrize("name", REFUSED)
def test_an_implausible_header_is_refused_when_the_series_is_opened(tmp_path: Path, name: str, syntax: str) -> None:
    edit, sentence = REFUSED[name]
    folder = write_series(tmp_path, edit, syntax=syntax)
    with little_memory(), pytest.raises(ValueError, match=sentence) as error:
        open_series(folder)
    assert ".dcm" in str(error.value)


def test_the_file_that_is_wrong_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_series(tmp_path / "in", REFUSED["slope 0 in one slice"][0])
    assert main(["smooth", str(folder), str(tmp_path / "out.nii"), "--sigma", "0", "--quiet"]) == 1
    assert f"{file_name(2)}: RescaleSlope" in capsys.readouterr().err
    assert not (tmp_path / "out.nii").exists()


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big"])
def test_other_encodings_give_the_same_values(tmp_path: Path, syntax: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_dicom_series(write_series(tmp_path, syntax=syntax))
    np.testing.assert_allclose(np.asarray(image.dataobj), volume(), rtol=1e-6)


def test_a_byte_of_padding_is_no_other_size(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.PixelData = stored_pixels(k).tobytes() + b"\0\0"

    with pytest.warns(UserWarning, match="excess padding"):  # pydicom's own
        image = read_dicom_series(write_series(tmp_path, edit))
    np.testing.assert_allclose(np.asarray(image.dataobj), volume(), rtol=1e-6)


# --- Read, and said ---


def test_a_display_that_is_inverted_does_not_change_values(tmp_path: Path) -> None:
    folder = write_series(tmp_path, setting("PhotometricInterpretation", "MONOCHROME1", ALL))
    with pytest.warns(UserWarning, match=r"PhotometricInterpretation \(0028,0004\) is MONOCHROME1 in 6 of 6 slices"):
        image = read_dicom_series(folder)
    np.testing.assert_allclose(np.asarray(image.dataobj), volume(), rtol=1e-6)


def test_an_intercept_of_a_pet_is_said(tmp_path: Path) -> None:
    folder = write_series(tmp_path, setting("RescaleIntercept", -10, 4))
    with pytest.warns(
        UserWarning, match=rf"{file_name(4)}: RescaleIntercept \(0028,1052\) is -10, where a PET has 0"
    ):
        open_series(folder)


def ct(values: np.ndarray, **fields: Any) -> Callable[[Dataset, int], None]:
    """Returns an edit that makes a CT of these stored values, (rows, columns) for all slices."""

    def edit(ds: Dataset, k: int) -> None:
        ds.Modality, ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "CT", 1, -1024, "HU"
        ds.Rows, ds.Columns = values.shape
        ds.PixelData = values.astype("<u2").tobytes()
        ds.PixelRepresentation = 0
        for keyword, value in fields.items():
            if keyword.startswith("PixelPadding"):
                ds.add_new(keyword, "US", value)
            else:
                setattr(ds, keyword, value)

    return edit


def body(padding: int | None = None, offset: int = 0) -> np.ndarray:
    """Returns stored values of a body in air, 24 × 24: HU + 1024 + offset."""
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 40, (24, 24))
    stored[4:20, 4:20] = rng.integers(1000, 1200, (16, 16))
    stored += offset
    if padding is not None:
        stored[:2] = padding
    return stored


SAID: dict[str, tuple[Callable[[Dataset, int], None], str]] = {
    "padding far below": (
        ct(body(0, 2000), RescaleIntercept=-3024, PixelPaddingValue=0),
        r"PixelPaddingValue \(0028,0120\) stands for -3024 HU in 288 voxels; they are read as -1024 HU",
    ),
    "padding of the other sign": (
        ct(body(63536), PixelPaddingValue=63536),
        r"PixelPaddingValue \(0028,0120\) stands for 62512 HU in 288 voxels; they are read as -1024 HU",
    ),
    "padding like tissue": (
        ct(body(1030), PixelPaddingValue=1030),
        r"PixelPaddingValue \(0028,0120\) stands for 6 HU, which tissue has too",
    ),
    "unnamed padding": (ct(body(0, 2000), RescaleIntercept=-3024), r"below -1024 HU, down to -3024"),
    "metal": (ct(body(20000)), r"above 3071 HU, up to 18976"),
    "offset": (ct(body() + 24, RescaleIntercept=0), r"a CT with an offset of 1000 or 1024"),
    "other scales": (lambda ds, k: ct(body(), RescaleSlope=1 + (k == 2))(ds, k), r"a CT has one scale as a rule"),
    "no HU": (ct(body(), RescaleType="US"), r"RescaleType \(0028,1054\) is US, expected HU"),
}


@pytest.mark.parametrize("name", SAID)
def test_an_odd_ct_is_said(tmp_path: Path, name: str) -> None:
    edit, sentence = SAID[name]
    with pytest.warns(UserWarning, match=sentence):
        image = read_dicom_series(write_series(tmp_path, edit))
    values = np.asarray(image.dataobj)
    if name.startswith("padding") and name != "padding like tissue":
        assert (values[:, :2] == -1024).all()
    if name == "padding like tissue":
        assert (values[:, :2] == 6).all()


def test_a_plain_ct_gives_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_dicom_series(write_series(tmp_path, ct(body(0), PixelPaddingValue=0)))


# --- Geometry ---


@pytest.mark.parametrize("value", [-SLICE_SPACING, 0, 1.0, 99, "-2.5"])
def test_the_distance_of_slices_is_that_of_their_positions(tmp_path: Path, value: object) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.SpacingBetweenSlices, ds.SliceThickness = value, 1.5
        ds.SliceLocation, ds.InstanceNumber = 100 - 7 * k, 1

    image = read_dicom_series(write_series(tmp_path, edit))
    assert voxel_spacing(image) == pytest.approx((3, 2, SLICE_SPACING))
    np.testing.assert_allclose(np.asarray(image.dataobj), volume(), rtol=1e-6)


ORIENTATIONS = {
    "axial": [1, 0, 0, 0, 1, 0],
    "sagittal": [0, 1, 0, 0, 0, -1],
    "coronal": [1, 0, 0, 0, 0, -1],
    "oblique": [0.8, 0.6, 0, -0.6, 0.8, 0],
    "gantry in the orientation": [1, 0, 0, 0, 0.9659258, -0.258819],
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_unequal_pixels_and_oblique_stacks_lie_where_they_say(tmp_path: Path, name: str) -> None:
    rows, columns = np.array(ORIENTATIONS[name][:3]), np.array(ORIENTATIONS[name][3:])
    normal, start = np.cross(rows, columns), np.array([-10.0, -20, -30])

    def edit(ds: Dataset, k: int) -> None:
        ds.ImageOrientationPatient = ORIENTATIONS[name]
        ds.ImagePositionPatient = [f"{v:.6f}" for v in start + SLICE_SPACING * k * normal]

    image = read_dicom_series(write_series(tmp_path, edit))
    # PixelSpacing is 2 mm between rows and 3 mm between columns.
    lps = start + 3 * 4 * rows + 2 * 3 * columns + SLICE_SPACING * 5 * normal
    np.testing.assert_allclose(image.affine @ [4, 3, 5, 1], [*(-lps[:2]), lps[2], 1], atol=1e-4)
    assert voxel_spacing(image) == pytest.approx((3, 2, SLICE_SPACING), rel=1e-5)


@pytest.mark.parametrize("degrees", [-20.0, -8.0, 15.0, 30.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_that_leans_is_refused_with_its_angle(tmp_path: Path, degrees: float, axis: int) -> None:
    def edit(ds: Dataset, k: int) -> None:
        position = [-10.0, -20.0, -30 + SLICE_SPACING * k]
        position[axis] += SLICE_SPACING * k * np.tan(np.radians(degrees))
        ds.ImagePositionPatient = [f"{v:.4f}" for v in position]

    with pytest.raises(ValueError, match=rf"the stack leans by {abs(degrees):.3g}° \(a tilted gantry"):
        open_series(write_series(tmp_path, edit))


def test_one_slice_aside_is_named(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        if k == 2:
            ds.ImagePositionPatient = [-10, 5, -30 + SLICE_SPACING * k]

    with pytest.raises(ValueError, match=rf"{file_name(2)}: .*\(-10, 5, -22\) is 25 mm aside .*not in one line"):
        open_series(write_series(tmp_path, edit))


def test_all_gaps_and_duplicates_name_their_positions(tmp_path: Path) -> None:
    gaps = write_series(tmp_path / "gaps", lambda ds, k: setattr(ds, "NumberOfSlices", 1), leave_out=(2,))
    with pytest.raises(ValueError, match=r"between the positions \(-10, -20, -26\) and \(-10, -20, -18\)"):
        open_series(gaps)

    def edit(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-10, -20, [0, 0, 4, 8, 8, 12][k]]

    with pytest.raises(ValueError, match=r"same position.*\(-10, -20, 0\).*1 more such places after \(-10, -20, 8\)"):
        open_series(write_series(tmp_path / "doubled", edit))
