# SPDX-License-Identifier: Apache-2.0
"""Phantom CTs: reproducible, as varied as they should be, with CT numbers as measured."""

from pathlib import Path

import numpy as np
import pytest

from medaccel.data import read_nifti
from medaccel.data.msd import load_case, read_dataset
from medaccel.phantoms.ct import PhantomCT, make_phantom
from medaccel.phantoms.ct_anatomy import MEASURED, ORGANS, SHIFTED, STANDARD, TUMOUR, Population
from medaccel.phantoms.ct_dataset import TASKS, write_pool, write_task

COARSE = (6.0, 6.0, 6.0)
PLAIN = Population("plain", phases={"none": 1.0})


@pytest.fixture(scope="module")
def people() -> list[PhantomCT]:
    return [make_phantom(seed, spacing=COARSE, centre_z=-50.0) for seed in range(12)]


def test_the_seed_is_all_that_a_person_depends_on(people: list[PhantomCT]):
    again = make_phantom(3, spacing=COARSE, centre_z=-50.0)
    assert np.array_equal(again.hu, people[3].hu)
    assert np.array_equal(again.organs, people[3].organs)
    assert not np.array_equal(people[3].hu, people[4].hu)


def test_spleens_differ_in_size_place_and_contrast(people: list[PhantomCT]):
    masks = [person.organs == ORGANS["spleen"] for person in people]
    volumes = np.array([mask.sum() * 0.216 for mask in masks])  # mL
    centres = np.array([np.argwhere(mask).mean(axis=0) * 6.0 for mask in masks])
    values = np.array([person.hu[mask].mean() for person, mask in zip(people, masks, strict=True)])
    # Healthy spleens have 100 to 300 mL, enlarged ones more.
    assert volumes.min() > 30
    assert volumes.max() < 900
    assert volumes.std() / volumes.mean() > 0.25
    assert (centres.std(axis=0) > 5).all()
    assert values.std() > 15
    # On the patient's left: low x, as the axes go to the right.
    assert (centres[:, 0] < people[0].hu.shape[0] * 3.0).all()


@pytest.mark.parametrize(
    ("organ", "measured"), [("liver", "liver"), ("spleen", "spleen"), ("lung", "lung"), ("kidney", "kidney")]
)
@pytest.mark.slow
def test_ct_numbers_without_contrast_agent_are_those_measured(organ: str, measured: str):
    from scipy.ndimage import binary_erosion

    found = []
    for seed in range(4):
        person = make_phantom(seed, population=PLAIN, spacing=(4.0, 4.0, 4.0), centre_z=0.0)
        found.append(np.median(person.hu[binary_erosion(person.organs == ORGANS[organ])]))
    mean, deviation = MEASURED[measured]
    assert abs(np.mean(found) - mean) < max(0.5 * deviation, 8.0)


def test_lesions_lie_in_the_lungs_and_carry_their_numbers():
    seen = 0
    for seed in range(6):
        person = make_phantom(seed, spacing=COARSE, centre_z=80.0)
        lesions = person.lesions
        assert ((lesions > 0) == (person.organs == ORGANS["lesion"])).all()
        diameters = person.parameters["lesion_diameters_mm"]
        assert set(np.unique(lesions)) <= set(range(len(diameters) + 1))
        for number, diameter in enumerate(diameters, start=1):
            assert np.pi / 6 * diameter**3 == pytest.approx(np.count_nonzero(lesions == number) * 6.0**3)
        seen += len(diameters)
    assert seen >= 6


def test_every_patient_of_the_lung_task_has_a_tumour():
    for seed in range(6):
        person = make_phantom(seed, population=TUMOUR, spacing=COARSE, centre_z=80.0)
        # The smallest that is drawn, 10 mm, may be flattened and cut off by the lung's border.
        assert max(person.parameters["lesion_diameters_mm"]) > 7.0
    assert TASKS["lung"].population is TUMOUR


def test_the_shifted_population_is_another():
    standard = [make_phantom(seed, spacing=COARSE).parameters for seed in range(12)]
    shifted = [make_phantom(seed, population=SHIFTED, spacing=COARSE).parameters for seed in range(12)]
    assert {p["population"] for p in shifted} == {"shifted"}
    assert sum(p["phase"] == "venous" for p in standard) > sum(p["phase"] == "venous" for p in shifted)
    assert max(p["noise_hu"] for p in shifted) > STANDARD.noise[0][1]


def test_bad_fields_of_view_are_refused():
    with pytest.raises(ValueError, match=r"spacing is \(0, 4, 4\); expected three numbers above 0"):
        make_phantom(0, spacing=(0, 4, 4))
    with pytest.raises(ValueError, match=r"size_mm is .*; expected at least 96 mm"):
        make_phantom(0, size_mm=(384, 304, 60))


def test_a_task_is_written_once_and_goes_on(tmp_path: Path):
    folder = tmp_path / "task"
    first = write_task(folder, "spleen", 2, spacing=COARSE, progress=False)
    assert [case.name for case in first.cases] == ["spleen_000", "spleen_001"]
    for case in first.cases:
        image, label = load_case(first, case)
        assert 0 < np.asarray(label.dataobj).mean() < 0.1
        assert np.asarray(image.dataobj).min() <= -900
    kept, lost = first.cases[0].image, first.cases[1].image
    written, content = kept.stat().st_mtime_ns, np.asarray(read_nifti(lost).dataobj)
    lost.unlink()
    with pytest.raises(FileNotFoundError, match="missing: imagesTr/spleen_001"):
        read_dataset(folder)
    write_task(folder, "spleen", 2, spacing=COARSE, progress=False)
    assert kept.stat().st_mtime_ns == written
    assert np.array_equal(np.asarray(read_nifti(lost).dataobj), content)
    with pytest.raises(ValueError, match="of other phantoms; expected the same ones, or another folder"):
        write_task(folder, "lung", 2, spacing=COARSE, progress=False)


def test_a_pool_has_no_labels_and_no_person_of_a_task(tmp_path: Path):
    paths = write_pool(tmp_path / "pool", 2, spacing=COARSE, progress=False)
    assert [path.name for path in paths] == ["scan_000.nii.gz", "scan_001.nii.gz"]
    assert sorted(p.name for p in (tmp_path / "pool").iterdir()) == ["pool.json", *(p.name for p in paths)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "liver"}, "task is 'liver'; expected one of spleen, lung"),
        ({"task": "spleen", "cases": 0}, "cases is 0; expected 1 to 1000"),
        ({"task": "spleen", "seed": 50}, "seed is 50; expected 0 to 49"),
    ],
)
def test_bad_tasks_are_refused(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        write_task(tmp_path / "task", progress=False, **arguments)
