# SPDX-License-Identifier: Apache-2.0
"""Study folders: what is written is read again, and each broken study is refused by name."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medaccel.data import make_nifti, save_nifti
from medaccel.restoration.study import find_studies, is_complete, load_study, save_study
from tests.restoration.test_gaussian_methods import make_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    study = make_study(0)
    study.lesions = np.zeros(study.exposures[60].shape, np.uint16)
    study.lesions[4:6, 4:6, 4:6] = 1
    save_study(tmp_path / "one", study)
    return tmp_path / "one"


def replace(path: Path, change) -> None:
    image = nibabel.load(path)
    array = change(np.asarray(image.dataobj).copy())
    save_nifti(path, make_nifti(array, image.affine), force=True)


def test_a_study_comes_back_as_it_was(folder: Path):
    written, read = make_study(0), load_study(folder)
    assert sorted(read.exposures) == [60, 90]
    for seconds in (60, 90):
        assert np.array_equal(read.exposures[seconds], written.exposures[seconds])
    assert read.spacing == pytest.approx(written.spacing)
    assert read.lesions.max() == 1
    assert read.ct is None


def test_an_interrupted_writing_shows_and_is_done_again(folder: Path):
    record = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(record | {"complete": False}))
    assert not is_complete(folder)
    with pytest.raises(ValueError, match="interrupted"):
        load_study(folder)
    save_study(folder, make_study(0))
    assert is_complete(folder)


def test_a_complete_study_is_not_overwritten(folder: Path):
    with pytest.raises(FileExistsError, match="force=True replaces it"):
        save_study(folder, make_study(1))


def test_studies_are_found_in_order(folder: Path):
    save_study(folder.parent / "another", make_study(1))
    assert [path.name for path in find_studies(folder.parent)] == ["another", "one"]


def test_a_folder_without_record_is_read_too(folder: Path):
    (folder / "study.json").unlink()
    assert sorted(load_study(folder).exposures) == [60, 90]


def test_a_ct_of_its_own_grid_is_resampled_to_the_pet(folder: Path):
    pet = nibabel.load(folder / "PET_60.nii.gz")
    fine = np.diag([0.5, 0.5, 1.0, 1.0])
    shape = (2 * pet.shape[0], 2 * pet.shape[1], pet.shape[2] - 2)  # and two slices short
    i = np.arange(shape[0], dtype=np.float32)[:, None, None]
    nibabel.save(nibabel.Nifti1Image(np.broadcast_to(10 * i, shape).copy(), pet.affine @ fine), folder / "CT.nii.gz")
    study = load_study(folder)
    assert study.ct is not None
    assert study.ct.shape == pet.shape
    np.testing.assert_allclose(study.ct[1:-1, 0, 0], 20 * np.arange(1, pet.shape[0] - 1), atol=1e-2)
    assert (study.ct[..., -2:] == -1000).all()


BROKEN = {
    "missing exposure": (lambda f: (f / "PET_90.nii.gz").unlink(), "PET_90"),
    "truncated": (lambda f: (f / "PET_90.nii.gz").write_bytes((f / "PET_90.nii.gz").read_bytes()[:200]), "PET_90"),
    "negative": (lambda f: replace(f / "PET_60.nii.gz", lambda a: a - 100), "PET_60"),
    "nan": (lambda f: replace(f / "PET_60.nii.gz", lambda a: a * np.nan), "PET_60"),
    "zero": (lambda f: replace(f / "PET_60.nii.gz", lambda a: 0 * a), "PET_60"),
    "grid": (lambda f: replace(f / "PET_90.nii.gz", lambda a: a[:-1]), "PET_90"),
    "one slice": (
        lambda f: [replace(f / f"PET_{t}.nii.gz", lambda a: a[..., :1]) for t in (60, 90)],
        "at least two voxels",
    ),
    "lesions elsewhere": (lambda f: replace(f / "lesions.nii.gz", lambda a: a[1:]), "lesions"),
    "half lesions": (lambda f: replace(f / "lesions.nii.gz", lambda a: a.astype(np.float32) + 0.5), "lesions"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_study_names_its_file(what: str, folder: Path):
    change, sentence = BROKEN[what]
    change(folder)
    with pytest.raises((ValueError, OSError), match=sentence):
        load_study(folder, (60, 90))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_study(tmp_path / "nowhere")
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        find_studies(tmp_path / "nowhere")
