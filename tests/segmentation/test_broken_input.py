# SPDX-License-Identifier: Apache-2.0
"""Tasks, scans and checkpoints that are not what they should be: a sentence each, and the others go on."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medaccel.cli import main
from medaccel.data import make_nifti, read_nifti, save_nifti
from medaccel.data.msd import load_case, read_dataset
from medaccel.nets import SwinUNETR, load_pretrained
from medaccel.phantoms.ct_dataset import write_task
from medaccel.segmentation.apply import apply
from medaccel.segmentation.config import SegmentationConfig
from medaccel.segmentation.model import checkpoint
from medaccel.segmentation.study import check_data

Finished = tuple[Path, dict[str, Any]]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    write_task(tmp_path / "task", "spleen", 2, spacing=(8.0, 8.0, 8.0), progress=False)
    return tmp_path / "task"


def describe(task: Path, **fields: Any) -> None:
    path = task / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_study_refuses_another_modality_before_anything_is_made_unless_asked_for(tmp_path: Path):
    write_task(tmp_path / "six", "spleen", 6, spacing=(8.0, 8.0, 8.0), progress=False)
    describe(tmp_path / "six", modality={"0": "MRI"})
    for check_units in (True, False):
        given = {"mine": {"data": str(tmp_path / "six"), "preset": "phantom_spleen", "check_units": check_units}}
        config = SegmentationConfig(output=tmp_path / "run", tasks=given, primary={"none": True}, fractions=(1.0,))
        if check_units:
            with pytest.raises(ValueError, match="modality is"):
                check_data(config)
        else:
            assert set(check_data(config)) == {"mine"}


def test_another_modality_is_refused_unless_asked_for(task: Path):
    describe(task, modality={"0": "MRI"})
    with pytest.raises(
        ValueError, match=r"dataset\.json: modality is {'0': 'MRI'}; expected CT \(check_units: false"
    ):
        read_dataset(task)
    dataset = read_dataset(task, check_units=False)
    assert load_case(dataset, dataset.cases[0])[0].shape == load_case(dataset, dataset.cases[1])[0].shape


@pytest.mark.parametrize("kind", ["swapped", "scaled", "offset"])
def test_a_case_that_is_no_ct_is_refused_unless_asked_for(task: Path, kind: str):
    dataset = read_dataset(task)
    image, label = load_case(dataset, dataset.cases[0])
    hu = np.asarray(image.dataobj)
    values = {"swapped": np.asarray(label.dataobj), "scaled": hu / 1000, "offset": hu + 1024}[kind]
    save_nifti(dataset.cases[0].image, make_nifti(values, image.affine), force=True)
    with pytest.raises(ValueError, match=r"spleen_000\.nii\.gz: looks like .*; expected a CT in HU"):
        load_case(dataset, dataset.cases[0])
    load_case(read_dataset(task, check_units=False), dataset.cases[0])


@pytest.mark.parametrize("labels", [{}, [], {"0": "background"}, {"x": "y"}, {"0": "background", "7": "a"}, None, 3])
def test_labels_that_make_no_sense_are_told(task: Path, labels: Any):
    describe(task, labels=labels)
    with pytest.raises(ValueError, match=r"dataset\.json: labels "):
        read_dataset(task)


def test_links_that_go_round_and_pipes_are_told(task: Path):
    image = task / "imagesTr" / "spleen_000.nii.gz"
    image.unlink()
    image.symlink_to(image.name)
    with pytest.raises(FileNotFoundError, match=r"dataset\.json: names files that are missing: imagesTr/spleen_000"):
        read_dataset(task)
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(FileNotFoundError, match=r"dataset\.json: names files that are missing: imagesTr/spleen_000"):
        read_dataset(task)
    describe(task, training=[{"image": "./imagesTr/a\0.nii.gz", "label": "./labelsTr/a.nii.gz"}])
    with pytest.raises(ValueError, match=r"dataset\.json: names the file .*; expected one within the task's folder"):
        read_dataset(task)


def test_the_option_of_a_task_is_true_or_false(tmp_path: Path):
    tasks = {"spleen": {"data": "somewhere", "check_units": "no"}}
    with pytest.raises(ValueError, match=r"tasks\.spleen\.check_units is 'no'; expected true or false"):
        SegmentationConfig(output=tmp_path, tasks=tasks, primary={"none": True})


# --- apply ---


def scan(tiny_task: Path) -> Any:
    return read_nifti(read_dataset(tiny_task).cases[0].image)


def test_a_scan_in_another_unit_is_refused_unless_asked_for(
    tiny_task: Path, tiny_cell: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    image = scan(tiny_task)
    bright = tmp_path / "bright.nii.gz"
    save_nifti(bright, make_nifti(np.asarray(image.dataobj) + 1024, image.affine))
    output = tmp_path / "labels.nii.gz"
    command = [
        "segmentation",
        "apply",
        "--checkpoint",
        str(tiny_cell[0] / "best.pt"),
        str(bright),
        str(output),
        "--quiet",
    ]
    assert main(command) == 1
    assert "bright.nii.gz: looks like a CT with an offset of 1000 or 1024" in capsys.readouterr().err
    assert not output.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*command, "--check_units", "false"]) == 0
    assert output.exists()


def test_a_flipped_byte_of_a_checkpoint_is_told(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    """In the weights, where torch takes it for good."""
    whole = (tiny_cell[0] / "best.pt").read_bytes()
    path, image = tmp_path / "best.pt", read_dataset(tiny_task).cases[0].image
    for position in (len(whole) // 3, len(whole) // 2, len(whole) - 3000):
        content = bytearray(whole)
        content[position] ^= 0x40
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"best\.pt: not a checkpoint that can be read"):
            apply(path, image, tmp_path / "a.nii.gz", progress=False)
    net = SwinUNETR(1, 2, feature_size=12)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"load_pretrained: .*best\.pt is not a whole torch file of weights"):
        load_pretrained(net, path)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {}},
        {"labels": {0: "background"}},
        {"labels": {0: "background", 2: "spleen"}},
        {"labels": [1]},
        {"seen": {}},
        {"seen": {"spacing_mm": [[1, 2]], "body_hu": None}},
        {"seen": None},
        {"settings": 3},
        {"state_dict": {}},
        {"state_dict": None},
    ],
)
def test_a_checkpoint_whose_parts_make_no_sense_is_told(tiny_cell: Finished, tmp_path: Path, changes: dict[str, Any]):
    torch.save(torch.load(tiny_cell[0] / "best.pt", weights_only=True) | changes, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"best\.pt: its settings, labels and weights don't fit together"):
        checkpoint.load(tmp_path / "best.pt")


def test_what_is_no_file_is_never_opened(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    best, image = tiny_cell[0] / "best.pt", read_dataset(tiny_task).cases[0].image
    os.mkfifo(tmp_path / "pipe.nii.gz")
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "nowhere.nii").symlink_to("nothing.nii")
    for name, message in (("pipe.nii.gz", "is a pipe; expected"), ("nowhere.nii", "a link that leads nowhere")):
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: {message}"):
            apply(best, tmp_path / name, tmp_path / "a.nii.gz", progress=False)
    with pytest.raises(ValueError, match=r"pipe\.pt: is a pipe; expected"):
        apply(tmp_path / "pipe.pt", image, tmp_path / "a.nii.gz", progress=False)
