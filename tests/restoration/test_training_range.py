# SPDX-License-Identifier: Apache-2.0
"""The noise of a PET is measured in that PET alone, and tells whether it is like the images that a method was fitted
on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medaccel.data import open_series, voxel_spacing
from medaccel.data.dicom import load_series
from medaccel.restoration.evaluation.training_range import TrainingRange, noise_level
from medaccel.restoration.simulation.generate import phantom_study
from medaccel.restoration.study import PETStudy, save_study

SHAPE, SPACING = (76, 56, 46), (4.0, 4.0, 4.0)


@pytest.fixture(scope="module")
def persons() -> list[PETStudy]:
    return [phantom_study(seed, shape=SHAPE, spacing=SPACING) for seed in (0, 1)]


@pytest.fixture(scope="module")
def folders(persons: list[PETStudy], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("studies")
    for person in persons:
        save_study(root / person.name, person)
    return [root / person.name for person in persons]


@pytest.fixture(scope="module")
def fitted(folders: list[Path]) -> TrainingRange:
    return TrainingRange.of(folders, [60])


# --- noise_level ---


def test_a_shorter_exposure_is_noisier_by_the_root_of_the_time(persons: list[PETStudy]) -> None:
    for person in persons:
        level = {t: noise_level(image, SPACING) for t, image in person.exposures.items()}
        assert level[30] > level[60] > level[90]
        assert level[30] / level[60] == pytest.approx(2**0.5, rel=0.1)
        assert level[60] / level[90] == pytest.approx(1.5**0.5, rel=0.1)


def test_two_persons_have_about_the_same(persons: list[PETStudy]) -> None:
    first, second = (noise_level(person.exposures[60], SPACING) for person in persons)
    assert second / first == pytest.approx(1, abs=0.25)


def test_anatomy_counts_for_little(persons: list[PETStudy]) -> None:
    for person in persons:
        assert person.noise_free is not None
        assert noise_level(person.noise_free, SPACING) < 0.2 * noise_level(person.exposures[90], SPACING)


@pytest.mark.parametrize("factor", [0.01, 7000.0])
def test_the_unit_makes_no_difference(persons: list[PETStudy], factor: float) -> None:
    image = persons[0].exposures[60]
    assert noise_level(factor * image, SPACING) == pytest.approx(noise_level(image, SPACING), rel=1e-3)


def test_a_hot_bladder_makes_no_difference(persons: list[PETStudy]) -> None:
    image = persons[0].exposures[60]
    hot = image.copy()
    hot[36:42, 26:32, 20:26] += 100
    assert noise_level(hot, SPACING) == pytest.approx(noise_level(image, SPACING), rel=0.1)


def test_white_noise_of_a_tenth_is_a_tenth() -> None:
    rng = np.random.default_rng(0)
    uptake = np.linspace(1, 5, 40)[:, None, None] * np.ones((40, 40, 40))
    for spacing in ((4.0, 4.0, 4.0), (2.0, 3.0, 9.0)):
        image = uptake * (1 + 0.1 * rng.standard_normal(uptake.shape))
        assert noise_level(image, spacing) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("volume", "spacing", "message"),
    [
        (np.ones((8, 8)), SPACING, "three axes"),
        (np.ones((8, 8, 1)), SPACING, "at least two voxels"),
        (np.full((8, 8, 8), np.nan), SPACING, "all finite"),
        (np.zeros((8, 8, 8)), SPACING, "no body"),
        (np.ones((8, 8, 8)), (4.0, 0.0, 4.0), "three positive lengths"),
    ],
)
def test_what_has_no_noise_level_is_refused(volume: np.ndarray, spacing: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_level(volume, spacing)


def test_two_slices_are_enough(persons: list[PETStudy]) -> None:
    image = persons[0].exposures[60]
    assert 0 < noise_level(image[:, :, 20:22], SPACING) < noise_level(image, SPACING)  # neighbours share noise


# --- TrainingRange ---


def test_a_range_is_that_of_its_studies_and_survives_json(
    fitted: TrainingRange, persons: list[PETStudy], folders: list[Path]
) -> None:
    levels = sorted(noise_level(person.exposures[60], SPACING) for person in persons)
    assert fitted.seconds == (60,)
    assert fitted.voxel_min == fitted.voxel_max == SPACING
    assert (fitted.noise_min, fitted.noise_max) == pytest.approx(tuple(levels))
    both = TrainingRange.of(folders, [60, 30])
    assert both.seconds == (30, 60)
    assert both.noise_max > fitted.noise_max
    assert TrainingRange.from_plain(json.loads(json.dumps(both.plain()))) == both


def test_what_it_was_fitted_on_needs_no_warning(fitted: TrainingRange, persons: list[PETStudy]) -> None:
    for person in persons:
        assert fitted.warnings(person.exposures[60], SPACING, 60) == []


def test_each_departure_is_a_sentence(fitted: TrainingRange, persons: list[PETStudy]) -> None:
    image = persons[0].exposures[60]
    assert fitted.warnings(image, SPACING, 65) == []  # within 10 %
    [sentence] = fitted.warnings(image, SPACING, 30)
    assert sentence == "the exposure is 30 s, but the method was fitted on 60 s"
    assert fitted.warnings(image, (4.0, 4.0, 4.5), 60) == []  # within 15 %
    [sentence] = fitted.warnings(image, (4.0, 4.0, 5.0), 60)
    assert sentence == "the voxel size along k is 5 mm, but the method was fitted on 4 mm"
    sentences = fitted.warnings(image, (4.0, 3.0, 5.0), 20)
    assert [s.split(",")[0].split(" is ")[0] for s in sentences] == [
        "the exposure",
        "the voxel size along j",
        "the voxel size along k",
    ]


def test_noise_outside_of_the_range_is_a_sentence(fitted: TrainingRange, persons: list[PETStudy]) -> None:
    person = persons[0]
    assert person.noise_free is not None
    [sentence] = fitted.warnings(person.noise_free, SPACING, 60)
    assert sentence.startswith("the noise is 1.")
    quieter = replace(fitted, noise_min=fitted.noise_min / 2, noise_max=fitted.noise_max / 2)
    [sentence] = quieter.warnings(person.exposures[60], SPACING, 60)
    assert "of the local uptake, but the method was fitted on" in sentence


def test_an_exposure_that_a_study_lacks_is_named(folders: list[Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"PET_45\.nii\.gz"):
        TrainingRange.of(folders, [45])
    with pytest.raises(ValueError, match="0 studies"):
        TrainingRange.of([], [60])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": []}, "at least one exposure"),
        ({"noise_min": 0.5}, "the least one first"),
        ({"voxel_min": [4.0, 4.0]}, "three positive lengths"),
        ({"other": 1}, "not a training range"),
    ],
)
def test_a_senseless_range_is_refused(fitted: TrainingRange, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingRange.from_plain(fitted.plain() | change)


def test_a_scanner_of_twenty_years_ago_is_noisier(fitted: TrainingRange, data_dir: Path) -> None:
    image = load_series(open_series(data_dir / "pet" / "sts_001_fdg_pet_dicom"), suv=True)
    sentences = fitted.warnings(np.asarray(image.dataobj), voxel_spacing(image), 240)
    assert len(sentences) == 5  # exposure, three axes, noise
    assert "the noise is 21 %" in sentences[-1]
