# SPDX-License-Identifier: Apache-2.0
"""Options of a segmentation study that are refused, in a sentence and before anything is removed or run."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from medaccel.cli import parse
from medaccel.segmentation.config import SegmentationConfig
from medaccel.segmentation.study import settings_of
from tests.segmentation.made import NONE, make_config, run_fake


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0, 1)}, r"runs of the seeds \[0, 1\]; expected \[0, 1, 2\], 3 runs"),
        (
            {"fractions": (0.1,), "primary": NONE},
            r"task spleen: fraction is 0.1 of 3 training cases, which leaves no",
        ),
        ({"tasks": {"spleen": {"data": "nowhere"}}}, "nowhere/dataset.json: not found"),
        ({"settings": {"stepz": 5}}, "task spleen: settings names stepz; expected some of"),
        ({"inits": ("random", "instant")}, r"inits names \['instant'\]; expected some of random, supervised, nvidia"),
        ({"weights": {"random": ["a.pt"]}}, "weights has files for 'random'; expected another name"),
        ({"weights": {"mine": []}}, r"weights.mine is \[\]; expected a list of files"),
        ({"weights": {"../x": ["a.pt"]}}, r"weights names '../x'; expected letters"),
        ({"inits": ("random", "supervised"), "primary": NONE}, "one task; expected a second one to pretrain on"),
        ({"tasks": {}}, "tasks is empty; expected at least one"),
        ({"tasks": {"liver": {}}}, "tasks.liver has no data; expected a folder, or one of the phantoms'"),
        ({"tasks": {"a/b": {"data": "x"}}}, "tasks names 'a/b'; expected letters, digits and _"),
        (
            {"tasks": {"spleen": {"by_fraction": {0.7: {"steps": 5}}}}},
            r"tasks.spleen.by_fraction names 0.7; expected some of 0.34, 1.0",
        ),
        (
            {"tasks": {"spleen": {"by_fraction": {"all": {"steps": 5}}}}},
            r"tasks.spleen.by_fraction names 'all'; expected some of 0.34, 1.0",
        ),
        ({"tasks": {"spleen": {"by_fraction": {1.0: 5}}}}, r"by_fraction is {1.0: 5}; expected settings by fraction"),
        (
            {"tasks": {"spleen": {"by_fraction": {1.0: {"feature_size": 24}}}}},
            r"by_fraction sets feature_size; expected one for all",
        ),
        ({"tasks": {"spleen": {"by_fraction": {1.0: {"stepz": 5}}}}}, "task spleen: settings names stepz"),
        (
            {"tasks": {"spleen": {"folder": "x"}}},
            r"tasks.spleen names \['folder'\]; expected some of by_fraction, check_units, data",
        ),
        ({"phantoms": {"persons": 3}}, r"phantoms names \['persons'\]; expected some of cases"),
        ({"phantoms": {"cases": 0}}, "phantoms.cases is 0; expected a whole number from 1 to 1000"),
        ({"tasks": {"spleen": {}}, "phantoms": {"cases": 6}}, "the phantom tasks: fraction is 0.1 of 2 training"),
        ({"pretraining": {"seed": 3}}, r"pretraining names \['seed'\], which the study sets itself"),
        ({"pretraining": {"held_out": 2}}, "pretraining: held_out is 2; expected a share"),
        ({"pretraining_seeds": 0}, "pretraining_seeds is 0; expected a whole number >= 1"),
        ({"seeds": (-1, 0)}, r"seeds is \[-1, 0\]; expected whole numbers >= 0"),
        ({"seeds": ()}, r"seeds is \[\]; expected at least one, each once"),
        ({"jobs": -1}, "jobs is -1; expected how many cells run at a time, or 0"),
        ({"backend": "mpi"}, "backend is 'mpi'; expected one of loky, dask, ray, sequential"),
        ({"backend": "dask"}, "backend is dask and scheduler is missing; expected its address"),
        ({"scheduler": "tcp://x:1"}, "scheduler is tcp://x:1 and backend sequential; expected dask or ray"),
        ({"select": {"init": ["nvidia"]}}, r"selection of init is \['nvidia'\]; expected some of"),
        ({"primary": {"task": "lung"}}, "primary.task is 'lung'; expected one of the study's, spleen, or"),
        ({"primary": {"init": "random", "fraction": 1.0}}, "primary compares 'random' with itself"),
        ({"primary": {"winner": 1}}, r"primary names \['winner'\]"),
        ({"illustration": {"image": "x.nii.gz"}}, "expected image and task, and organs together with label"),
        ({"illustration": {"image": "x", "task": "lung"}}, "illustration.task is 'lung'; expected one of spleen"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, task: Path, options: dict[str, Any], message: str):
    if options.get("tasks") == {"spleen": {}}:
        options = options | {"fractions": (0.1,), "primary": NONE}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_fake(make_config(tmp_path / "study", task, **options))
    assert not (tmp_path / "study" / "cells").exists()


@pytest.mark.parametrize("name", ["segmentation_small", "segmentation_full"])
def test_the_configurations_are_the_study(name: str):
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    part = "{task: [spleen], fraction: [0.2], init: [random, instance_pixel]}"
    _, arguments = parse(["segmentation", "run", "--config", str(path), "--select", part])
    options = arguments.as_dict()
    known = {field.name for field in fields(SegmentationConfig)}
    config = SegmentationConfig(**{k: v for k, v in options.items() if k in known})
    assert len(config.cells()) == 144
    assert len(config.chosen()) == 12
    assert {cell.pretraining for cell in config.chosen()} == {0, 1}
    assert config.comparison is not None
    widths = {settings_of(config, task)["feature_size"] for task in config.tasks}
    assert widths == {config.pretraining["network"]["feature_size"]}


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": {"spleen": {"data": "nowhere"}}},
        {"settings": {"learning_rate": "abc"}},
        {"settings": {"accelerator": "gpu"}},
        {"pretraining": {"scans": ["nowhere"]}},
        {"pretraining": {"network": {"feature_size": "abc"}}},
        {"weights": {"instance_pixel": ["nowhere.pt"]}},
    ],
)
@pytest.mark.slow
def test_force_removes_nothing_where_the_options_are_refused(tmp_path: Path, task: Path, options: dict[str, Any]):
    config = make_config(tmp_path / "study", task)
    run_fake(config)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError)):
        run_fake(make_config(tmp_path / "study", task, **options), force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_five_seeds_are_not_called_six(tmp_path: Path, task: Path):
    with pytest.raises(ValueError, match=r"runs of the seeds \[0, 1, 2, 3, 4\]; expected \[0, .*\], 6 runs"):
        make_config(tmp_path, task, seeds=(0, 1, 2, 3, 4), primary={"fraction": 0.34})


def test_given_weights_that_are_missing_are_named_before_anything_is_run(tmp_path: Path, task: Path):
    config = make_config(
        tmp_path / "study", task, inits=("random", "published"), weights={"published": ["a.pt"]}, primary=NONE
    )
    with pytest.raises(FileNotFoundError, match=r"weights.published: a.pt not found"):
        run_fake(config)
    assert not config.output.exists()
