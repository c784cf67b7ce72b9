# SPDX-License-Identifier: Apache-2.0
"""Runs `restoration run` and `score` on studies small enough for a test: files, figures, interruption."""

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

from medaccel.restoration import scoring
from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.methods import load_method
from medaccel.restoration.pipeline import choose_best, run, score
from medaccel.restoration.scoring import Scored
from tests.interrupts import heed_sigint
from tests.restoration.runs import GAUSSIANS, TINY


def _table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_the_folder_holds_all_that_was_promised(finished: RestorationConfig, scored: ScoreConfig):
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
def test_the_same_run_elsewhere_gives_the_same_figures(
    finished: RestorationConfig, scored: ScoreConfig, tmp_path: Path
):
    again = dataclasses.replace(finished, output=tmp_path / "again")
    run(again)
    score(dataclasses.replace(scored, run=again.output))
    for name in ("metrics.csv", "scored/test/metrics.csv", "scored/test/coverage.csv"):
        assert (again.output / name).read_bytes() == (finished.output / name).read_bytes(), name


def test_sampled_studies_limits_the_drawing_methods_alone(finished: RestorationConfig, folders: tuple[Path, Path]):
    score(ScoreConfig(finished.output, test_studies=folders[1], sampled_studies=1, samples=2, name="one"))
    content = json.loads((finished.output / "scored" / "one" / "metrics.json").read_text())
    values = {(row["method"], row["study"]): row["score_mse"] for row in content["per_study"]}
    assert values["diffusion_conditional", "made_3"] is None
    assert values["diffusion_conditional", "made_2"] is not None
    assert values["gaussian1", "made_3"] is not None


def test_realisations_of_one_patient_get_intervals_within_the_patient(
    finished: RestorationConfig, folders: tuple[Path, Path], tmp_path: Path
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


def test_a_folder_that_holds_something_else_is_left_alone(finished: RestorationConfig, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(dataclasses.replace(finished, output=tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_simulated_phantoms_go_from_nothing_to_two_reports(tmp_path: Path):
    config = RestorationConfig(
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
    whole = RestorationConfig(output=tmp_path / "whole", train_studies=folders[0])
    run(whole)
    assert (output / "metrics.csv").read_bytes() == (whole.output / "metrics.csv").read_bytes()
