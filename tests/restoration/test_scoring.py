# SPDX-License-Identifier: Apache-2.0
"""What scoring keeps of a study is taken up where it is whole, and made again where it is damaged."""

from pathlib import Path

import numpy as np
import pytest

from medaccel.restoration.methods import make_method
from medaccel.restoration.methods.base import Task
from medaccel.restoration.scoring import Scorer, read_volume
from medaccel.restoration.study import save_study
from tests.restoration.test_gaussian_methods import make_study


def test_damaged_rows_and_volumes_are_made_again_to_the_same_figures(tmp_path: Path):
    study = tmp_path / "made_0"
    save_study(study, make_study(0))
    method = make_method("gaussian1", Task(), {"epochs": 1})
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
