# SPDX-License-Identifier: Apache-2.0
"""A PET in another unit than SUV is told by its body, however much air is in view and however hot the bladder is."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Image
from scipy import ndimage

from medaccel.cli import main
from medaccel.data import make_nifti, read_nifti, read_pet_series, save_nifti, voxel_spacing
from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.pipeline import run
from medaccel.restoration.sources import check_sources
from medaccel.restoration.study import load_study, save_study
from medaccel.restoration.uptake import body_median, check_suv
from tests.restoration.test_gaussian_methods import make_study

SPACING = (4.0, 4.0, 4.0)


def patient(*, bladder: float = 60.0, margin: int = 0) -> np.ndarray:
    """A body of 0.4 to 0.8 SUV with a hot bladder, in air that has some noise, and more air around it."""
    rng = np.random.default_rng(0)
    volume = np.abs(rng.normal(0, 0.01, (60, 40, 70))).astype(np.float32)
    i, j, _ = np.ogrid[:60, :40, :70]
    body = np.broadcast_to(((i - 30) / 26) ** 2 + ((j - 20) / 16) ** 2 < 1, volume.shape)
    texture = ndimage.gaussian_filter(rng.random(volume.shape), 3)
    volume[body] += (0.6 + 5 * (texture - texture.mean())).clip(0.3, 1)[body].astype(np.float32)
    volume[27:33, 17:23, 5:11] = bladder
    padding = np.abs(rng.normal(0, 0.01, tuple(n + 2 * margin for n in volume.shape))).astype(np.float32)
    padding[tuple(slice(margin, margin + n) for n in volume.shape)] = volume
    return padding


@pytest.mark.parametrize("margin", [0, 30, 60])
@pytest.mark.parametrize("bladder", [0.5, 60.0, 2000.0])
def test_the_median_is_the_bodys(bladder: float, margin: int):
    volume = patient(bladder=bladder, margin=margin)
    assert body_median(volume, SPACING) == pytest.approx(0.6, abs=0.1)
    assert body_median(1e4 * volume, SPACING) == pytest.approx(1e4 * body_median(volume, SPACING), rel=1e-5)


@pytest.fixture(scope="module")
def image(data_dir: Path) -> Nifti1Image:
    return read_pet_series(data_dir / "pet" / "sts_001_fdg_pet_dicom")


REFUSED = [100, 5000, 1e6, 1 / 5000, 1 / 100, 1 / 60]
DOUBTED = [5, 8, 1 / 5, 1 / 10]


@pytest.mark.parametrize("margin", [0, 60])
@pytest.mark.parametrize("factor", [1.0, *DOUBTED, *REFUSED])
def test_factors_are_told_on_both_sides(factor: float, margin: int):
    volume = (factor * patient(margin=margin)).astype(np.float32)
    if factor == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_suv(volume, SPACING, Path("pet.nii"))
    elif factor in DOUBTED:
        with pytest.warns(UserWarning, match=r"pet\.nii: the body's median is .*, where SUV have 0\.15 to 2\.2 as a"):
            check_suv(volume, SPACING, Path("pet.nii"))
    else:
        with pytest.raises(ValueError, match=r"pet\.nii: the body's median is .*; expected SUV, and these look like"):
            check_suv(volume, SPACING, Path("pet.nii"))


@pytest.mark.parametrize("factor", [1.0, *DOUBTED, *REFUSED])
def test_factors_are_told_of_a_patient_and_its_parts(factor: float, image: Nifti1Image, data_dir: Path):
    whole, spacing = np.asarray(image.dataobj), voxel_spacing(image)
    crop = read_nifti(data_dir / "pet" / "sts_001_pet_suv_crop.nii.gz")
    views = [(whole[:, :, k : k + 60], spacing) for k in (0, 100, 200)]
    for volume, steps in [(whole, spacing), *views, (np.asarray(crop.dataobj), voxel_spacing(crop))]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if factor in REFUSED:
                with pytest.raises(ValueError, match=r"the body's median"):
                    check_suv(factor * volume, steps, Path("pet.nii"))
            else:
                check_suv(factor * volume, steps, Path("pet.nii"))
        assert bool(said) == (factor in DOUBTED)


def test_whole_numbers_are_suspected():
    with pytest.warns(UserWarning, match=r"pet\.nii: all values are whole numbers"):
        check_suv(np.ones((9, 9, 9), np.float32), SPACING, Path("pet.nii"))
    with pytest.raises(ValueError, match=r"pet\.nii: the volume is zero everywhere"):
        check_suv(np.zeros((9, 9, 9), np.float32), SPACING, Path("pet.nii"))


# --- Studies ---


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    for seed in range(3):
        save_study(tmp_path / "studies" / f"made_{seed}", make_study(seed))
    return tmp_path / "studies"


def scale(path: Path, factor: float) -> None:
    image = read_nifti(path)
    save_nifti(path, make_nifti((factor * np.asarray(image.dataobj)).astype(np.float32), image.affine), force=True)


@pytest.mark.parametrize("name", ["PET_60.nii.gz", "PET_90.nii.gz"])
def test_one_study_in_another_unit_is_named_before_anything_is_fitted(studies: Path, name: str, tmp_path: Path):
    scale(studies / "made_1" / name, 5000)
    config = RestorationConfig(output=tmp_path / "run", train_studies=studies, methods=("gaussian1",))
    with pytest.raises(ValueError, match=rf"made_1/{name}: the body's median is .*check_units: false"):
        run(config)
    assert not config.output.exists()
    check_sources(RestorationConfig(output=tmp_path / "run", train_studies=studies, check_units=False))


def test_a_label_map_in_place_of_the_ct_is_named(studies: Path, tmp_path: Path):
    study = load_study(studies / "made_2")
    labels = np.zeros(study.exposures[60].shape, np.uint8)
    labels[3:9, 3:9, 3:9] = 2
    save_nifti(studies / "made_2" / "CT.nii.gz", make_nifti(labels, study.affine))
    with pytest.raises(ValueError, match=r"made_2/CT\.nii\.gz: looks like a label map: 2 integer values from 0 to 2"):
        check_sources(RestorationConfig(output=tmp_path / "run", train_studies=studies))


def test_studies_are_read_again_only_where_they_have_changed(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"gaussian1": {"epochs": 1}}
    config = RestorationConfig(
        output=tmp_path / "run", train_studies=studies, methods=("gaussian1",), settings=settings
    )
    run(config)
    read: list[Path] = []
    monkeypatch.setattr("medaccel.restoration.sources.check_suv", lambda volume, spacing, path: read.append(path))
    check_sources(config)
    assert not read
    scale(studies / "made_0" / "PET_60.nii.gz", 1.01)
    check_sources(config)
    assert len(read) == 6


def test_the_options_of_before_are_the_same_run(tmp_path: Path):
    assert "check_units" not in RestorationConfig(output=tmp_path).plain()
    assert "check_units" not in ScoreConfig(run=tmp_path).plain()
    assert RestorationConfig(output=tmp_path, check_units=False).plain()["check_units"] is False


def test_a_score_refuses_such_studies_too(studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    test = tmp_path / "test"
    save_study(test / "made_7", make_study(7))
    settings = {"gaussian1": {"epochs": 1}}
    config = RestorationConfig(
        output=tmp_path / "run", train_studies=studies, methods=("gaussian1",), settings=settings
    )
    run(config)
    scale(test / "made_7" / "PET_60.nii.gz", 1 / 5000)
    assert main(["restoration", "score", str(config.output), "--test_studies", str(test)]) == 1
    assert "made_7/PET_60.nii.gz: the body's median is" in capsys.readouterr().err
