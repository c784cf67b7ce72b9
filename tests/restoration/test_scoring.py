# SPDX-License-Identifier: Apache-2.0
"""A study's scores are reused if they are whole, and computed again if they are damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medaccel.restoration.methods import make_method
from medaccel.restoration.methods.base import RestorationTask
from medaccel.restoration.methods.networks.patches import Patches
from medaccel.restoration.scoring import Scorer, read_volume
from medaccel.restoration.study import save_study
from tests.restoration.test_gaussian_methods import make_study


def test_damaged_rows_and_volumes_are_made_again_to_the_same_figures(tmp_path: Path):
    study = tmp_path / "made_0"
    save_study(study, make_study(0))
    method = make_method("gaussian1", RestorationTask(), {"epochs": 1})
    method.fit([study], [], folder=tmp_path / "fit", progress=False)
    scorer = Scorer({"gaussian1": method}, tmp_path / "scored", progress=False)
    before = scorer.score([study], 60, 90)
    row, volume = (tmp_path / "scored" / name for name in ("rows/made_0_60s.json", "volumes/made_0_60s_gaussian1.pt"))
    kept, restored = {path: path.read_bytes() for path in (row, volume)}, read_volume(volume)
    again = scorer.score([study], 60, 90)
    assert again.times == before.times  # nothing was restored anew
    flipped = bytearray(kept[volume])
    flipped[len(flipped) // 2] ^= 1
    for path, content in (
        (row, kept[row][: len(kept[row]) // 2]),
        (row, b""),
        (row, b"[]"),
        (row, kept[row].replace(b'"gaussian1": {', b'"gaussian2": {', 1)),
        (row, b'{"rows": {"identity": {"mse": "x"}}, "noise": {}, "times": {}, "blocks": {}}'),
        (volume, kept[volume][: len(kept[volume]) // 2]),
        (volume, b""),
        (volume, bytes(flipped)),
    ):
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=rf"{path.name}: .*; the study is scored again"):
            again = scorer.score([study], 60, 90)
        assert again.rows == before.rows
        np.testing.assert_array_equal(read_volume(volume), restored)


def test_a_damaged_cache_of_prepared_studies_is_made_again(tmp_path: Path):
    study, cache = tmp_path / "made_0", tmp_path / "cache"
    save_study(study, make_study(0))

    def first_patch() -> dict[str, Any]:
        return Patches([study], RestorationTask(), roi_size=(16, 16, 16), cache="disk", cache_folder=cache)[0]

    expected = first_patch()
    (path,) = cache.glob("*.pt")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x40
    for content in (bytes(flipped), whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        found = first_patch()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True)
