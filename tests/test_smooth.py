# SPDX-License-Identifier: Apache-2.0
"""`medaccel smooth`: the right width on every axis, and the rest of the file as it was."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset
from scipy import ndimage

import medaccel.smooth
from medaccel.data import make_nifti, read_nifti, read_pet_series, save_nifti
from medaccel.smooth import smooth
from tests.data.dicom_series import SUV_PER_BQML, write_series
from tests.data.test_files import file_size_limit

AFFINE = np.diag([-2.0, -3.0, 4.0, 1.0])
SPACING = np.array([2.0, 3.0, 4.0])


def noise(dtype: type = np.float32, shape: tuple[int, ...] = (14, 12, 10)) -> np.ndarray:
    return (100 * np.random.default_rng(1).random(shape)).astype(dtype)


def saved(folder: Path, values: np.ndarray, name: str = "in.nii.gz") -> Path:
    save_nifti(folder / name, make_nifti(values, AFFINE))
    return folder / name


def values_of(path: Path) -> np.ndarray:
    return np.asarray(read_nifti(path, ndim=(3, 4)).dataobj)


def scipy_smoothed(values: np.ndarray, sigma_voxels: np.ndarray) -> np.ndarray:
    """Smooths with SciPy in float64 with its default border, reflect."""
    return ndimage.gaussian_filter(values.astype(np.float64), sigma_voxels, truncate=4.0)


def test_sigma_in_mm_is_divided_by_each_axis_spacing(tmp_path: Path) -> None:
    smooth(saved(tmp_path, noise()), tmp_path / "out.nii.gz", sigma=5, approx="sampled", progress=False)
    np.testing.assert_allclose(values_of(tmp_path / "out.nii.gz"), scipy_smoothed(noise(), 5 / SPACING), rtol=1e-5)


def test_sigma_in_voxels_ignores_the_spacing(tmp_path: Path) -> None:
    smooth(saved(tmp_path, noise()), tmp_path / "out.nii", sigma=1.5, unit="voxel", approx="sampled", progress=False)
    np.testing.assert_allclose(values_of(tmp_path / "out.nii"), scipy_smoothed(noise(), 1.5), rtol=1e-5)


def test_three_sigmas_are_of_the_axes_i_j_k(tmp_path: Path) -> None:
    smooth(saved(tmp_path, noise()), tmp_path / "out.nii", sigma=(0, 6, 4), approx="sampled", progress=False)
    expected = scipy_smoothed(noise(), np.array([0, 2, 1]))
    np.testing.assert_allclose(values_of(tmp_path / "out.nii"), expected, rtol=1e-5)


def test_fwhm_is_the_width_at_half_maximum(tmp_path: Path) -> None:
    # A point becomes a bell; at half the FWHM from its centre it has half its height.
    point = np.zeros((41, 3, 3))
    point[20] = 1
    fwhm = 12 * SPACING[0]
    smooth(saved(tmp_path, point), tmp_path / "out.nii", fwhm=(fwhm, 0, 0), approx="sampled", progress=False)
    bell = values_of(tmp_path / "out.nii")[:, 1, 1]
    np.testing.assert_allclose(bell[[14, 26]] / bell[20], 0.5, rtol=1e-6)


def test_fwhm_is_2_3548_sigma(tmp_path: Path) -> None:
    path = saved(tmp_path, noise(np.float64))
    a = smooth(path, tmp_path / "a.nii", sigma=(1, 2, 3), progress=False)
    b = smooth(path, tmp_path / "b.nii", fwhm=(2.354820045, 4.70964009, 7.064460135), progress=False)
    np.testing.assert_allclose(np.asarray(a.dataobj), np.asarray(b.dataobj), rtol=1e-7)


def test_the_default_border_keeps_the_sum_and_constants(tmp_path: Path) -> None:
    values = noise(np.float64)
    smooth(saved(tmp_path, values), tmp_path / "out.nii", sigma=30, progress=False)
    assert values_of(tmp_path / "out.nii").sum() == pytest.approx(values.sum(), rel=1e-12)
    path = saved(tmp_path, np.full((6, 6, 6), -1000.0), "constant.nii")
    smooth(path, tmp_path / "out2.nii", sigma=5, progress=False)
    np.testing.assert_allclose(values_of(tmp_path / "out2.nii"), -1000, rtol=1e-12)


@pytest.mark.parametrize("mode", ["nearest", "mirror", "wrap", "constant"])
def test_other_borders_are_scipys(tmp_path: Path, mode: str) -> None:
    smooth(
        saved(tmp_path, noise(np.float64)),
        tmp_path / "out.nii",
        sigma=1,
        unit="voxel",
        mode=mode,  # type: ignore[arg-type]
        approx="sampled",
        progress=False,
    )
    expected = ndimage.gaussian_filter(noise(np.float64), 1, mode=mode)
    np.testing.assert_allclose(values_of(tmp_path / "out.nii"), expected, rtol=1e-10)


def test_zero_changes_nothing(tmp_path: Path) -> None:
    smooth(saved(tmp_path, noise()), tmp_path / "out.nii", sigma=0, progress=False)
    np.testing.assert_array_equal(values_of(tmp_path / "out.nii"), noise())


@pytest.mark.parametrize(
    ("given", "written"),
    [
        *((np.uint8, np.float32), (np.int16, np.float32), (np.int32, np.float64)),
        *((np.float32, np.float32), (np.float64, np.float64)),
    ],
)
def test_floats_keep_their_type_and_integers_become_floats(tmp_path: Path, given: type, written: type) -> None:
    smooth(saved(tmp_path, noise(given)), tmp_path / "out.nii", sigma=5, approx="sampled", progress=False)
    image = read_nifti(tmp_path / "out.nii")
    assert image.get_data_dtype() == written
    np.testing.assert_allclose(np.asarray(image.dataobj), scipy_smoothed(noise(given), 5 / SPACING), rtol=1e-5)


def test_affine_and_header_are_kept(tmp_path: Path) -> None:
    rotation = np.array([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
    image = nib.Nifti2Image(noise(np.int16), rotation @ AFFINE)
    image.set_sform(rotation @ AFFINE, code=4)
    image.set_qform(rotation @ AFFINE, code=1)
    image.header["descrip"] = b"a scan"
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(0.5, -3)
    image.to_filename(tmp_path / "in.nii")
    smooth(tmp_path / "in.nii", tmp_path / "out.nii.gz", sigma=2, progress=False)
    written = nib.load(tmp_path / "out.nii.gz")
    original = nib.load(tmp_path / "in.nii")
    assert isinstance(written, nib.Nifti2Image)
    np.testing.assert_array_equal(written.affine, original.affine)
    same = ("sform_code", "qform_code", "descrip", "xyzt_units", "pixdim", "quatern_b", "quatern_c", "quatern_d")
    for field in same:
        np.testing.assert_array_equal(written.header[field], original.header[field], err_msg=field)


def test_without_sform_and_qform_the_codes_stay_0(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((14, 12, 10))
    header.set_data_dtype(np.float32)
    header.set_zooms(SPACING)
    nib.Nifti1Image(noise(), None, header).to_filename(tmp_path / "in.nii")
    image = smooth(tmp_path / "in.nii", tmp_path / "out.nii", sigma=5, approx="sampled", progress=False)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (0, 0)
    np.testing.assert_allclose(values_of(tmp_path / "out.nii"), scipy_smoothed(noise(), 5 / SPACING), rtol=1e-5)


def test_frames_are_smoothed_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = noise(shape=(8, 9, 10, 3))
    smooth(saved(tmp_path, values), tmp_path / "out.nii", sigma=5, approx="sampled")
    expected = np.stack([scipy_smoothed(values[..., t], 5 / SPACING) for t in range(3)], axis=-1)
    np.testing.assert_allclose(values_of(tmp_path / "out.nii"), expected, rtol=1e-5)
    assert "smooth" in capsys.readouterr().err  # the bar


def test_a_nan_spreads_no_farther_than_the_kernel(tmp_path: Path) -> None:
    values = noise(shape=(21, 21, 21))
    values[10, 10, 10] = np.nan
    smooth(saved(tmp_path, values), tmp_path / "out.nii", sigma=1, unit="voxel", progress=False)
    lost = np.argwhere(np.isnan(values_of(tmp_path / "out.nii")))
    assert lost.min() == 6
    assert lost.max() == 14


def test_a_pet_series_is_written_as_suv_or_in_its_own_unit(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "dicom")
    suv = smooth(folder, tmp_path / "suv.nii.gz", sigma=0, progress=False)
    np.testing.assert_array_equal(np.asarray(suv.dataobj), np.asarray(read_pet_series(folder).dataobj))
    np.testing.assert_array_equal(read_nifti(tmp_path / "suv.nii.gz").affine, read_pet_series(folder).affine)
    raw = smooth(folder, tmp_path / "raw.nii.gz", sigma=0, suv=False, progress=False)
    np.testing.assert_allclose(np.asarray(suv.dataobj), np.asarray(raw.dataobj) * SUV_PER_BQML, rtol=1e-6, atol=1e-12)


def test_the_rule_of_suv_stands_beside_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_series(tmp_path / "dicom")
    smooth(folder, tmp_path / "out.nii.gz", sigma=0)
    assert "SUV body weight (g/mL) from BQML, decay correction START" in capsys.readouterr().err
    rule = json.loads((tmp_path / "out.suv.json").read_text())
    assert rule["reference_time"] == "2024-02-29 11:00:00"
    assert rule["reference_time_source"] == "SeriesDate (0008,0021), SeriesTime (0008,0031)"
    assert rule["factor"]["min"] == rule["factor"]["max"] == pytest.approx(SUV_PER_BQML)
    (tmp_path / "out.nii.gz").unlink()
    with pytest.raises(FileExistsError, match=r"out\.suv\.json"):
        smooth(folder, tmp_path / "out.nii.gz", sigma=0, progress=False)
    smooth(folder, tmp_path / "out.nii.gz", sigma=0, progress=False, force=True)


def test_a_series_without_weight_can_be_read_in_its_own_unit(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "dicom", lambda ds, k: setattr(ds, "PatientWeight", 0))
    with pytest.raises(ValueError, match=r"PatientWeight .* positive number of kg \(smooth --unit bqml reads"):
        smooth(folder, tmp_path / "out.nii.gz", sigma=0, progress=False)
    raw = smooth(folder, tmp_path / "out.nii.gz", sigma=0, unit="bqml", progress=False)
    expected = smooth(folder, tmp_path / "raw.nii.gz", sigma=0, suv=False, progress=False)
    np.testing.assert_array_equal(np.asarray(raw.dataobj), np.asarray(expected.dataobj))


def test_suv_can_be_normalised_otherwise(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.PatientSize, ds.PatientSex = 1.75, "M"

    folder = write_series(tmp_path / "dicom", edit)
    weight = smooth(folder, tmp_path / "bw.nii.gz", sigma=0, suv="bw", progress=False)
    lean = smooth(folder, tmp_path / "lbm.nii.gz", sigma=0, suv="lbm_james", progress=False)
    ratio = (1.10 * 70 - 128 * 0.16) / 70
    np.testing.assert_allclose(np.asarray(lean.dataobj), np.asarray(weight.dataobj) * ratio, rtol=1e-5)
    with pytest.raises(ValueError, match="suv is 'lbm' and unit is 'bqml', expected one of them"):
        smooth(folder, tmp_path / "x.nii.gz", sigma=0, suv="lbm", unit="bqml", progress=False)
    with pytest.raises(ValueError, match="suv lbm is for DICOM series"):
        smooth(tmp_path / "bw.nii.gz", tmp_path / "x.nii.gz", sigma=0, suv="lbm", progress=False)


def test_a_ct_series_needs_no_suv_fields(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "dicom", lambda ds, k: (setattr(ds, "Modality", "CT"), delattr(ds, "Units")))
    assert smooth(folder, tmp_path / "out.nii", fwhm=5, progress=False).shape == (5, 4, 6)


# --- What is refused ---


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({}, "expected one of sigma and fwhm, but neither is given"),
        ({"sigma": 1, "fwhm": 1}, "but both are given"),
        ({"sigma": -1}, "sigma is -1, expected finite numbers of 0 or more"),
        ({"fwhm": float("nan")}, "fwhm is nan"),
        ({"sigma": float("inf")}, "sigma is inf"),
        ({"sigma": (1, 2)}, "sigma has 2 values, expected 1, or 3"),
        ({"sigma": 1, "unit": "cm"}, "unit is 'cm', expected 'mm' or 'voxel'"),
    ],
)
def test_senseless_widths_are_refused_before_reading(tmp_path: Path, widths: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smooth(tmp_path / "nowhere.nii", tmp_path / "out.nii", **widths)


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    path = saved(tmp_path, noise())
    (tmp_path / "out.nii").write_text("old")
    with pytest.raises(FileExistsError, match=r"--force.*out\.nii"):
        smooth(path, tmp_path / "out.nii", sigma=1, progress=False)
    assert (tmp_path / "out.nii").read_text() == "old"
    smooth(path, tmp_path / "out.nii", sigma=1, force=True, progress=False)
    assert values_of(tmp_path / "out.nii").shape == noise().shape


def test_input_and_output_may_be_one_file(tmp_path: Path) -> None:
    path = saved(tmp_path, noise())
    smooth(path, path, sigma=5, approx="sampled", force=True, progress=False)
    np.testing.assert_allclose(values_of(path), scipy_smoothed(noise(), 5 / SPACING), rtol=1e-5)


def test_bad_inputs_and_outputs_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path, noise())
    with pytest.raises(FileNotFoundError, match=r"nowhere\.nii"):
        smooth(tmp_path / "nowhere.nii", tmp_path / "out.nii", sigma=1)
    (tmp_path / "slice.dcm").write_text("")
    with pytest.raises(ValueError, match=r"slice\.dcm: expected .*the folder of a DICOM series"):
        smooth(tmp_path / "slice.dcm", tmp_path / "out.nii", sigma=1)
    with pytest.raises(ValueError, match=r"out\.png: the output's name must end in"):
        smooth(path, tmp_path / "out.png", sigma=1)
    with pytest.raises(FileNotFoundError, match=r"folder does not exist.*sub"):
        smooth(path, tmp_path / "sub" / "out.nii", sigma=1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"in\.nii\.gz: truncated or corrupt gzip"):
        smooth(path, tmp_path / "out.nii", sigma=1)


def test_a_full_disk_keeps_the_old_output(tmp_path: Path) -> None:
    path = saved(tmp_path, noise(shape=(40, 40, 40)))
    (tmp_path / "out.nii").write_text("old")
    with file_size_limit(10_000), pytest.raises(OSError, match=r"the old file is unchanged.*out\.nii"):
        smooth(path, tmp_path / "out.nii", sigma=1, force=True, progress=False)
    assert (tmp_path / "out.nii").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.nii.gz", "out.nii"]


def test_ctrl_c_while_filtering_keeps_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, noise())
    (tmp_path / "out.nii").write_text("old")

    def interrupted(*args: object, **options: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(medaccel.smooth, "gaussian_filter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smooth(path, tmp_path / "out.nii", sigma=1, force=True, progress=False)
    assert (tmp_path / "out.nii").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.nii.gz", "out.nii"]


# --- A real study ---


def test_a_real_image_is_smoothed_as_by_scipy(tmp_path: Path, data_dir: Path) -> None:
    path = data_dir / "pet" / "sts_001_pet_suv_crop.nii.gz"
    smooth(path, tmp_path / "out.nii.gz", fwhm=6, approx="sampled", progress=False)
    original, written = nib.load(path), nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(written.affine, original.affine)
    sigma = 6 / 2.354820045 / np.array(original.header.get_zooms())
    expected = scipy_smoothed(original.get_fdata(), sigma)
    np.testing.assert_allclose(written.get_fdata(), expected, rtol=1e-5, atol=1e-6)
