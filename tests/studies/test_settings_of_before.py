# SPDX-License-Identifier: Apache-2.0
"""Runs and checkpoints of the version before settings were dataclasses: before.json holds what its code wrote."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from medaccel.cli import parse
from medaccel.pretraining.config import PretrainingConfig
from medaccel.pretraining.tasks import TASKS
from medaccel.restoration.config import DEMO_RUN, RestorationConfig, RunConfig
from medaccel.restoration.methods import method_class
from medaccel.restoration.methods.base import RestorationTask
from medaccel.segmentation.config import SegmentationConfig
from medaccel.segmentation.model.presets import PRESETS, make_settings

BEFORE: dict[str, Any] = json.loads((Path(__file__).parent / "before.json").read_text(encoding="utf-8"))
CONFIGS = Path(__file__).parents[2] / "configs"
KINDS: dict[str, Any] = {
    "restoration run": RestorationConfig,
    "pretraining run": PretrainingConfig,
    "segmentation run": SegmentationConfig,
}


def written(config: Any) -> str:
    return yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True)


@pytest.fixture(autouse=True)
def _where_the_paths_lead_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")


@pytest.mark.parametrize("row", BEFORE["options"])
def test_a_record_is_read_and_written_as_it_was(row: dict[str, Any]):
    values = yaml.safe_load(row["record"])
    kind = KINDS[row["command"]]
    config = kind(**values) if kind is SegmentationConfig else kind.of(Path("run"), values)
    assert written(config) == row["record"]
    assert config.digest() == row["digest"]


@pytest.mark.parametrize("row", [row for row in BEFORE["options"] if row["config"] != "demo"])
def test_the_same_command_is_the_same_run(row: dict[str, Any], tmp_path: Path):
    words = row["command"].split()
    if row["config"] is not None:
        path = CONFIGS / row["config"] if row["config"].endswith(".yaml") else tmp_path / "x.yaml"
        if path.parent == tmp_path:
            path.write_text(row["config"], encoding="utf-8")
        words += ["--config", str(path)]
    found = parse([*words, *row["arguments"]])[1].as_dict()
    options = {name: value for name, value in found.items() if name not in ("config", "force", "resume", "cell")}
    config = KINDS[row["command"]](**options)
    assert written(config) == row["record"]
    assert config.digest() == row["digest"]


def test_the_demo_is_the_same_run():
    row = next(row for row in BEFORE["options"] if row["config"] == "demo")
    # The U-Net's row, with the package's weights, is new; the others are what they were.
    others = tuple(name for name in DEMO_RUN.methods if name != "unet")
    settings = {name: own for name, own in DEMO_RUN.plain()["settings"].items() if name != "unet"}
    before = replace(DEMO_RUN, methods=others, settings=settings)
    assert (written(before), before.digest()) == (row["record"], row["digest"])
    assert RunConfig is RestorationConfig


@pytest.mark.parametrize("name", BEFORE["methods"])
def test_a_methods_settings_are_those_of_its_checkpoints(name: str):
    before = BEFORE["methods"][name]
    now = method_class(name)(RestorationTask()).settings
    renamed = method_class(name).renamed
    assert now == {renamed.get(key, key): value for key, value in before.items()}
    assert method_class(name)(RestorationTask(), before).settings == now
    assert json.loads(json.dumps(now)) == now


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_settings_are_what_they_were(name: str):
    before = BEFORE["tasks"][name]
    assert TASKS[name]({}, (64, 64, 32)).settings == TASKS[name](before, (64, 64, 32)).settings == before


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_settings_are_those_of_its_checkpoints(name: str):
    before = BEFORE["presets"][name]
    assert json.dumps(make_settings({"preset": name})) == json.dumps(before)
    assert make_settings(before) == before
