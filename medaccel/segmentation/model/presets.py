# SPDX-License-Identifier: Apache-2.0
"""Defines the settings of a segmentation network: presets of tasks, and every setting that can be overridden.

`Task06_Lung` and `Task09_Spleen` have the published settings of MONAI's networks: the spleen as in MONAI's tutorial
(spleen_segmentation_3d: 1.5 × 1.5 × 2 mm, −57 … 164 HU, crops of 96³ voxels of which half are centred on the spleen);
the lungs' window is that of the Swin UNETR's pretraining (−1000 … 1000 HU). The `phantom_` ones are small
enough for one CPU core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medaccel.segmentation.settings import CACHES, SegmentationSettings
from medaccel.studies.settings import TrainingSettings
from medaccel.studies.typed import converted, nearest

#: The network halves sizes five times, so they are multiples of this.
MULTIPLE = 32
# The longest axis is at least this long: of 32³ one voxel would be left, which instance normalization makes 0.
_LONGEST = 64


# A step of two such crops takes about half a second on one core.
_PHANTOM: dict[str, Any] = {
    "roi_size": (64, 32, 32),
    "overlap": 0.1,
    "sw_batch_size": 1,
    "include_background": False,
    "batch_dice": True,
    "feature_size": 12,
    "steps_per_epoch": 25,
}
PRESETS: Mapping[str, SegmentationSettings] = {
    "generic": SegmentationSettings(),
    "Task06_Lung": SegmentationSettings(spacing=(1.5, 1.5, 2.0), flip_axes=(0, 1, 2), rotate90=True),
    "Task09_Spleen": SegmentationSettings(window=(-57.0, 164.0), keep_largest=1),
    "phantom_spleen": SegmentationSettings(
        spacing=(6.0, 6.0, 6.0),
        window=(-160.0, 240.0),
        foreground_prior=0.02,
        keep_largest=1,
        validate_every=100,
        validation_cases=8,
        steps=400,
        learning_rate=4e-3,
        **_PHANTOM,
    ),
    "phantom_lung": SegmentationSettings(
        spacing=(4.0, 4.0, 4.0),
        window=(-1000.0, 400.0),
        positive=2.0,
        flip_axes=(0, 1, 2),
        foreground_prior=0.005,
        validate_every=250,
        validation_cases=6,
        steps=1500,
        learning_rate=2e-3,  # 4e-3 loses what was learned
        **_PHANTOM,
    ),
}


def make_settings(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings: a preset's, those of the training, and the overrides.

    Args:
        overrides: some of `SegmentationSettings`, by name. What this function returned gives the same again.

    Returns:
        Plain values, lists for tuples.

    Raises:
        ValueError: a preset or name is unknown, or a value has another kind or is out of range.
    """
    name = overrides.get("preset", "generic")
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}{nearest(str(name), PRESETS)}")
    preset = PRESETS[name]
    unknown = sorted(set(overrides) - set(preset.option_names()))
    if unknown:
        raise ValueError(f"settings{preset.unknown(unknown, overrides)}")
    settings: dict[str, Any] = {"preset": name}
    for key in preset.option_names()[1:]:
        default = getattr(preset, key)
        settings[key] = _checked(key, overrides.get(key, default), default)
    _check_ranges(settings)
    converted("settings", {key: settings[key] for key in TrainingSettings.option_names()}, TrainingSettings)
    return settings


def _checked(name: str, value: Any, default: Any) -> Any:
    """Converts a value to the plain type of its default; raises ValueError for another kind."""
    if name == "gradient_clip" and value is None:
        return None
    if isinstance(default, tuple):
        kind = float if default and isinstance(default[0], float) else int
        count = {"spacing": 3, "window": 2, "roi_size": 3}.get(name)
        if not isinstance(value, list | tuple) or (count is not None and len(value) != count):
            raise ValueError(f"{name} is {value!r}; expected {'a list of' if count is None else count} numbers")
        return [_number(name, entry, kind) for entry in value]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; expected true or false")
        return value
    if isinstance(default, str):
        # torch has precisions and accelerators of its own; Lightning says which ones.
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}; expected a name")
        return value
    return _number(name, value, type(default))


def _number(name: str, value: Any, kind: type) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is int:
        if not whole:
            raise ValueError(f"{name} is {value!r}; expected a whole number")
        return value
    if not (whole or isinstance(value, float)) or not abs(value) < float("inf"):
        raise ValueError(f"{name} is {value!r}; expected a number")
    return float(value)


def _check_ranges(s: Mapping[str, Any]) -> None:
    size = s["roi_size"]
    if any(n < MULTIPLE or n % MULTIPLE for n in size) or max(size) < _LONGEST:
        raise ValueError(f"roi_size is {size}; expected multiples of {MULTIPLE}, one of them at least {_LONGEST}")
    if not all(step > 0 for step in s["spacing"]):
        raise ValueError(f"spacing is {s['spacing']}; expected mm above 0")
    if not s["window"][0] < s["window"][1]:
        raise ValueError(f"window is {s['window']}; expected two increasing numbers of HU")
    if not 0 <= s["overlap"] < 1:
        raise ValueError(f"overlap is {s['overlap']:g}; expected a share from 0 to below 1")
    if min(s["positive"], s["negative"]) < 0 or s["positive"] + s["negative"] == 0:
        raise ValueError(
            f"positive is {s['positive']:g} and negative {s['negative']:g}; expected parts >= 0, one of them above 0"
        )
    if set(s["flip_axes"]) - {0, 1, 2}:
        raise ValueError(f"flip_axes is {s['flip_axes']}; expected some of 0, 1, 2")
    if s["rotate90"] and s["roi_size"][0] != s["roi_size"][1]:
        raise ValueError(f"rotate90 is on and roi_size {s['roi_size']}; expected the first two equal")
    if s["feature_size"] < 12 or s["feature_size"] % 12:
        raise ValueError(f"feature_size is {s['feature_size']}; expected a multiple of 12")
    if s["cache"] not in CACHES:
        raise ValueError(f"cache is {s['cache']!r}; expected one of {', '.join(CACHES)}")
    if s["zoom"] >= 1:
        raise ValueError(f"zoom is {s['zoom']:g}; expected a share below 1")
    for name in ("rotate", "zoom", "intensity_scale", "intensity_shift", "noise", "keep_largest", "validation_cases"):
        if s[name] < 0:
            raise ValueError(f"{name} is {s[name]:g}; expected >= 0")
    for name in ("steps", "steps_per_epoch", "batch_size", "sw_batch_size", "validate_every"):
        if s[name] < 1:
            raise ValueError(f"{name} is {s[name]}; expected at least 1")
    if not 0 <= s["foreground_prior"] < 0.5:
        raise ValueError(f"foreground_prior is {s['foreground_prior']:g}; expected a probability from 0 to below 0.5")
    for name in ("learning_rate", "foreground_weight"):
        if not s[name] > 0:
            raise ValueError(f"{name} is {s[name]:g}; expected above 0")
