# SPDX-License-Identifier: Apache-2.0
"""Runs and scorings that are resumed, and what they refuse because it changed since."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.pipeline import run, score
from medaccel.studies.lock import locked


@pytest.mark.slow
def test_a_second_run_and_a_second_score_compute_nothing_again_and_say_so(
    quick: RestorationConfig, folders: tuple[Path, Path]
):
    chosen = ScoreConfig(quick.output, test_studies=folders[1])
    score(chosen)
    kept = [*(quick.output / "checkpoints").iterdir(), *(quick.output / "scored/test/rows").iterdir()]
    before = {p: p.stat().st_mtime_ns for p in kept}
    lines: list[str] = []
    run(quick, say=lines.append)
    score(chosen, say=lines.append)
    assert "resuming the run that is there" in lines[0]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert any("scored before with these choices" in line for line in lines)
    score(dataclasses.replace(chosen, name="again"), say=lines.append)
    assert any("these studies have been scored 2 times" in line for line in lines)
    entries = json.loads((quick.output / "scored.json").read_text())
    assert [entry["name"] for entry in entries] == ["test", "again"]
    assert entries[0]["frozen"] == yaml.safe_load((quick.output / "config.yaml").read_text())["frozen"]["digest"]


def test_a_score_of_other_options_does_not_mix_with_one_that_is_there(
    quick: RestorationConfig, folders: tuple[Path, Path]
):
    score(ScoreConfig(quick.output, test_studies=folders[1], name="mixed"))
    with pytest.raises(ValueError, match="holds a scoring with other options"):
        score(ScoreConfig(quick.output, test_studies=folders[1], name="mixed", samples=5))


def _copied(folders: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    for source, name in zip(folders, ("train", "test"), strict=True):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "train", tmp_path / "test"


@pytest.mark.slow
def test_studies_that_changed_since_the_fit_are_named(
    quick: RestorationConfig, folders: tuple[Path, Path], tmp_path: Path
):
    train, _ = _copied(folders, tmp_path)
    config = dataclasses.replace(quick, output=tmp_path / "run", train_studies=train)
    run(config, say=lambda _: None)
    splits = json.loads((config.output / "splits.json").read_text())
    assert str(train / "made_0" / "PET_60.nii.gz") in splits["inputs"]
    os.utime(train / "made_0" / "PET_60.nii.gz")  # touched, not changed
    run(config, say=lambda _: None)
    kept = (train / "made_0" / "PET_60.nii.gz").read_bytes()
    shutil.copy(train / "made_1" / "PET_60.nii.gz", train / "made_0" / "PET_60.nii.gz")
    with pytest.raises(ValueError, match=r"a run of other data: .*made_0/PET_60.nii.gz has changed; choose another"):
        run(config, say=lambda _: None)
    (train / "made_0" / "PET_60.nii.gz").write_bytes(kept)
    shutil.copytree(train / "made_0", train / "made_9")
    with pytest.raises(ValueError, match=r"made_9/PET_60.nii.gz is new"):
        run(config, say=lambda _: None)
    lines: list[str] = []
    run(config, force=True, say=lines.append)
    assert "starting clean" in lines[0]
    assert "gaussian1: fitting to 3 studies" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "test", "train"]


def test_test_studies_that_changed_are_not_answered_with_the_old_scores(
    quick: RestorationConfig, folders: tuple[Path, Path], tmp_path: Path
):
    _, test = _copied(folders, tmp_path)
    chosen = ScoreConfig(quick.output, test_studies=test, name="changing")
    score(chosen, say=lambda _: None)
    shutil.copy(test / "made_2" / "PET_90.nii.gz", test / "made_3" / "PET_90.nii.gz")
    with pytest.raises(ValueError, match=r"a scoring of other data: .*made_3/PET_90.nii.gz has changed; choose"):
        score(chosen, say=lambda _: None)
    score(dataclasses.replace(chosen, name="changed"), say=lambda _: None)


def test_two_processes_do_not_score_into_one_folder(quick: RestorationConfig, folders: tuple[Path, Path]):
    (quick.output / "scored" / "held").mkdir(parents=True)
    with (
        locked(quick.output / "scored" / "held", "scoring"),
        pytest.raises(ValueError, match=rf"process {os.getpid()} on .* is working on this scoring"),
    ):
        score(ScoreConfig(quick.output, test_studies=folders[1], name="held"), say=lambda _: None)


def test_what_was_frozen_is_refused_when_it_changed(
    quick: RestorationConfig, folders: tuple[Path, Path], tmp_path: Path
):
    config = dataclasses.replace(quick, output=tmp_path / "run")
    run(config)
    chosen = ScoreConfig(config.output, test_studies=folders[1])
    record = config.output / "config.yaml"
    text = record.read_text()
    record.write_text(text.replace("best: gaussian1", "best: swin_unetr"))
    with pytest.raises(ValueError, match="what was chosen has been changed"):
        score(chosen)
    record.write_text(text.replace("seed: 0", "seed: 7"))
    with pytest.raises(ValueError, match="its options have been changed"):
        score(chosen)
    record.write_text(text)
    checkpoint = config.output / "checkpoints" / "gaussian1.pt"
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"settings": {"epochs": 2, "studies": 8}}, checkpoint)
    with pytest.raises(ValueError, match="gaussian1 changed since the choices were made"):
        score(chosen)


def test_a_run_that_has_not_ended_can_not_be_scored(quick: RestorationConfig, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        score(ScoreConfig(tmp_path / "nowhere"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(quick.plain()))
    with pytest.raises(FileNotFoundError, match="this run has not ended"):
        score(ScoreConfig(tmp_path))


def test_a_patient_that_was_fitted_to_is_no_test(quick: RestorationConfig, folders: tuple[Path, Path]):
    with pytest.raises(ValueError, match="was fitted to or chosen on; it can't be a test"):
        score(ScoreConfig(quick.output, test_studies=folders[0]))


def test_resume_wants_a_run_that_is_there(quick: RestorationConfig, tmp_path: Path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        run(dataclasses.replace(quick, output=tmp_path / "none"), resume=True)
    assert run(quick, resume=True).exists()


@pytest.mark.slow
def test_other_options_are_refused_by_name_and_force_starts_clean(quick: RestorationConfig, tmp_path: Path):
    config = dataclasses.replace(quick, output=tmp_path / "run")
    run(config)
    other = dataclasses.replace(config, settings={"gaussian1": {"epochs": 2}})
    with pytest.raises(ValueError, match=r"holds a run with other options \(settings differ\)"):
        run(other)
    lines: list[str] = []
    run(other, force=True, say=lines.append)
    assert "starting clean" in lines[0]
