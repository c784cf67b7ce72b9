# SPDX-License-Identifier: Apache-2.0
"""NIfTI files are read whole or refused with a reason, and written so that they come back the same."""

from __future__ import annotations

import gzip
import re
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medaccel.data import make_nifti, read_nifti, save_nifti, voxel_spacing
from tests.data.test_files import file_size_limit

AFFINE = np.array([[-2.0, 0, 0, 10], [0, -3, 0, 20], [0, 0, 4, -30], [0, 0, 0, 1]])


def array(dtype: type = np.float32, shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return (100 * np.random.default_rng(0).random(shape)).astype(dtype)


def write(path: Path, values: np.ndarray | None = None, **fields: object) -> Path:
    """Writes a file by nibabel alone, with header fields overwritten in its bytes."""
    image = nib.Nifti1Image(array() if values is None else values, AFFINE)
    content = bytearray(image.to_bytes())
    header = np.frombuffer(content, nib.nifti1.header_dtype, count=1)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_what_is_written_comes_back(tmp_path: Path, name: str, dtype: type) -> None:
    save_nifti(tmp_path / name, make_nifti(array(dtype), AFFINE))
    image = read_nifti(tmp_path / name)
    assert image.get_data_dtype() == dtype
    assert np.asarray(image.dataobj).dtype == dtype
    np.testing.assert_array_equal(np.asarray(image.dataobj), array(dtype))
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert voxel_spacing(image) == (2, 3, 4)
    assert nib.load(tmp_path / name).shape == (5, 6, 7)  # a plain reader takes it too
    assert ((tmp_path / name).read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


def test_the_same_image_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        save_nifti(tmp_path / name, make_nifti(array(), AFFINE))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_header_is_taken_over_but_for_type_and_scale(tmp_path: Path) -> None:
    like = nib.Nifti1Image(array(np.int16), AFFINE)
    like.set_sform(AFFINE, code=4)
    like.set_qform(AFFINE, code=2)
    like.header["descrip"] = b"a scan"
    like.header.set_xyzt_units("mm", "sec")
    like.header.set_slope_inter(2, 1)
    like.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"hello"))
    save_nifti(tmp_path / "a.nii", make_nifti(array(np.float64), AFFINE, like=like))
    header = read_nifti(tmp_path / "a.nii").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (4, 2)
    assert bytes(header["descrip"].item()) == b"a scan"
    assert header.get_xyzt_units() == ("mm", "sec")
    assert header.get_data_dtype() == np.float64
    assert [e.get_content() for e in header.extensions] == [b"hello"]
    np.testing.assert_array_equal(np.asarray(read_nifti(tmp_path / "a.nii").dataobj), array(np.float64))


@pytest.mark.parametrize(
    ("given", "stored"),
    [(np.bool_, np.uint8), (np.float16, np.float32), (np.int64, np.int32), (np.uint64, np.uint32)],
)
def test_types_that_nifti_lacks_are_widened_or_narrowed(given: type, stored: type) -> None:
    image = make_nifti(array(given), AFFINE)
    assert image.get_data_dtype() == stored
    np.testing.assert_array_equal(np.asarray(image.dataobj), array(given))


def test_integers_and_types_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="int64 values outside int32"):
        make_nifti(np.full((2, 2, 2), 1 << 40), AFFINE)
    with pytest.raises(ValueError, match="complex64"):
        make_nifti(array(np.complex64), AFFINE)


def test_scaled_integers_are_read_as_floats(tmp_path: Path) -> None:
    write(tmp_path / "narrow.nii", array(np.int16), scl_slope=0.5, scl_inter=-10)
    write(tmp_path / "wide.nii", array(np.int32), scl_slope=0.5, scl_inter=-10)
    for name, dtype in {"narrow.nii": np.float32, "wide.nii": np.float64}.items():
        values = np.asarray(read_nifti(tmp_path / name).dataobj)
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, array(np.int16) * 0.5 - 10)


