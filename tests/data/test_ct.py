# SPDX-License-Identifier: Apache-2.0
"""Folders of CT as they are published: every format in its place, each scan once, damage told."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from pydicom.dataset import Dataset

from medaccel.data import make_nifti, read_nifti, save_nifti
from medaccel.data.ct import Scan, find_scans, read_scan, sift
from tests.data.dicom_series import write_series

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.105"
SHAPE = (4, 5, 6)


def hu() -> np.ndarray:
    return (np.arange(120, dtype=np.float32).reshape(SHAPE) * 10 - 600).astype(np.int16)


def write_nifti(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_nifti(path, make_nifti(array, np.diag([2.0, 2.0, 3.0, 1.0])))
    return path


def write_metaimage(path: Path, direction: tuple[float, ...] = (1, 0, 0, 0, 1, 0, 0, 0, 1)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(hu().T))
    image.SetSpacing((2.0, 2.0, 3.0))
    image.SetOrigin((-10.0, -20.0, -30.0))
    image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))
    return path


def write_ct_series(folder: Path, uid: str = UID, modality: str = "CT") -> Path:
    def edit(ds: Dataset, k: int) -> None:
        ds.Modality, ds.SeriesInstanceUID = modality, uid

    folder.mkdir(parents=True, exist_ok=True)
    return write_series(folder, edit)


def test_a_metaimage_lies_where_itk_says_that_it_lies(tmp_path: Path):
    for name, direction in (("plain", (1, 0, 0, 0, 1, 0, 0, 0, 1)), ("flipped", (-1, 0, 0, 0, -1, 0, 0, 0, 1))):
        path = write_metaimage(tmp_path / f"{name}.mhd", direction)
        found = read_scan(Scan(path, "metaimage"))
        np.testing.assert_array_equal(np.asarray(found.dataobj), hu())
        # SimpleITK's own NIfTI writer turns LPS to RAS too.
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(path)), str(tmp_path / f"{name}.nii.gz"))
        np.testing.assert_allclose(found.affine, read_nifti(tmp_path / f"{name}.nii.gz").affine, atol=1e-5)
        np.testing.assert_allclose(found.affine @ [0, 0, 0, 1], [10, 20, -30, 1])


def test_a_tree_is_searched_and_every_series_counts_once(tmp_path: Path):
    luna, lidc = tmp_path / "luna16", tmp_path / "lidc"
    write_metaimage(luna / "subset0" / f"{UID}.mhd")
    write_metaimage(luna / "subset1" / f"{UID}7.mhd")
    write_metaimage(luna / "seg-lungs-LUNA16" / f"{UID}.mhd")  # comes first by name, and is no scan
    (luna / "subset0" / "._x.nii.gz").write_bytes(b"stray")
    (luna / "LICENSE").write_text("as is")
    write_ct_series(lidc / "LIDC-IDRI-0001" / "ct")
    write_ct_series(lidc / "LIDC-IDRI-0002" / "ct", uid="1.2.3.4.5.6")
    write_ct_series(lidc / "LIDC-IDRI-0002" / "xray", uid="1.2.3.4.5.7", modality="DX")
    found = find_scans(luna, lidc)
    assert [(scan.kind, scan.uid) for scan in found.scans] == [
        ("metaimage", UID),
        ("metaimage", f"{UID}7"),
        ("dicom", "1.2.3.4.5.6"),
    ]
    assert [skip.path.parent.name for skip in found.duplicates] == ["LIDC-IDRI-0001"]
    assert "the series of" in found.duplicates[0].reason
    assert found.scans[0].path == luna / "subset0" / f"{UID}.mhd"
    assert [skip.reason for skip in found.no_ct] == [
        "LUNA16's lung masks, no scans",
        "a DICOM series of modality DX, expected CT",
    ]
    assert all(min(read_scan(scan).shape) > 1 for scan in found.scans)


def test_padding_is_cut_off(tmp_path: Path):
    values = hu()
    values[0] = -3024
    path = write_nifti(tmp_path / "a.nii.gz", values)
    assert np.asarray(read_scan(Scan(path, "nifti")).dataobj).min() == -1024


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (hu()[:, :, :1], r"expected at least two voxels"),
        (np.zeros(SHAPE, dtype=np.int16), "is 0 everywhere; expected a CT in HU"),
        (np.where(hu() > 0, np.nan, 1.0).astype(np.float32), "not finite"),
    ],
)
def test_what_is_no_ct_is_refused(tmp_path: Path, array: np.ndarray, message: str):
    path = tmp_path / "a.nii.gz"
    if np.isnan(array.astype(float)).any():  # save_nifti would refuse it too
        import nibabel

        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    else:
        write_nifti(path, array)
    with pytest.raises(ValueError, match=message):
        read_scan(Scan(path, "nifti"))


def test_damaged_scans_are_skipped_up_to_a_limit(tmp_path: Path):
    for name in ("a", "b", "c", "d"):
        write_nifti(tmp_path / f"{name}.nii.gz", hu())
    damaged = tmp_path / "b.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    scans = find_scans(tmp_path).scans
    kept, skipped = sift(scans, read_scan, limit=0.25)
    assert [scan.path.name for scan in kept] == ["a.nii.gz", "c.nii.gz", "d.nii.gz"]
    assert [skip.path.name for skip in skipped] == ["b.nii.gz"]
    assert "b.nii.gz" in skipped[0].reason
    with pytest.raises(ValueError, match=r"1 of 4 scans can't be read, expected at most 10 %: .*b\.nii\.gz"):
        sift(scans, read_scan)
    with pytest.raises(ValueError, match="limit is 2; expected a share"):
        sift(scans, read_scan, limit=2)


def test_a_metaimage_without_its_values_is_refused(tmp_path: Path):
    path = write_metaimage(tmp_path / "a.mhd")
    path.with_suffix(".raw").unlink()
    with pytest.raises(ValueError, match=r"a\.mhd: can't be read as MetaImage"):
        read_scan(Scan(path, "metaimage"))


def test_folders_without_scans(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_scans(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("no scan")
    with pytest.raises(ValueError, match=r"no CT scans; expected \.nii"):
        find_scans(tmp_path)
    with pytest.raises(NotADirectoryError, match="but this is a file"):
        find_scans(tmp_path / "notes.txt")
