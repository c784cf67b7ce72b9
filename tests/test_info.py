# SPDX-License-Identifier: Apache-2.0
"""`medaccel info` says what a path is and how it is read; its status tells whether it is."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset

from medaccel.cli import main
from medaccel.data import make_nifti, save_nifti
from medaccel.info import info
from tests.data.dicom_series import write_series

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def hu() -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.normal(-1000, 15, (24, 24, 12))
    values[4:20, 4:20] = rng.normal(40, 25, (16, 16, 12))
    values[6:9, 6:9] = -90
    return values.clip(-1024).astype(np.int16)


def broken(ds: Dataset, k: int) -> None:
    ds.RescaleSlope = 0


def without_dose(ds: Dataset, k: int) -> None:
    del ds.RadiopharmaceuticalInformationSequence[0].RadionuclideTotalDose


def make(folder: Path, kind: str) -> Path:
    if kind.startswith("series"):
        edits = {"series": None, "series, broken": broken, "series, no dose": without_dose}
        return write_series(folder / "dicom", edits[kind])
    if kind == "study":
        save_nifti(folder / "PET_60.nii.gz", make_nifti(np.full((9, 9, 9), 0.7, np.float32), AFFINE))
        return folder
    if kind == "slice":
        return next(write_series(folder / "dicom").iterdir())
    if kind == "text":
        (folder / "a.txt").write_text("notes")
        return folder / "a.txt"
    if kind == "nothing":
        return folder / "nowhere"
    if kind == "empty":
        return folder
    values = {"ct": hu(), "labels": (hu() > 0).astype(np.uint8), "bqml": np.full((9, 9, 9), 5000, np.float32)}[kind]
    image = make_nifti(values, AFFINE)
    if kind == "labels":
        image.set_qform(AFFINE @ np.diag([-1, 1, 1, 1]), code=1)
    if kind == "bqml":
        nib.Nifti1Pair(values, AFFINE).to_filename(folder / "a.img")
        return folder / "a.hdr"
    save_nifti(folder / "a.nii.gz", image)
    return folder / "a.nii.gz"


# kind: (exit status, what the output has)
EXPECTED = {
    "series": (
        0,
        ("a DICOM series, PET", "6 slices", "SUV: ", "START", "3 × 2 × 4 mm", "LPS", "Bq/mL", "right-handed"),
    ),
    "series, broken": (1, ("refused: ", "RescaleSlope (0028,1053) is 0")),
    "series, no dose": (1, ("5 × 4 × 6", "refused: ", "RadionuclideTotalDose")),
    "study": (0, ("a study folder: PET_60.nii.gz", "SUV is possible: the body's median is 0.7")),
    "slice": (1, ("one DICOM file; expected the folder that has it",)),
    "text": (1, ("refused: ", "a.txt: is nothing that is read")),
    "nothing": (1, ("no such file or folder",)),
    "empty": (1, ("no DICOM files in this folder",)),
    "ct": (0, ("a NIfTI file, version 1", "HU, by its values", "2 × 2 × 3 mm", "the sform's")),
    "labels": (0, ("looks like a label map", "mirror images of each other; the sform is taken")),
    "bqml": (0, ("a NIfTI pair, version 1", "not SUV: ", "Bq/mL")),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_a_path_is_and_whether_it_is_read(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, words = EXPECTED[kind]
    assert main(["info", str(make(tmp_path, kind))]) == status
    said = " ".join(capsys.readouterr().out.split())
    assert [word for word in words if word not in said] == []


def test_an_oblique_and_left_handed_image_is_told(tmp_path: Path) -> None:
    c, s = np.cos(0.2), np.sin(0.2)
    rotation = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    save_nifti(tmp_path / "a.nii", make_nifti(hu(), rotation @ np.diag([-2.0, 2, 3, 1])))
    found = info(tmp_path / "a.nii")
    assert found.refusal is None
    assert found.lines["orientation"] == "LAS (the way each axis goes), left-handed, oblique by 11.5°"
    assert found.warnings == []


def test_the_sample_pet(data_dir: Path) -> None:
    found = info(data_dir / "pet" / "sts_001_fdg_pet_dicom")
    assert found.lines["shape"] == "128 × 128 × 267, float32"
    assert found.lines["values"].startswith("0 to 66.5215,")
    assert (found.refusal, found.warnings) == (None, [])
