# SPDX-License-Identifier: Apache-2.0
"""`restoration run` and `score` on studies small enough for a test: files, resuming, freezing, refusals."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from medaccel.cli import main
from medaccel.restoration import scoring
from medaccel.restoration.config import RunConfig, ScoreConfig
from medaccel.restoration.methods import METHODS, load_method
from medaccel.restoration.pipeline import choose_best, run, score
from medaccel.restoration.scoring import Scored
from medaccel.restoration.study import load_study, save_study
from medaccel.studies.lock import locked
from tests.interrupts import heed_sigint
from tests.restoration.test_gaussian_methods import make_study

GAUSSIANS = ("gaussian1", "gaussian3", "gaussian_mix")
# The smallest networks that there are: what is tested is the way from studies to a report.
TINY: dict[str, Any] = {
    "channels": [8, 16],
    "roi_size": [16, 16, 16],
    "steps": 2,
    "steps_per_epoch": 2,
    "samples": 3,
    "sampling_steps": 2,
    "validation_samples": 1,
    "accelerator": "cpu",
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"epochs": 3} for name in GAUSSIANS},
    "diffusion_sdedit": TINY | {"t0": [5, 20]},
    "diffusion_conditional": TINY,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("studies")
    for role, seeds in (("train", (0, 1, 4)), ("test", (2, 3))):
        for seed in seeds:
            study = make_study(seed)
            (root / role).mkdir(exist_ok=True)
            save_study(root / role / study.name, study)
    return root / "train", root / "test"


@pytest.fixture(scope="module")
def finished(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = RunConfig(
        output=tmp_path_factory.mktemp("out") / "run",
        train_studies=folders[0],
        methods=(*GAUSSIANS, "diffusion_sdedit", "diffusion_conditional"),
        settings=SETTINGS,
    )
    run(config)
    return config


@pytest.fixture(scope="module")
def scored(folders: tuple[Path, Path], finished: RunConfig) -> ScoreConfig:
    chosen = ScoreConfig(finished.output, test_studies=folders[1])
    score(chosen)
    return chosen


@pytest.fixture(scope="module")
def quick(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that takes a second."""
    config = RunConfig(
        output=tmp_path_factory.mktemp("quick") / "run",
        train_studies=folders[0],
        methods=("gaussian1",),
        settings={"gaussian1": {"epochs": 1}},
    )
    run(config)
    return config


def _table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_the_folder_holds_all_that_was_promised(finished: RunConfig, scored: ScoreConfig):
    folder = finished.output
    options = yaml.safe_load((folder / "config.yaml").read_text())
    assert options["input_seconds"] == 60
    assert set(options["frozen"]["checkpoints"]) == set(finished.methods)
    split = json.loads((folder / "splits.json").read_text())
    assert [len(split[role]) for role in ("training", "validation")] == [2, 1]
    for results in (folder, folder / "scored" / "test"):
        content = json.loads((results / "metrics.json").read_text())
        methods = [row["method"] for row in content["methods"]]
        assert methods == ["identity", *finished.methods, "oracle", "noise_free"]
        assert content["config_digest"] == finished.digest()
        assert content["mse_limit"]["60"] == pytest.approx(1 / 3)
        rows = _table(results)
        assert float(rows["identity"]["score_mse"]) == 0
        assert float(rows["gaussian1"]["score_mse"]) > 5
        assert float(rows["oracle"]["score_mse"]) == pytest.approx(33.3, abs=4)
        assert len(list((results / "figures").glob("*.png"))) >= 4
        html = (results / "report.html").read_text()
        assert "Gaussian, 3 layers" in html
        assert "Uncertainty of the samples" in html
        assert "Method against method" in html
        assert 'src="http' not in html


def test_three_layers_score_what_one_does_and_the_mix_no_less(scored: ScoreConfig):
    rows = _table(scored.run / "scored" / "test")
    one, three, mix = (float(rows[name]["score_mse"]) for name in GAUSSIANS)
    assert three == pytest.approx(one, abs=0.3)
    assert mix > one - 0.3


@pytest.mark.slow
def test_the_same_run_elsewhere_gives_the_same_figures(finished: RunConfig, scored: ScoreConfig, tmp_path: Path):
    again = dataclasses.replace(finished, output=tmp_path / "again")
    run(again)
    score(dataclasses.replace(scored, run=again.output))
    for name in ("metrics.csv", "scored/test/metrics.csv", "scored/test/coverage.csv"):
        assert (again.output / name).read_bytes() == (finished.output / name).read_bytes(), name