def test_big_endian_files_are_read_in_native_order(tmp_path: Path) -> None:
    nib.Nifti1Image(array(), AFFINE, nib.Nifti1Header(endianness=">")).to_filename(tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
    values = np.asarray(read_nifti(tmp_path / "a.nii").dataobj)
    assert values.dtype.isnative
    np.testing.assert_array_equal(values, array())


def test_nifti_2_is_read_and_stays_nifti_2(tmp_path: Path) -> None:
    nib.Nifti2Image(array(), AFFINE).to_filename(tmp_path / "a.nii.gz")
    image = read_nifti(tmp_path / "a.nii.gz")
    assert isinstance(image, nib.Nifti2Image)
    save_nifti(tmp_path / "b.nii", make_nifti(array(), image.affine, like=image))
    assert isinstance(nib.load(tmp_path / "b.nii"), nib.Nifti2Image)


def test_without_sform_and_qform_the_voxel_sizes_make_the_affine(tmp_path: Path) -> None:
    image = read_nifti(write(tmp_path / "a.nii", sform_code=0, qform_code=0))
    assert voxel_spacing(image) == (2, 3, 4)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (0, 0)
    # Centred, first axis to the left, as nibabel has it.
    np.testing.assert_allclose(image.affine, [[-2, 0, 0, 4], [0, 3, 0, -7.5], [0, 0, 4, -12], [0, 0, 0, 1]])


@pytest.mark.parametrize(("code", "mm"), [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001), (2 | 8, 1.0)])
def test_spacing_is_in_mm_whatever_the_unit(tmp_path: Path, code: int, mm: float) -> None:
    image = read_nifti(write(tmp_path / "a.nii", xyzt_units=code))
    assert voxel_spacing(image) == pytest.approx((2 * mm, 3 * mm, 4 * mm))


def test_spacing_of_an_oblique_image_is_along_its_axes() -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    rotation = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert voxel_spacing(make_nifti(array(), rotation @ AFFINE)) == pytest.approx((2, 3, 4))


def test_a_trailing_axis_of_one_is_dropped_where_3_d_is_wanted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", array(shape=(5, 6, 7, 1)))
    assert read_nifti(path).shape == (5, 6, 7)
    assert read_nifti(path, ndim=(3, 4)).shape == (5, 6, 7, 1)


def test_other_dimensions_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", array(shape=(5, 6, 7, 2)))
    with pytest.raises(ValueError, match=r"a\.nii: the image has shape \(5, 6, 7, 2\), expected a 3-D image"):
        read_nifti(path)
    path = write(tmp_path / "b.nii", array(shape=(5, 6, 7, 1, 3)))
    with pytest.raises(ValueError, match=r"expected a 3-D or 4-D image"):
        read_nifti(path, ndim=(3, 4))


# --- Damaged files ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizeof_hdr": 0}, "not a NIfTI file"),
        ({"magic": b"xyz"}, "broken NIfTI header"),
        ({"datatype": 9999}, "broken NIfTI header"),
        ({"dim": [0, 5, 6, 7, 1, 1, 1, 1]}, r"dim\[0\] is 0"),
        ({"dim": [3, 5, -6, 7, 1, 1, 1, 1]}, r"\(5, -6, 7\), expected positive sizes"),
        ({"dim": [3, 5000, 6000, 7000, 1, 1, 1, 1]}, "truncated file or broken header"),
        ({"vox_offset": 10}, "broken NIfTI header"),
        ({"vox_offset": 1e6}, "truncated file or broken header"),
        ({"datatype": 32, "bitpix": 64}, "voxels of type complex64"),
        ({"datatype": 128, "bitpix": 24}, "voxels of type"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "not finite"),
        ({"srow_x": [0, 0, 0, 0]}, "affine is singular"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 5}, "w2 should be positive"),
        ({"sform_code": 0, "qform_code": 0, "pixdim": [1, 2, 0, 4, 1, 1, 1, 1]}, "pixdim has voxel sizes"),
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 2, np.inf, 4, 1, 1, 1, 1]}, "pixdim has voxel sizes"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_broken_header_is_told(tmp_path: Path, name: str, fields: dict[str, object], message: str) -> None:
    write(tmp_path / name, **fields)
    with pytest.raises(ValueError, match=rf"{name}: .*({message})"):
        read_nifti(tmp_path / name)


