# SPDX-License-Identifier: Apache-2.0
"""A folder of DICOM slices becomes one volume, or a sentence that says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from medaccel.data import open_series, read_dicom_series, read_nifti, read_pet_series, voxel_spacing
from tests.data.dicom_series import (
    COLUMNS,
    ROWS,
    SLICE_SPACING,
    SLICES,
    SUV_PER_BQML,
    file_name,
    volume,
    write_series,
)


def test_values_have_each_slices_own_slope_and_are_ordered_by_position(tmp_path: Path) -> None:
    image = read_dicom_series(write_series(tmp_path))
    assert image.shape == (COLUMNS, ROWS, SLICES)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(np.asarray(image.dataobj), volume(), rtol=1e-6)


def test_intercept_is_added(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.RescaleIntercept = -1024

    image = read_dicom_series(write_series(tmp_path, edit))
    np.testing.assert_allclose(np.asarray(image.dataobj), volume() - 1024, rtol=1e-6)


def test_affine_maps_indices_to_ras(tmp_path: Path) -> None:
    image = read_dicom_series(write_series(tmp_path))
    # The first pixel is at LPS (-10, -20, -30) mm; PixelSpacing is rows first, so columns are 3 mm apart.
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], [10, 20, -30, 1])
    np.testing.assert_allclose(image.affine @ [1, 2, 3, 1], [10 - 3, 20 - 4, -30 + 12, 1])
    assert voxel_spacing(image) == pytest.approx((3, 2, SLICE_SPACING))
    assert [int(image.header[code]) for code in ("sform_code", "qform_code")] == [1, 1]


def test_a_coronal_series_lies_where_its_headers_say(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]  # the normal is +y (posterior)
        ds.ImagePositionPatient = [-10, -20 + 5 * k, 30]

    image = read_dicom_series(write_series(tmp_path, edit))
    np.testing.assert_allclose(image.affine @ [1, 1, 1, 1], [10 - 3, 20 - 5, 30 - 2, 1], atol=1e-5)
    np.testing.assert_allclose(np.asarray(image.dataobj), volume(), rtol=1e-6)


def test_slices_written_against_the_normal_are_turned_round(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-10, -20, -30 - SLICE_SPACING * k]

    image = read_dicom_series(write_series(tmp_path, edit))
    np.testing.assert_allclose(np.asarray(image.dataobj), volume()[:, :, ::-1], rtol=1e-6)
    assert np.linalg.det(image.affine[:3, :3]) > 0


def test_pet_series_is_suv(tmp_path: Path) -> None:
    image = read_pet_series(write_series(tmp_path))
    np.testing.assert_allclose(np.asarray(image.dataobj), volume() * SUV_PER_BQML, rtol=1e-6)
    assert bytes(image.header["descrip"].item()).startswith(b"SUV")


def test_compressed_pixels_are_decoded(tmp_path: Path) -> None:
    image = read_dicom_series(write_series(tmp_path, lambda ds, k: ds.compress(RLELossless)))
    np.testing.assert_allclose(np.asarray(image.dataobj), volume(), rtol=1e-6)


def test_a_single_slice_is_as_thick_as_its_header_says(tmp_path: Path) -> None:
    folder = write_series(tmp_path, lambda ds, k: setattr(ds, "NumberOfSlices", 1), leave_out=(1, 2, 3, 4, 5))
    assert voxel_spacing(read_dicom_series(folder)) == pytest.approx((3, 2, SLICE_SPACING))


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-10, -20, round(3.27 * k, 1)]

    image = read_dicom_series(write_series(tmp_path, edit))
    assert voxel_spacing(image)[2] == pytest.approx(3.27, abs=0.02)


def test_stray_files_beside_the_slices_are_passed_over(tmp_path: Path) -> None:
    write_series(tmp_path)
    for name in ("DICOMDIR", ".DS_Store", "notes.txt", "LICENSE", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"not an image")
    (tmp_path / "sub").mkdir()
    assert read_dicom_series(tmp_path).shape == (COLUMNS, ROWS, SLICES)


# --- What is refused ---


@pytest.mark.filterwarnings("ignore")  # pydicom's own, on what it met
@pytest.mark.parametrize("kept", [0, 60, 200, 400, 700, 1000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = write_series(tmp_path) / file_name(2)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=file_name(2)):
        read_dicom_series(tmp_path)


def test_a_file_that_is_not_dicom_is_named(tmp_path: Path) -> None:
    write_series(tmp_path)
    (tmp_path / "extra").write_bytes(bytes(500))
    with pytest.raises(ValueError, match="extra is not a DICOM file"):
        read_dicom_series(tmp_path)


def test_two_series_are_both_named_and_one_can_be_chosen(tmp_path: Path) -> None:
    write_series(tmp_path)

    def edit(ds: Dataset, k: int) -> None:
        ds.Modality, ds.SeriesDescription = "CT", "Low dose CT"
        ds.RescaleSlope = 1

    write_series(tmp_path, edit, series_uid="1.2.4", prefix="ct")
    with pytest.raises(ValueError, match="2 series in this folder, expected one") as error:
        read_dicom_series(tmp_path)
    assert "1.2.3 (PT, PET AC, 6 files" in str(error.value)
    assert "1.2.4 (CT, Low dose CT, 6 files" in str(error.value)
    np.testing.assert_allclose(np.asarray(read_dicom_series(tmp_path, series_uid="1.2.3").dataobj), volume())
    with pytest.raises(ValueError, match=r"no series 9\.9"):
        read_dicom_series(tmp_path, series_uid="9.9")
    with pytest.raises(ValueError, match=r"Modality \(0008,0060\) is CT, expected PT"):
        read_pet_series(tmp_path, series_uid="1.2.4")


def test_a_missing_slice_is_told_by_its_neighbours(tmp_path: Path) -> None:
    folder = write_series(tmp_path, leave_out=(3,))
    with pytest.raises(ValueError, match=r"8 mm apart.*spacing is 4 mm: 1 slice\(s\) missing") as error:
        read_dicom_series(folder)
    assert file_name(2) in str(error.value)
    assert file_name(4) in str(error.value)


def test_of_three_slices_a_missing_second_one_is_seen(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.NumberOfSlices = 3

    with pytest.raises(ValueError, match=r"1 slice\(s\) missing"):
        read_dicom_series(write_series(tmp_path, edit, leave_out=(2, 4, 5)))


def test_a_slice_missing_at_the_end_is_warned_of(tmp_path: Path) -> None:
    folder = write_series(tmp_path, leave_out=(5,))
    with pytest.warns(UserWarning, match=r"NumberOfSlices \(0054,0081\) is 6, but the folder has 5"):
        assert read_dicom_series(folder).shape[2] == 5


def test_two_slices_at_one_position_are_both_named(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        if k == 4:
            ds.ImagePositionPatient = [-10, -20, -30 + 3 * SLICE_SPACING]

    with pytest.raises(ValueError, match="same position") as error:
        read_dicom_series(write_series(tmp_path, edit))
    assert file_name(3) in str(error.value)
    assert file_name(4) in str(error.value)


def test_frames_of_a_dynamic_series_are_recognised(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-10, -20, -30 + SLICE_SPACING * (k // 2)]
        ds.FrameReferenceTime = 1000.0 * (k % 2)

    with pytest.raises(ValueError, match="dynamic series"):
        read_dicom_series(write_series(tmp_path, edit))


def test_uneven_slices_are_refused(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        if k == 2:
            ds.ImagePositionPatient = [-10, -20, -30 + 2.2 * SLICE_SPACING]

    with pytest.raises(ValueError, match=r"0\.8 mm off an even spacing of") as error:
        read_dicom_series(write_series(tmp_path, edit))
    assert file_name(2) in str(error.value)


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-10, -20 + 1.0 * k, -30 + SLICE_SPACING * k]

    with pytest.raises(ValueError, match="tilted gantry"):
        read_dicom_series(write_series(tmp_path, edit))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("Rows", 8),
        ("Columns", 8),
        ("PixelSpacing", [2, 3.1]),
        ("ImageOrientationPatient", [0.8, 0.6, 0, -0.6, 0.8, 0]),
    ],
)
def test_slices_of_different_geometry_are_refused(tmp_path: Path, keyword: str, value: object) -> None:
    def edit(ds: Dataset, k: int) -> None:
        if k == 1:
            setattr(ds, keyword, value)

    with pytest.raises(ValueError, match=rf"{keyword} \(.*one geometry") as error:
        read_dicom_series(write_series(tmp_path, edit))
    assert file_name(1) in str(error.value)


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], "right angles"),
        ("PixelSpacing", [0, 3], "positive"),
        ("ImagePositionPatient", [1, 2], r"expected 3 number\(s\)"),
        ("NumberOfFrames", 3, "multi-frame"),
        ("SamplesPerPixel", 3, "no colours"),
    ],
)
def test_senseless_fields_are_named(tmp_path: Path, keyword: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{keyword} \(.*{message}"):
        read_dicom_series(write_series(tmp_path, lambda ds, k: setattr(ds, keyword, value)))


@pytest.mark.parametrize(
    "keyword",
    [
        *("SeriesInstanceUID", "Rows", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
        *("RescaleSlope", "RescaleIntercept", "SamplesPerPixel"),
    ],
)
def test_a_missing_field_is_named_with_its_file(tmp_path: Path, keyword: str) -> None:
    def edit(ds: Dataset, k: int) -> None:
        if k == 3:
            delattr(ds, keyword)

    with pytest.raises(ValueError, match=rf"{file_name(3)}: {keyword} \(....,....\) is missing"):
        read_dicom_series(write_series(tmp_path, edit))


def test_missing_pixels_are_told(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        if k == 3:
            del ds.PixelData

    with pytest.raises(ValueError, match=rf"{file_name(3)}: the pixels can't be read"):
        read_dicom_series(write_series(tmp_path, edit))


def test_folders_without_a_series_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_series(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no DICOM files"):
        open_series(tmp_path)
    write_series(tmp_path / "sub")
    with pytest.raises(ValueError, match="name the sub-folder"):
        open_series(tmp_path)
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        open_series(tmp_path / "sub" / file_name(0))


# --- A real study ---


def test_real_study_gives_the_published_suv(data_dir: Path) -> None:
    image = read_pet_series(data_dir / "pet" / "sts_001_fdg_pet_dicom")
    suv = np.asarray(image.dataobj)
    assert suv.shape == (128, 128, 267)
    assert suv.max() == pytest.approx(66.5, abs=0.05)

    crop = read_nifti(data_dir / "pet" / "sts_001_pet_suv_crop.nii.gz")
    start = np.linalg.solve(image.affine, crop.affine)
    np.testing.assert_allclose(start[:3, :3], np.eye(3), atol=1e-5)
    i, j, k = np.rint(start[:3, 3]).astype(int)
    np.testing.assert_allclose(start[:3, 3], [i, j, k], atol=1e-3)
    cropped = suv[i : i + crop.shape[0], j : j + crop.shape[1], k : k + crop.shape[2]]
    assert cropped.max() == pytest.approx(25.412, abs=1e-3)
    np.testing.assert_allclose(cropped, np.asarray(crop.dataobj), rtol=0, atol=1e-3)
