# SPDX-License-Identifier: Apache-2.0
"""Settings: what presets say, and what is refused."""

import json
from typing import Any

import pytest

from medaccel.segmentation.model.presets import PRESETS, make_settings
from medaccel.training.fit import TRAINING


def test_published_presets():
    spleen, lung = make_settings({"preset": "Task09_Spleen"}), make_settings({"preset": "Task06_Lung"})
    assert (spleen["spacing"], spleen["window"]) == ([1.5, 1.5, 2.0], [-57.0, 164.0])
    assert spleen["roi_size"] == lung["roi_size"] == [96, 96, 96]
    assert (lung["window"], lung["positive"], lung["negative"]) == ([-1000.0, 1000.0], 1.0, 1.0)
    # A spleen has a side.
    assert 0 not in spleen["flip_axes"]


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_plain_and_whole(name: str):
    settings = make_settings({"preset": name, "steps": 7, "spacing": (2, 2, 3)})
    assert json.loads(json.dumps(settings)) == settings == make_settings(settings)
    assert set(TRAINING) < set(settings)
    assert (settings["steps"], settings["spacing"], settings["ema_decay"]) == (7, [2.0, 2.0, 3.0], 0.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"preset": "liver"}, "preset is 'liver'; expected one of generic, Task06_Lung"),
        ({"step": 3}, "settings names step; expected some of accelerator, "),
        ({"steps": "many"}, "steps is 'many'; expected a whole number"),
        ({"steps": True}, "steps is True; expected a whole number"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'; expected a number"),
        ({"learning_rate": 0.0}, "learning_rate is 0; expected above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; expected a number"),
        ({"foreground_prior": 0.5}, "foreground_prior is 0.5; expected a probability"),
        ({"precision": 16}, "precision is 16; expected a name"),
        ({"spacing": [1.0, 1.0]}, r"spacing is \[1.0, 1.0\]; expected 3 numbers"),
        ({"spacing": [1.0, 1.0, 0.0]}, r"spacing is \[1.0, 1.0, 0.0\]; expected mm above 0"),
        ({"window": [100, -100]}, r"window is \[100.0, -100.0\]; expected two increasing"),
        ({"roi_size": [64, 64, 40]}, r"roi_size is \[64, 64, 40\]; expected multiples of 32"),
        ({"roi_size": [32, 32, 32]}, "expected multiples of 32, one of them at least 64"),
        ({"roi_size": [64, 64, 1.5]}, "roi_size is 1.5; expected a whole number"),
        ({"overlap": 1.0}, "overlap is 1; expected a share from 0 to below 1"),
        ({"positive": 0, "negative": 0}, "positive is 0 and negative 0; expected parts"),
        ({"flip_axes": [3]}, r"flip_axes is \[3\]; expected some of 0, 1, 2"),
        ({"flip_axes": 0}, "flip_axes is 0; expected a list of numbers"),
        ({"rotate90": 1}, "rotate90 is 1; expected true or false"),
        ({"rotate": -5.0}, "rotate is -5; expected >= 0"),
        ({"zoom": 1.0}, "zoom is 1; expected a share below 1"),
        ({"rotate90": True, "roi_size": [64, 32, 32]}, "rotate90 is on and roi_size"),
        ({"feature_size": 20}, "feature_size is 20; expected a multiple of 12"),
        ({"cache": "disk"}, "cache is 'disk'; expected one of memory, none"),
        ({"keep_largest": -1}, "keep_largest is -1; expected >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_settings(overrides)
