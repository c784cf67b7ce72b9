# SPDX-License-Identifier: Apache-2.0
"""Options that make no sense are refused in a sentence, before anything is read or made."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from medaccel.pretraining.config import PretrainingConfig
from medaccel.pretraining.names import PRESETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "moco"}, "preset is 'moco'; expected one of nvidia, instance, instance_pixel"),
        ({"tasks": {"jigsaw": 1.0}}, r"tasks names \['jigsaw'\]; expected some of inpainting"),
        ({"tasks": {"pixel": 0.0}}, "tasks: the weight of pixel is 0.0; expected a number above 0"),
        ({"settings": {"jigsaw": {}}}, r"settings names \['jigsaw'\]; expected some of inpainting"),
        ({"roi_size": (64, 64, 48)}, r"roi_size is \[64, 64, 48\]; expected three multiples of 32"),
        ({"roi_size": (32, 32, 32)}, r"roi_size is \[32, 32, 32\]; expected .* one of them 64 or more"),
        ({"spacing": (1.0, 1.0, 0.0)}, r"spacing is \[1.0, 1.0, 0.0\]; expected three sizes in mm above 0"),
        ({"phantom_spacing": (1.0, -1.0, 2.0)}, "phantom_spacing is .*expected three sizes in mm above 0"),
        ({"windows": ()}, "windows is empty; expected at least one pair of HU"),
        ({"windows": ((100.0, -100.0),)}, r"windows holds \[100.0, -100.0\]; expected two increasing numbers"),
        ({"phantoms": 1}, "phantoms is 1 and there are no scans; expected at least 2"),
        ({"held_out": 1.0}, r"held_out is 1.0; expected a share in \(0, 1\)"),
        ({"skip_limit": 1.5}, "skip_limit is 1.5; expected a share from 0 to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        PretrainingConfig(**options)


def test_the_written_options_give_the_same_run_wherever_it_lies(tmp_path: Path):
    config = PretrainingConfig(
        output=tmp_path,
        scans=(tmp_path / "ct",),
        windows=((-160.0, 240.0),),
        settings={"pixel": {"level": "encoder2"}},
    )
    again = PretrainingConfig.of(tmp_path / "moved", yaml.safe_load(yaml.safe_dump(config.plain())))
    assert again.plain() == config.plain()
    assert again.digest() == config.digest()
    assert PretrainingConfig(seed=1).digest() != PretrainingConfig().digest()
    with pytest.raises(ValueError, match=r"config.yaml: holds options that are unknown: colour"):
        PretrainingConfig.of(tmp_path, config.plain() | {"colour": 1})


def test_tasks_take_the_presets_place():
    assert PretrainingConfig(preset="nvidia").weights == PRESETS["nvidia"]
    config = PretrainingConfig(preset="nvidia", tasks={"pixel": 0.5, "rotation": 2.0})
    assert config.weights == {"pixel": 0.5, "rotation": 2.0}
    assert config.title == "pixel + rotation"


@pytest.mark.parametrize("name", ["pretraining_small", "pretraining_full"])
def test_the_files_in_configs_are_options_that_make_sense(name: str):
    from jsonargparse import ArgumentParser

    from medaccel.pretraining.fit import settings_of
    from medaccel.pretraining.tasks import make_tasks

    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PretrainingConfig)
    values = parser.parse_args([f"--config={ROOT / 'configs' / f'{name}.yaml'}"]).as_dict()
    del values["config"]
    config = PretrainingConfig(**values)
    for preset in PRESETS:
        make_tasks(list(PRESETS[preset]), config.settings, config.roi_size)
    assert settings_of(config.trainer)["steps"] > 0
