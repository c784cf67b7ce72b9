# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of methods: they give the method back; others are refused, whatever is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medaccel.restoration.apply import TRAINING_RANGE, apply
from medaccel.restoration.methods import load_method
from medaccel.restoration.methods.base import RestorationTask
from tests.restoration.made import Smoother, checkpoint, nifti

pytestmark = pytest.mark.usefixtures("known_methods")


# --- Checkpoints ---


def test_a_checkpoint_gives_the_method_back(tmp_path: Path) -> None:
    method = load_method(checkpoint(tmp_path))
    assert type(method) is Smoother
    assert method.task == RestorationTask((60, 30), 90)
    assert method.settings == {"sigma": 1.0}
    assert method.fitted.parameters[TRAINING_RANGE]["seconds"] == [60, 30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "a checkpoint of format 2; expected 1"),
        ({"method": "magic"}, "method 'magic' is unknown; expected one of gaussian1,"),
        ({"state": None}, "'state' is a NoneType in this checkpoint; expected a dict"),
        ({"input_seconds": [120]}, "expected 0 < input < target"),
        ({"settings": {"depth": 3}}, r"settings \['depth'\] are unknown"),
        ({"fitted": {"speed": 1}}, "unexpected keyword argument 'speed'"),
        ({"state": {"weight": torch.ones(3)}}, "size mismatch"),
        ({"state": {}}, "not a checkpoint of 'smoother' that can be used .*weight"),
    ],
)
def test_another_checkpoint_is_told_with_its_file(tmp_path: Path, change: dict, message: str) -> None:
    path = checkpoint(tmp_path)
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(ValueError, match=rf"smoother\.pt: .*{message}"):
        load_method(path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"format": 1, "method": "smoother"}, path)
    with pytest.raises(ValueError, match=r"x\.pt: 'input_seconds' is missing in this checkpoint; expected a list"):
        load_method(path)


@pytest.mark.parametrize("kept", [0, 10, 300, -20])
def test_a_damaged_checkpoint_is_told(tmp_path: Path, kept: int) -> None:
    path = checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"smoother\.pt: not a checkpoint that can be read"):
        load_method(path)


def test_a_file_with_code_or_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(RestorationTask(), path)  # a class, which loading would have to run
    with pytest.raises(ValueError, match=r"x\.pt: not a checkpoint that can be read"):
        load_method(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"x\.pt: holds a list; expected a method's checkpoint"):
        load_method(path)
    with pytest.raises(FileNotFoundError):
        load_method(tmp_path / "none.pt")


def test_a_flipped_byte_of_a_checkpoint_is_told(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    whole = path.read_bytes()
    weight = whole.index(np.ones(2, np.float32).tobytes())
    for position in range(weight, weight + 8):
        content = bytearray(whole)
        content[position] ^= 0x40
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"smoother\.pt: not a checkpoint that can be read"):
            apply(path, nifti(tmp_path / f"pet{position}.nii"), tmp_path / "out.nii", progress=False)
