# SPDX-License-Identifier: Apache-2.0
"""Options and studies that a run or a scoring refuses, in a sentence and before anything is made."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from medaccel.cli import main
from medaccel.restoration.config import RestorationConfig
from medaccel.restoration.methods import METHODS
from medaccel.restoration.pipeline import run
from medaccel.restoration.study import load_study, save_study
from tests.restoration.runs import TINY
from tests.restoration.test_gaussian_methods import make_study


def test_the_options_name_the_methods_that_there_are():
    for name in METHODS:
        assert RestorationConfig(methods=(name,)).methods == (name,)
    with pytest.raises(ValueError, match=r"settings names \['median'\]"):
        RestorationConfig(settings={"median": {}})


def test_an_output_that_cannot_be_made_is_an_error(finished: RestorationConfig, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the output folder can't be made"):
        run(dataclasses.replace(finished, output=tmp_path / "file" / "run"))


def test_training_and_validation_share_no_patient(folders: tuple[Path, Path], tmp_path: Path):
    config = RestorationConfig(output=tmp_path / "run", train_studies=folders[0], validation_studies=folders[0])
    with pytest.raises(ValueError, match="is among the training and the validation studies"):
        run(config)
    # Two scans of one patient stay on one side, whatever their folders are called.
    for index, name in enumerate(("ann_1", "ann_2", "bob")):
        study = make_study(index)
        study.parameters = {"patient": name.split("_")[0]}
        save_study(tmp_path / "scans" / name, study)
    config = RestorationConfig(
        output=tmp_path / "run",
        train_studies=tmp_path / "scans",
        methods=("gaussian1",),
        settings={"gaussian1": {"epochs": 1}},
    )
    run(config)
    split = json.loads((tmp_path / "run" / "splits.json").read_text())
    patients = [{entry["patient"] for entry in split[role]} for role in ("training", "validation")]
    assert sorted(map(len, patients)) == [1, 1]
    assert patients[0] != patients[1]


def test_one_patient_alone_can_not_be_split(folders: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="holds one patient only; expected at least two"):
        run(RestorationConfig(output=tmp_path / "run", train_studies=folders[0] / "made_0"))


@pytest.mark.parametrize("method", ["gaussian1", "nlm", "diffusion_sdedit"])
def test_a_study_without_its_target_names_the_file(method: str, folders: tuple[Path, Path], tmp_path: Path):
    for name in ("made_0", "made_1"):
        study = load_study(folders[0] / name)
        del study.exposures[90]
        save_study(tmp_path / "studies" / name, study)
    config = RestorationConfig(
        output=tmp_path / "run",
        train_studies=tmp_path / "studies",
        methods=(method,),
        settings={"diffusion_sdedit": TINY | {"t0": [5]}},
    )
    with pytest.raises((ValueError, OSError), match="PET_90"):
        run(config)


BAD = {
    "seconds": (["--input_seconds", "90"], "expected exposures above 0 and below the target's"),
    "method": (["--methods", "[median]"], "methods is ['median']"),
    "count": (["--train_phantoms", "0"], "train_phantoms is 0; expected a whole number >= 1"),
    "epochs": (["--settings", "{gaussian1: {epochs: 0}}"], "epochs is 0; expected a whole number >= 1"),
    "trainer": (["--trainer", "{precison: 32-true}"], "trainer names ['precison']"),
    "too many": (["--train_phantoms", "600"], "so that no person is in two sets"),
    "setting": (["--settings", "{gaussian1: {speed: 9}}"], "settings ['speed'] are unknown"),
    "loss": (
        ["--methods", "[swin_unetr]", "--settings", "{swin_unetr: {loss: l7}}"],
        "loss is 'l7'; expected one of mse, mse_ssim, ssim",
    ),
    "simulator": (["--simulator", "{dose: 2}"], "simulator has an unknown parameter"),
    "duration": (["--input_seconds", "45"], "[45] are not"),
    "no studies": (["--train_studies", "/nowhere/at/all"], "/nowhere/at/all"),
    "validation alone": (["--validation_studies", "a"], "validation_studies is given without train_studies"),
    "voxels": (["--phantom_spacings", "[[4, 4, 40]]"], "expected three sizes in mm, at most 6"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options_end_in_a_sentence(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options, sentence = BAD[what]
    try:
        status: object = main(["restoration", "run", "--output", str(tmp_path / "run"), *options])
    except SystemExit as end:  # the parser knows the types of all settings, and refuses what doesn't fit
        status = end.code
    assert status == 2
    assert not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert re.search(r"^medaccel( restoration run)?: error:", error, re.MULTILINE)
    assert sentence in error


SCORE_BAD = {
    "both": (["--dicom", "a", "--test_studies", "b"], "dicom and test_studies are both given"),
    "no dicom": (["--dicom", "/nowhere/at/all"], "/nowhere/at/all"),
    "no studies": (["--test_studies", "/nowhere/at/all"], "/nowhere/at/all"),
    "method": (["--methods", "[nlm]"], "expected some of the run's, gaussian1"),
    "samples": (["--samples", "1"], "samples is 1; expected at least 2"),
    "name": (["--name", "../elsewhere"], "expected the name of a folder"),
    "count": (["--realisations", "0"], "realisations is 0"),
}


@pytest.mark.parametrize("what", SCORE_BAD)
def test_bad_options_of_a_score_end_in_a_sentence(
    what: str, quick: RestorationConfig, capsys: pytest.CaptureFixture[str]
):
    options, sentence = SCORE_BAD[what]
    assert main(["restoration", "score", str(quick.output), *options]) == 2
    error = capsys.readouterr().err
    assert "medaccel: error:" in error
    assert sentence in error