def test_a_second_run_and_a_second_score_compute_nothing_again_and_say_so(
    quick: RunConfig, folders: tuple[Path, Path]
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


def test_a_score_of_other_options_does_not_mix_with_one_that_is_there(quick: RunConfig, folders: tuple[Path, Path]):
    score(ScoreConfig(quick.output, test_studies=folders[1], name="mixed"))
    with pytest.raises(ValueError, match="holds a scoring with other options"):
        score(ScoreConfig(quick.output, test_studies=folders[1], name="mixed", samples=5))


def _copied(folders: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    for source, name in zip(folders, ("train", "test"), strict=True):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "train", tmp_path / "test"


def test_studies_that_changed_since_the_fit_are_named(quick: RunConfig, folders: tuple[Path, Path], tmp_path: Path):
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
    quick: RunConfig, folders: tuple[Path, Path], tmp_path: Path
):
    _, test = _copied(folders, tmp_path)
    chosen = ScoreConfig(quick.output, test_studies=test, name="changing")
    score(chosen, say=lambda _: None)
    shutil.copy(test / "made_2" / "PET_90.nii.gz", test / "made_3" / "PET_90.nii.gz")
    with pytest.raises(ValueError, match=r"a scoring of other data: .*made_3/PET_90.nii.gz has changed; choose"):
        score(chosen, say=lambda _: None)
    score(dataclasses.replace(chosen, name="changed"), say=lambda _: None)


def test_two_processes_do_not_score_into_one_folder(quick: RunConfig, folders: tuple[Path, Path]):
    (quick.output / "scored" / "held").mkdir(parents=True)
    with (
        locked(quick.output / "scored" / "held", "scoring"),
        pytest.raises(ValueError, match=rf"process {os.getpid()} on .* is working on this scoring"),
    ):
        score(ScoreConfig(quick.output, test_studies=folders[1], name="held"), say=lambda _: None)


def test_what_was_frozen_is_refused_when_it_changed(quick: RunConfig, folders: tuple[Path, Path], tmp_path: Path):
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


def test_a_run_that_has_not_ended_can_not_be_scored(quick: RunConfig, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        score(ScoreConfig(tmp_path / "nowhere"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(quick.plain()))
    with pytest.raises(FileNotFoundError, match="this run has not ended"):
        score(ScoreConfig(tmp_path))


def test_a_patient_that_was_fitted_to_is_no_test(quick: RunConfig, folders: tuple[Path, Path]):
    with pytest.raises(ValueError, match="was fitted to or chosen on; it can't be a test"):
        score(ScoreConfig(quick.output, test_studies=folders[0]))


def test_resume_wants_a_run_that_is_there(quick: RunConfig, tmp_path: Path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        run(dataclasses.replace(quick, output=tmp_path / "none"), resume=True)
    assert run(quick, resume=True).exists()


def test_sampled_studies_limits_the_drawing_methods_alone(finished: RunConfig, folders: tuple[Path, Path]):
    score(ScoreConfig(finished.output, test_studies=folders[1], sampled_studies=1, samples=2, name="one"))
    content = json.loads((finished.output / "scored" / "one" / "metrics.json").read_text())
    values = {(row["method"], row["study"]): row["score_mse"] for row in content["per_study"]}
    assert values["diffusion_conditional", "made_3"] is None
    assert values["diffusion_conditional", "made_2"] is not None
    assert values["gaussian1", "made_3"] is not None


def test_realisations_of_one_patient_get_intervals_within_the_patient(
    finished: RunConfig, folders: tuple[Path, Path], tmp_path: Path
):
    methods = {"gaussian1": load_method(finished.output / "checkpoints" / "gaussian1.pt")}
    scorer = scoring.Scorer(methods, tmp_path, one_patient=True, progress=False)
    found = scorer.score(sorted(folders[1].iterdir()), 60, 90)
    sums = found.blocks["mse"]
    assert np.shape(sums["gaussian1"]) == np.shape(sums["identity"])
    total = 100 * (1 - np.sum(sums["gaussian1"]) / np.sum(sums["identity"]))
    assert total == pytest.approx(np.mean([row["score_mse"] for row in found.rows["gaussian1"]]), abs=3)


def _scored(**methods: tuple[float, float, float]) -> Scored:
    keys = ("share_of_limit", "share_of_ceiling", "truth_score_mse")
    rows = {name: [{**dict(zip(keys, v, strict=True)), "score_ssim": 10.0}] for name, v in methods.items()}
    return Scored(60, 90, rows=rows)


def test_the_best_is_good_on_both_scores_and_no_worse_than_the_input_against_the_truth():
    assert choose_best([_scored(a=(0.9, -1.0, 50), b=(0.6, 0.6, 50), oracle=(1, 1, 1))]) == "b"
    assert choose_best([_scored(a=(0.9, 0.9, -5), b=(0.6, 0.6, 50))]) == "b"
    assert choose_best([_scored(a=(0.9, 0.9, -5))]) == "a"
    # Without a noise-free image the ceiling and the truth are unknown.
    nan = float("nan")
    assert choose_best([_scored(a=(0.5, nan, nan), b=(0.4, nan, nan))]) == "a"


def test_the_options_name_the_methods_that_there_are():
    for name in METHODS:
        assert RunConfig(methods=(name,)).methods == (name,)
    with pytest.raises(ValueError, match=r"settings names \['median'\]"):
        RunConfig(settings={"median": {}})


def test_other_options_are_refused_by_name_and_force_starts_clean(quick: RunConfig, tmp_path: Path):
    config = dataclasses.replace(quick, output=tmp_path / "run")
    run(config)
    other = dataclasses.replace(config, settings={"gaussian1": {"epochs": 2}})
    with pytest.raises(ValueError, match=r"holds a run with other options \(settings differ\)"):
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


def test_training_and_validation_share_no_patient(folders: tuple[Path, Path], tmp_path: Path):
    config = RunConfig(output=tmp_path / "run", train_studies=folders[0], validation_studies=folders[0])
    with pytest.raises(ValueError, match="is among the training and the validation studies"):
        run(config)
    # Two scans of one patient stay on one side, whatever their folders are called.
    for index, name in enumerate(("ann_1", "ann_2", "bob")):
        study = make_study(index)
        study.parameters = {"patient": name.split("_")[0]}
        save_study(tmp_path / "scans" / name, study)
    config = RunConfig(
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
        run(RunConfig(output=tmp_path / "run", train_studies=folders[0] / "made_0"))


@pytest.mark.parametrize("method", ["gaussian1", "nlm", "diffusion_sdedit"])
def test_a_study_without_its_target_names_the_file(method: str, folders: tuple[Path, Path], tmp_path: Path):
    for name in ("made_0", "made_1"):
        study = load_study(folders[0] / name)
        del study.exposures[90]
        save_study(tmp_path / "studies" / name, study)
    config = RunConfig(
        output=tmp_path / "run",
        train_studies=tmp_path / "studies",
        methods=(method,),
        settings={"diffusion_sdedit": TINY | {"t0": [5]}},
    )
    with pytest.raises((ValueError, OSError), match="PET_90"):
        run(config)


@pytest.mark.slow
def test_simulated_phantoms_go_from_nothing_to_two_reports(tmp_path: Path):
    config = RunConfig(
        output=tmp_path / "run",
        train_phantoms=1,
        validation_phantoms=1,
        phantom_spacings=((5.0, 5.0, 6.0),),
        also_seconds=(30,),
        methods=("gaussian1",),
        settings={"gaussian1": {"epochs": 1}},
        simulator={"n_angles": 24, "iterations": 1},
    )
    run(config)
    report = score(ScoreConfig(config.output, test_phantoms=1))
    assert report == config.output / "scored" / "phantoms" / "report.html"
    rows = json.loads((report.parent / "metrics.json").read_text())["methods"]
    found = {(row["seconds"], row["method"]): row["score_mse"] for row in rows}
    assert all(np.isfinite(found[seconds, "gaussian1"]) for seconds in (60, 30))
    assert "From 30 s: against the 90 s image" in report.read_text()


@pytest.mark.slow
def test_two_processes_make_one_run(folders: tuple[Path, Path], tmp_path: Path):
    settings = {"gaussian1": {"epochs": 1}, "diffusion_conditional": TINY | {"batch_size": 2}}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "medaccel.cli", "restoration", "run", "--output", str(tmp_path / "run")]
    command += ["--train_studies", str(folders[0]), "--methods", "[gaussian1,diffusion_conditional]"]
    command += ["--settings", json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=400, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("gaussian1: fitted in") == 1  # one process speaks, and writes
    assert score(ScoreConfig(tmp_path / "run", test_studies=folders[1])).exists()


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on(folders: tuple[Path, Path], tmp_path: Path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "medaccel.cli", "restoration", "run", "--output", str(output)]
    command += ["--train_studies", str(folders[0])]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=heed_sigint,
    )
    deadline = time.monotonic() + 90
    while not (output / "checkpoints" / "gaussian1.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert not (output / "report.html").exists()
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "resuming the run that is there" in result.stdout
    whole = RunConfig(output=tmp_path / "whole", train_studies=folders[0])
    run(whole)
    assert (output / "metrics.csv").read_bytes() == (whole.output / "metrics.csv").read_bytes()


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
    assert main(["restoration", "run", "--output", str(tmp_path / "run"), *options]) == 2
    assert not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert "medaccel: error:" in error
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
def test_bad_options_of_a_score_end_in_a_sentence(what: str, quick: RunConfig, capsys: pytest.CaptureFixture[str]):
    options, sentence = SCORE_BAD[what]
    assert main(["restoration", "score", str(quick.output), *options]) == 2
    error = capsys.readouterr().err
    assert "medaccel: error:" in error
    assert sentence in error
