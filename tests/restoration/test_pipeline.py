# SPDX-License-Identifier: Apache-2.0
"""`restoration run` on studies small enough for a test: its files, its resuming, its refusals."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from medaccel.cli import main
from medaccel.restoration.config import RunConfig
from medaccel.restoration.pipeline import run
from medaccel.restoration.study import load_study, save_study
from tests.restoration.test_gaussian_methods import make_study


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("studies")
    for role, seeds in (("train", (0, 1)), ("test", (2, 3))):
        for seed in seeds:
            study = make_study(seed)
            (root / role).mkdir(exist_ok=True)
            save_study(root / role / study.name, study)
    return root / "train", root / "test"


@pytest.fixture(scope="module")
def finished(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = RunConfig(
        output=tmp_path_factory.mktemp("out") / "run", train_studies=folders[0], test_studies=folders[1], epochs=3
    )
    run(config)
    return config


def test_the_folder_holds_all_that_was_promised(finished: RunConfig):
    folder = finished.output
    assert yaml.safe_load((folder / "config.yaml").read_text())["input_seconds"] == 60
    content = json.loads((folder / "metrics.json").read_text())
    methods = [row["method"] for row in content["methods"]]
    assert methods == ["identity", "gaussian1", "gaussian3", "gaussian_mix", "oracle", "noise_free"]
    assert content["config_digest"] == finished.digest()
    assert content["mse_limit"] == pytest.approx(1 / 3)
    with (folder / "metrics.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["identity"]["score_mse"]) == 0
    assert float(rows["gaussian1"]["score_mse"]) > 5
    assert float(rows["oracle"]["score_mse"]) == pytest.approx(33.3, abs=4)
    assert len(list((folder / "figures").glob("*.png"))) >= 4
    html = (folder / "report.html").read_text()
    assert "Gaussian, 3 layers" in html
    assert 'src="http' not in html


def test_the_same_run_elsewhere_gives_the_same_figures(finished: RunConfig, tmp_path: Path):
    again = dataclasses.replace(finished, output=tmp_path / "again")
    run(again)
    assert (again.output / "metrics.csv").read_bytes() == (finished.output / "metrics.csv").read_bytes()


def test_a_second_run_resumes_and_says_so(finished: RunConfig):
    before = {p: p.stat().st_mtime_ns for p in (finished.output / "checkpoints").iterdir()}
    metrics = (finished.output / "metrics.csv").read_bytes()
    lines: list[str] = []
    run(finished, say=lines.append)
    assert "resuming the run that is there" in lines[0]
    assert {p: p.stat().st_mtime_ns for p in (finished.output / "checkpoints").iterdir()} == before
    assert (finished.output / "metrics.csv").read_bytes() == metrics


def test_other_options_are_refused_by_name_and_force_starts_clean(finished: RunConfig, tmp_path: Path):
    config = dataclasses.replace(finished, output=tmp_path / "run", methods=("gaussian1",), epochs=1)
    run(config)
    other = dataclasses.replace(config, epochs=2)
    with pytest.raises(ValueError, match=r"holds a run with other options \(epochs differ\)"):
        run(other)
    lines: list[str] = []
    run(other, force=True, say=lines.append)
    assert "starting clean" in lines[0]


def test_a_folder_that_holds_something_else_is_left_alone(finished: RunConfig, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(dataclasses.replace(finished, output=tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_output_that_cannot_be_made_is_an_error(finished: RunConfig, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the output folder can't be made"):
        run(dataclasses.replace(finished, output=tmp_path / "file" / "run"))


def test_a_study_in_both_sets_is_refused(folders: tuple[Path, Path], tmp_path: Path):
    config = RunConfig(output=tmp_path / "run", train_studies=folders[0], test_studies=folders[0], epochs=1)
    with pytest.raises(ValueError, match="is among the training and the test studies"):
        run(config)


def test_a_study_without_its_target_names_the_file(folders: tuple[Path, Path], tmp_path: Path):
    study = load_study(folders[1] / "made_2")
    del study.exposures[90]
    (tmp_path / "studies").mkdir()
    save_study(tmp_path / "studies" / "lacking", study)
    config = RunConfig(
        output=tmp_path / "run", train_studies=tmp_path / "studies", test_studies=folders[1], methods=("gaussian1",)
    )
    with pytest.raises((ValueError, OSError), match="PET_90"):
        run(config)


def test_simulated_phantoms_go_from_nothing_to_a_report(tmp_path: Path):
    config = RunConfig(
        output=tmp_path / "run",
        train_phantoms=1,
        test_phantoms=1,
        methods=("gaussian1",),
        epochs=1,
        simulator={"n_angles": 24, "iterations": 1},
    )
    report = run(config)
    assert report.exists()
    assert np.isfinite(json.loads((report.parent / "metrics.json").read_text())["methods"][1]["score_mse"])


def test_ctrl_c_leaves_a_run_that_goes_on(folders: tuple[Path, Path], finished: RunConfig, tmp_path: Path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "medaccel.cli", "restoration", "run", "--epochs", "3", "--output", str(output)]
    command += ["--train_studies", str(folders[0]), "--test_studies", str(folders[1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 90
    while not (output / "checkpoints" / "gaussian1.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert not (output / "report.html").exists()
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "resuming the run that is there" in result.stdout
    assert (output / "metrics.csv").read_bytes() == (finished.output / "metrics.csv").read_bytes()


BAD = {
    "seconds": (["--input_seconds", "90"], "expected 0 < input_seconds < target_seconds"),
    "method": (["--methods", "[median]"], "methods is ['median']"),
    "count": (["--epochs", "0"], "epochs is 0; expected a whole number >= 1"),
    "simulator": (["--simulator", "{dose: 2}"], "simulator has an unknown parameter"),
    "duration": (["--input_seconds", "45"], "[45] are not"),
    "no dicom": (["--dicom", "/nowhere/at/all", "--train_phantoms", "1"], "/nowhere/at/all"),
    "no studies": (["--train_studies", "/nowhere/at/all"], "/nowhere/at/all"),
    "both": (["--dicom", "a", "--test_studies", "b"], "dicom and test_studies are both given"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options_end_in_a_sentence(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options, sentence = BAD[what]
    assert main(["restoration", "run", "--output", str(tmp_path / "run"), *options]) == 1
    error = capsys.readouterr().err
    assert "medaccel: error:" in error
    assert sentence in error
