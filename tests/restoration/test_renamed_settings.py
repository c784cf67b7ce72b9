# SPDX-License-Identifier: Apache-2.0
"""Settings under the names that they had in earlier versions: configs and checkpoints that use those still load."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medaccel.restoration import config
from medaccel.restoration.config import RestorationConfig
from medaccel.restoration.methods import METHODS, load_method, make_method, method_class
from medaccel.restoration.methods.base import RestorationRequest, RestorationTask
from medaccel.restoration.pipeline import check, settings_of

RENAMED = [(name, old, new) for name in METHODS for old, new in method_class(name).renamed.items()]
TINY: dict[str, Any] = {"channels": [8], "shuffle": 1, "roi_size": [8, 8, 8], "steps": 1, "steps_per_epoch": 1}
SDEDIT = TINY | {"t0": [5], "samples": 2, "sampling_steps": 1, "accelerator": "cpu"}


def test_every_renamed_setting_is_listed():
    assert ("swin_unetr", "give_back", "residual_shrinkage") in RENAMED
    assert ("diffusion_sdedit", "give_back", "residual_shrinkage") in RENAMED
    for name, old, new in RENAMED:
        assert old not in method_class(name).defaults
        assert new in method_class(name).defaults


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_an_old_name_sets_what_the_new_one_does(name: str, old: str, new: str):
    settings = make_method(name, RestorationTask(), {old: 0.75}).settings
    assert settings == make_method(name, RestorationTask(), {new: 0.75}).settings
    assert settings[new] == 0.75


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_both_names_at_once_are_refused(name: str, old: str, new: str):
    with pytest.raises(ValueError, match=f"{name}: {old} is given beside {new}.*expected {new} alone"):
        make_method(name, RestorationTask(), {old: 0.75, new: 0.5})


def test_an_old_name_of_another_method_is_refused():
    with pytest.raises(ValueError, match=r"nlm: settings \['give_back'\] are unknown"):
        make_method("nlm", RestorationTask(), {"give_back": 1.0})


def test_a_config_with_an_old_name_is_the_run_that_it_was():
    """The options are kept as they were written, so that the digest is the old one; the methods get today's names."""
    options = RestorationConfig(
        methods=("swin_unetr", "diffusion_sdedit"),
        settings={"swin_unetr": {"give_back": 0.5}},
        trainer={"give_back": 1.25, "accelerator": "cpu"},
    )
    check(options)
    assert options.plain()["settings"] == {"swin_unetr": {"give_back": 0.5}}
    assert options.digest() == "9f9dab8eca90"  # the version before
    assert settings_of(options, "swin_unetr") == {"accelerator": "cpu", "residual_shrinkage": 0.5}
    assert settings_of(options, "diffusion_sdedit") == {"accelerator": "cpu", "residual_shrinkage": 1.25}


def test_a_checkpoint_with_an_old_name_restores_as_it_did(tmp_path: Path):
    method = make_method("diffusion_sdedit", RestorationTask(), SDEDIT | {"residual_shrinkage": 1.0})
    method.fitted.choices = {"t0": {"60": 5}}
    method.save(tmp_path / "today.pt")
    content = torch.load(tmp_path / "today.pt", weights_only=True)
    content["settings"]["give_back"] = content["settings"].pop("residual_shrinkage")
    torch.save(content, tmp_path / "before.pt")
    before, today = (load_method(tmp_path / f"{which}.pt") for which in ("before", "today"))
    assert before.settings == today.settings
    volume = np.random.default_rng(0).random((12, 12, 12)).astype(np.float32)
    assert np.array_equal(
        before.restore(RestorationRequest(volume, (4.0,) * 3)).volume,
        today.restore(RestorationRequest(volume, (4.0,) * 3)).volume,
    )


def test_the_config_class_has_its_old_name_too():
    assert config.RunConfig is RestorationConfig
