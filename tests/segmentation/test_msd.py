# SPDX-License-Identifier: Apache-2.0
"""Reading the Decathlon's layout: what is there, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medaccel.data import make_nifti, save_nifti
from medaccel.data.msd import load_case, read_dataset

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
LABELS = {"0": "background", "1": "spleen"}


def entry(name: str) -> dict[str, str]:
    return {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}


def volume(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(exist_ok=True)
    save_nifti(path, make_nifti(array, affine))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Makes two cases, and the stray file of macOS beside them."""
    for name in ("b", "a"):
        volume(tmp_path / f"imagesTr/{name}.nii.gz", np.full((4, 5, 6), 40, dtype=np.int16))
        volume(tmp_path / f"labelsTr/{name}.nii.gz", np.eye(4, 5, dtype=np.uint8)[:, :, None].repeat(6, 2))
    (tmp_path / "imagesTr/._a.nii.gz").write_bytes(b"not an image")
    describe(tmp_path, training=[entry("b"), entry("._a"), entry("a")])
    return tmp_path


def describe(folder: Path, **fields: Any) -> None:
    content = {"name": "Tiny", "labels": LABELS, "training": [entry("a")]} | fields
    (folder / "dataset.json").write_text(json.dumps(content))


def test_cases_come_in_order_and_strays_are_none(task: Path):
    dataset = read_dataset(task)
    assert (dataset.name, dict(dataset.labels)) == ("Tiny", {0: "background", 1: "spleen"})
    assert [case.name for case in dataset.cases] == ["a", "b"]
    image, label = load_case(dataset, dataset.cases[0])
    assert np.asarray(image.dataobj).max() == 40
    assert np.asarray(label.dataobj).sum() == 24


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"training": [entry("../a")]}, ValueError, "expected one within the task's folder"),
        (
            {"training": [{"image": "/etc/a.nii.gz", "label": "b"}]},
            ValueError,
            "'/etc/a.nii.gz'; expected",
        ),
        ({"training": [{"image": "C:\\a.nii.gz", "label": "b"}]}, ValueError, "expected one within"),
        ({"training": [{"image": 3, "label": "b"}]}, ValueError, "names the file 3; expected a path"),
        ({"training": [entry("a"), entry("c")]}, FileNotFoundError, "missing: imagesTr/c.nii.gz, labelsTr/c.nii.gz"),
        ({"training": [entry("a"), entry("a")]}, ValueError, "case a is named twice"),
        ({"training": []}, ValueError, r"training is \[\]; expected a list"),
        ({"training": [{"image": "a"}]}, ValueError, "expected {image, label}"),
        ({"labels": None}, ValueError, "labels is None; expected such as"),
        ({"labels": {"0": "background", "2": "tumour"}}, ValueError, r"values \[0, 2\]; expected 0, 1, … without"),
        ({"labels": {"zero": "background"}}, ValueError, "expected whole numbers as keys"),
    ],
)
def test_a_dataset_that_makes_no_sense_is_refused(
    task: Path, fields: dict[str, Any], error: type[Exception], message: str
):
    describe(task, **fields)
    with pytest.raises(error, match=message):
        read_dataset(task)


def test_a_stray_label_is_no_case_either(task: Path):
    (task / "labelsTr/._b.nii.gz").write_bytes(b"not an image")
    stray = {"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/._b.nii.gz"}
    describe(task, training=[stray, entry("a")])
    assert [case.name for case in read_dataset(task).cases] == ["a"]
    describe(task, training=[stray])
    with pytest.raises(ValueError, match=r"names no case but files \._\*"):
        read_dataset(task)


def test_links_may_not_lead_out_of_the_task(task: Path, tmp_path_factory: pytest.TempPathFactory):
    image = task / "imagesTr/a.nii.gz"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.nii.gz"
    image.rename(elsewhere)
    image.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"a link to .*secret\.nii\.gz; expected one within the task's folder"):
        read_dataset(task)
    image.unlink()
    image.symlink_to(task / "imagesTr/b.nii.gz")
    assert len(read_dataset(task).cases) == 2


def test_no_dataset_or_not_json(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"dataset.json: not found"):
        read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected an object"):
        read_dataset(tmp_path)


def test_label_maps_that_do_not_fit(task: Path):
    label = task / "labelsTr/a.nii.gz"
    label.unlink()
    volume(label, np.full((4, 5, 6), 3, dtype=np.uint8))
    dataset = read_dataset(task)
    with pytest.raises(ValueError, match=r"holds 3; expected the labels of dataset.json, 0, 1"):
        load_case(dataset, dataset.cases[0])
    label.unlink()
    volume(label, np.zeros((4, 5, 5), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"its grid \(4, 5, 5\)"):
        load_case(dataset, dataset.cases[0])
    label.unlink()
    volume(label, np.zeros((4, 5, 6), dtype=np.uint8), np.diag([2.0, 2.0, 3.2, 1.0]))
    with pytest.raises(ValueError, match="differs from the image's"):
        load_case(dataset, dataset.cases[0])


def test_an_image_with_holes_in_its_values_is_refused(task: Path):
    import nibabel

    values = np.full((4, 5, 6), 40, dtype=np.float32)
    values[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), task / "imagesTr/a.nii.gz")
    dataset = read_dataset(task)
    with pytest.raises(ValueError, match=r"imagesTr/a\.nii\.gz.*finite"):
        load_case(dataset, dataset.cases[0])


def test_a_damaged_file_is_named(task: Path):
    image = task / "imagesTr/a.nii.gz"
    whole = image.read_bytes()
    dataset = read_dataset(task)
    image.write_bytes(whole[:60])
    with pytest.raises(ValueError, match=r"imagesTr/a\.nii\.gz: truncated or corrupt gzip file"):
        load_case(dataset, dataset.cases[0])
    image.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])  # the checksum at its end
    with pytest.raises(ValueError, match=r"imagesTr/a\.nii\.gz: truncated or corrupt gzip file"):
        load_case(dataset, dataset.cases[0])


def test_an_empty_label_is_a_case(task: Path):
    volume_of_nothing = make_nifti(np.zeros((4, 5, 6), dtype=np.uint8), AFFINE)
    save_nifti(task / "labelsTr/a.nii.gz", volume_of_nothing, force=True)
    dataset = read_dataset(task)
    _, label = load_case(dataset, dataset.cases[0])
    assert not np.asarray(label.dataobj).any()