@pytest.mark.parametrize("kept", [0, 3, 100, 400, -1])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_truncated_file_is_told(tmp_path: Path, name: str, kept: int) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{name}: "):
        read_nifti(path)


def test_a_flipped_bit_in_a_compressed_file_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.nii\.gz: truncated or corrupt gzip file"):
        read_nifti(path)


def test_an_uncompressed_file_named_gz_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.nii").rename(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"a\.nii\.gz: truncated or corrupt gzip"):
        read_nifti(tmp_path / "a.nii.gz")


def test_missing_files_and_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.nii"):
        read_nifti(tmp_path / "nowhere.nii")
    with pytest.raises(ValueError, match=r"a\.mhd: expected a file ending in \.nii or \.nii\.gz"):
        read_nifti(tmp_path / "a.mhd")
    with pytest.raises(ValueError, match=r"must end in \.nii or \.nii\.gz"):
        save_nifti(tmp_path / "a.png", make_nifti(array(), AFFINE))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_full_disk_keeps_the_old_image(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_nifti(path, make_nifti(array(), AFFINE))
    large = make_nifti(array(shape=(40, 40, 40)), AFFINE)
    with file_size_limit(10_000), pytest.raises(OSError, match=f"the old file is unchanged.*{name}"):
        save_nifti(path, large, force=True)
    np.testing.assert_array_equal(np.asarray(read_nifti(path).dataobj), array())
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_image_needs_force(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii", make_nifti(array(), AFFINE))
    with pytest.raises(FileExistsError, match=r"a\.nii"):
        save_nifti(tmp_path / "a.nii", make_nifti(array(), AFFINE))


# --- Headers that contradict themselves: read by a rule that is said, or refused ---


def oblique(degrees: float = 20) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ AFFINE


def moved(by: float) -> np.ndarray:
    result = AFFINE.copy()
    result[2, 3] += by
    return result


QFORMS = {
    "moved": (moved(5), r"qform and sform place its corners up to 5 mm apart; the sform is taken"),
    "turned": (oblique(), r"qform and sform place its corners up to [\d.]+ mm apart; the sform"),
    "mirrored": (AFFINE @ np.diag([-1, 1, 1, 1]), r".* apart, and they are mirror images of each other; the sform"),
    "finer": (AFFINE @ np.diag([0.5, 0.5, 0.5, 1]), r"qform and sform place its corners"),
    "rounded": (moved(0.01), None),
}


@pytest.mark.parametrize("name", QFORMS)
def test_where_qform_and_sform_disagree_the_sform_counts(tmp_path: Path, name: str) -> None:
    qform, sentence = QFORMS[name]
    image = nib.Nifti1Image(array(), AFFINE)
    image.set_sform(AFFINE, code=1)
    image.set_qform(qform, code=1)
    image.to_filename(tmp_path / "a.nii")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read_nifti(tmp_path / "a.nii")
    np.testing.assert_allclose(found.affine, AFFINE)
    assert [bool(re.search(rf"a\.nii: {sentence}", str(w.message))) for w in said] == ([True] if sentence else [])


SCALES: dict[str, tuple[dict[str, float], str | None, float, float]] = {
    "zero is no scale": ({"scl_slope": 0, "scl_inter": 0}, None, 1, 0),
    "zero with an intercept": ({"scl_slope": 0, "scl_inter": 9}, "scl_slope is 0, which means no scale", 1, 0),
    "NaN": ({"scl_slope": np.nan, "scl_inter": 0}, "scl_slope is NaN", 1, 0),
    "negative": ({"scl_slope": -2, "scl_inter": 3}, None, -2, 3),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_that_is_none_is_said(tmp_path: Path, name: str) -> None:
    fields, sentence, slope, inter = SCALES[name]
    path = write(tmp_path / "a.nii.gz", array(np.int16), **fields)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read_nifti(path)
    np.testing.assert_array_equal(np.asarray(found.dataobj), array(np.int16) * slope + inter)
    assert [sentence in str(w.message) for w in said] == ([True] if sentence else [])


@pytest.mark.parametrize(
    "fields", [{"scl_slope": np.inf}, {"scl_slope": 1, "scl_inter": -np.inf}, {"scl_slope": 2, "scl_inter": np.nan}]
)
def test_a_scale_that_is_infinite_is_refused(tmp_path: Path, fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"a\.nii: broken NIfTI header: "):
        read_nifti(write(tmp_path / "a.nii", array(np.int16), **fields))


def test_a_scale_that_no_value_survives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.nii: scl_slope 3e\+38 and scl_inter 0 make values that no number"):
        read_nifti(write(tmp_path / "a.nii", array(np.int16), scl_slope=3e38, scl_inter=0))


def test_voxel_sizes_that_are_not_the_sforms_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", pixdim=[1, 1, 1, 1, 1, 1, 1, 1], qform_code=0)
    with pytest.warns(UserWarning, match=r"a\.nii: pixdim has voxels of 1 × 1 × 1 mm, and the sform of 2 × 3 × 4 mm"):
        assert voxel_spacing(read_nifti(path)) == (2, 3, 4)


def test_a_left_handed_image_and_a_right_handed_one_lie_where_they_say(tmp_path: Path) -> None:
    for name, affine in (("right", AFFINE), ("left", AFFINE @ np.diag([-1, 1, 1, 1]))):
        save_nifti(tmp_path / f"{name}.nii", make_nifti(array(), affine))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = read_nifti(tmp_path / f"{name}.nii")
        np.testing.assert_allclose(found.affine, affine)
        np.testing.assert_allclose(found.get_qform(), affine, atol=1e-5)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_bytes_behind_the_voxels_are_said_or_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "plain.nii")
    content = path.read_bytes()
    for more, refused in ((100, False), (1 << 20, False), (3 << 20, True)):
        longer = content + bytes(more)
        (tmp_path / name).write_bytes(gzip.compress(longer, 1) if name.endswith("gz") else longer)
        if refused:
            with pytest.raises(ValueError, match=rf"{name}: (\d+ bytes lie behind the last voxel|unpacks to more)"):
                read_nifti(tmp_path / name)
            continue
        with pytest.warns(UserWarning, match=rf"{name}: {more} bytes lie behind the last voxel and are left out"):
            np.testing.assert_array_equal(np.asarray(read_nifti(tmp_path / name).dataobj), array())


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.nifti2.Nifti2Pair])
@pytest.mark.parametrize("given", [".hdr", ".img"])
def test_a_pair_is_read_by_either_name(tmp_path: Path, kind: type, given: str) -> None:
    image = kind(array(np.int16), AFFINE)
    image.header.set_slope_inter(0.5, 2)
    image.to_filename(tmp_path / "a.img")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_nifti((tmp_path / "a.img").with_suffix(given))
    np.testing.assert_allclose(np.asarray(found.dataobj), nib.load(tmp_path / "a.img").get_fdata(), rtol=1e-6)
    np.testing.assert_array_equal(found.affine, AFFINE)
    save_nifti(tmp_path / "b.nii", found)
    np.testing.assert_array_equal(np.asarray(read_nifti(tmp_path / "b.nii").dataobj), np.asarray(found.dataobj))


def test_a_broken_pair_is_refused(tmp_path: Path) -> None:
    nib.Nifti1Pair(array(), AFFINE).to_filename(tmp_path / "a.img")
    voxels = (tmp_path / "a.img").read_bytes()
    (tmp_path / "a.img").write_bytes(voxels[:-1])
    with pytest.raises(ValueError, match=r"a\.hdr: truncated file or broken header: shape \(5, 6, 7\)"):
        read_nifti(tmp_path / "a.hdr")
    (tmp_path / "a.img").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.img: no such file"):
        read_nifti(tmp_path / "a.hdr")
    nib.AnalyzeImage(array(), AFFINE).to_filename(tmp_path / "b.img")
    with pytest.raises(ValueError, match=r"b\.img: .*Analyze 7\.5 does not tell left from right"):
        read_nifti(tmp_path / "b.img")
    (tmp_path / "c.hdr").write_bytes(b"ENVI")
    (tmp_path / "c.img").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.img: not a NIfTI header: c\.hdr"):
        read_nifti(tmp_path / "c.img")
