# SPDX-License-Identifier: Apache-2.0
"""A run from scans to weights: what it leaves, how it is taken up, what it refuses."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medaccel.data import write_text
from medaccel.nets import SwinUNETR, load_pretrained
from medaccel.phantoms.ct_dataset import write_pool
from medaccel.pretraining import evaluation
from medaccel.pretraining.config import PretrainingConfig
from medaccel.pretraining.pipeline import run, weights
from tests.pretraining.made import ROI, SPACING, TRAINER

QUICK = {"steps": 2, "steps_per_epoch": 1}


def _config(output: Path, **options: Any) -> PretrainingConfig:
    base: dict[str, Any] = {
        "output": output,
        "phantoms": 4,
        "phantom_spacing": SPACING,
        "spacing": SPACING,
        "roi_size": ROI,
        "held_out": 0.25,
        "network": {"feature_size": 12},
        "trainer": TRAINER | QUICK,
    }
    return PretrainingConfig(**(base | options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> PretrainingConfig:
    config = _config(tmp_path_factory.mktemp("runs") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "PAIRS", 4)
        patch.setattr(evaluation.evaluate, "__kwdefaults__", evaluation.evaluate.__kwdefaults__ | {"pairs": 4})
        run(config, say=lambda _: None)
    return config


def test_a_run_leaves_its_options_scans_figures_report_and_weights(finished: PretrainingConfig):
    folder = finished.output
    assert yaml.safe_load((folder / "config.yaml").read_text()) == finished.plain()
    scans = json.loads((folder / "scans.json").read_text())
    assert {name: len(scans[name]) for name in ("training", "held_out", "skipped")} == {
        "training": 3,
        "held_out": 1,
        "skipped": 0,
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["held_out"]) == {"instance", "pixel"}
    assert metrics["tasks"] == {"instance": 1.0, "pixel": 1.0}
    assert len(metrics["losses"]["mutual_information_bound"]) == 2
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    assert header.split(",")[0] == "epoch"
    assert len(rows) == 2
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png") == 3  # losses, bound, views
    assert "instance_pixel" in report


def test_the_weights_are_read_by_load_pretrained_and_say_what_they_are(finished: PretrainingConfig):
    path = weights(finished.output)
    content = torch.load(path, weights_only=True)
    assert content["pretraining"]["options"] == finished.plain()
    assert not any(name.startswith("out.") for name in content["state_dict"])
    net = SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    report = load_pretrained(net, path)
    assert not report.skipped
    assert len(report.loaded) == len(content["state_dict"]) > 100


def test_a_finished_run_is_left_as_it_is(finished: PretrainingConfig):
    before = {p: p.stat().st_mtime_ns for p in finished.output.rglob("*") if p.is_file()}
    said: list[str] = []
    report = run(finished, say=said.append)
    assert report == finished.output / "report.html"
    assert said == [f"{finished.output}: pretrained before"]
    assert {p: p.stat().st_mtime_ns for p in finished.output.rglob("*") if p.is_file()} == before


def test_a_run_that_lost_its_last_files_is_finished_without_training_anew(
    finished: PretrainingConfig, monkeypatch: pytest.MonkeyPatch
):
    patched = evaluation.evaluate.__kwdefaults__ | {"pairs": 4}
    monkeypatch.setattr(evaluation.evaluate, "__kwdefaults__", patched)
    metrics = json.loads((finished.output / "metrics.json").read_text())
    before = torch.load(weights(finished.output), weights_only=True)["state_dict"]
    for name in ("report.html", "metrics.json", "checkpoints/weights.pt"):
        (finished.output / name).unlink()
    checkpoint = (finished.output / "training" / "last.ckpt").stat().st_mtime_ns
    said: list[str] = []
    run(finished, resume=True, say=said.append)
    assert "resuming the run that is there" in said[0]
    assert (finished.output / "training" / "last.ckpt").stat().st_mtime_ns == checkpoint
    assert json.loads((finished.output / "metrics.json").read_text()) == metrics
    after = torch.load(weights(finished.output), weights_only=True)["state_dict"]
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_folder_with_another_run_or_something_else_is_refused(finished: PretrainingConfig, tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds a run with other options \(seed differ\)"):
        run(dataclasses.replace(finished, seed=1), say=lambda _: None)
    with pytest.raises(ValueError, match="holds no run to resume"):
        run(_config(tmp_path / "none"), resume=True, say=lambda _: None)
    (tmp_path / "file").write_text("something")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(_config(tmp_path), say=lambda _: None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("- a list")
    with pytest.raises(ValueError, match="holds no options; --force starts clean"):
        run(_config(tmp_path / "broken"), say=lambda _: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "nvidia"}, "rotation: roi_size is .*expected as many voxels"),
        ({"settings": {"pixel": {"level": "decoder9"}}}, "pixel: level is 'decoder9'; expected one of"),
        ({"network": {"colour": 1}}, r"network is \{'colour': 1\}; expected options of SwinUNETR"),
        ({"trainer": {"colour": 1}}, r"trainer names \['colour'\]; expected some of"),
        ({"trainer": {"cache": "none"}}, "trainer: cache is 'none'; expected 'memory' or 'disk'"),
        ({"trainer": {"steps": 0}}, "trainer: steps is 0; expected a whole number >= 1"),
        ({"trainer": {"steps": 7}}, "trainer: steps is 7; expected a multiple of steps_per_epoch"),
    ],
)
def test_options_are_refused_before_anything_is_made(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        run(_config(tmp_path / "run", **options), say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_scans_that_are_none_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(_config(tmp_path / "run", scans=(tmp_path / "missing",)), say=lambda _: None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no CT scans"):
        run(_config(tmp_path / "run2", scans=(tmp_path / "empty",)), say=lambda _: None)


@pytest.mark.parametrize("mistake", ["a mistyped folder", "a setting", "a device", "one scan alone"])
def test_force_keeps_the_earlier_run_where_the_new_one_comes_to_nothing(mistake: str, tmp_path: Path):
    folder = tmp_path / "run"
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "last.ckpt").write_bytes(b"of another run")
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 9}))
    write_pool(tmp_path / "scan", 1, spacing=SPACING)
    options: dict[str, dict[str, Any]] = {
        "a mistyped folder": {"scans": (tmp_path / "missing",)},
        "a setting": {"trainer": TRAINER | {"learning_rate": "abc"}},
        "a device": {"trainer": TRAINER | {"accelerator": "tpu"}},
        "one scan alone": {"scans": (tmp_path / "scan",)},  # is known after the start
    }
    said: list[str] = []
    with pytest.raises((ValueError, FileNotFoundError)):
        run(_config(folder, **options[mistake]), force=True, say=said.append)
    assert (folder / "training" / "last.ckpt").read_bytes() == b"of another run"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 9}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "scan"]
    assert (mistake == "one scan alone") == any("starting clean" in line for line in said)


def test_a_scan_that_changed_is_named(finished: PretrainingConfig, tmp_path: Path):
    write_pool(tmp_path / "scans", 3, spacing=SPACING)
    config = _config(tmp_path / "run", scans=(tmp_path / "scans",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medaccel.training.fit.train", _stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            run(config, say=lambda _: None)
        first, second = sorted((tmp_path / "scans").glob("*.nii.gz"))[:2]
        os.utime(first)  # a new time alone is no change
        with pytest.raises(RuntimeError, match="stopped"):
            run(config, say=lambda _: None)
        first.write_bytes(second.read_bytes())
        with pytest.raises(ValueError, match=rf"a run of other data: .*{first.name} has changed; choose another"):
            run(config, say=lambda _: None)
    write_text(config.output / "report.html", "the report of a finished run")
    with pytest.raises(ValueError, match=rf"{first.name} has changed"):
        run(config, say=lambda _: None)


def _stopped(*_: Any, **__: Any) -> None:
    raise RuntimeError("stopped")
