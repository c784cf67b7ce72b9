# SPDX-License-Identifier: Apache-2.0
"""Splits that are fixed, nested and paired, and the grid of runs."""

import json
from pathlib import Path

import pytest

from medaccel.segmentation.protocol import (
    FRACTIONS,
    SEEDS,
    Cell,
    check_seeds,
    make_grid,
    select,
    split_cases,
    write_splits,
)

NAMES = [f"case_{number:02d}" for number in range(41)]


@pytest.mark.parametrize(("cases", "counts"), [(63, (21, 21, 21, 4)), (41, (14, 13, 14, 3))])
def test_the_decathlons_tasks_are_split_as_published(cases: int, counts: tuple[int, int, int, int]):
    split = split_cases([f"c{number:02d}" for number in range(cases)], seed=0)
    assert (len(split.training), len(split.validation), len(split.test), len(split.subset(0.2))) == counts
    parts = (*split.training, *split.validation, *split.test)
    assert len(parts) == len(set(parts)) == cases


def test_seeds_move_training_and_validation_alone():
    splits = [split_cases(NAMES, seed) for seed in SEEDS]
    assert len({split.test for split in splits}) == 1
    assert len({split.training for split in splits}) == len(SEEDS)
    assert split_cases(list(reversed(NAMES)), 3) == splits[3]


def test_subsets_are_nested():
    split = split_cases(NAMES, 1)
    small, middle, whole = (set(split.subset(fraction)) for fraction in FRACTIONS)
    assert small < middle < whole == set(split.training)


def test_splits_are_written_out(tmp_path: Path):
    split = split_cases(NAMES, 2)
    write_splits(tmp_path / "splits.json", {"spleen": [split]}, FRACTIONS)
    content = json.loads((tmp_path / "splits.json").read_text())["spleen"][0]
    assert tuple(content["test"]) == split.test
    assert tuple(content["subsets"]["0.2"]) == split.subset(0.2)


def test_the_study_has_144_runs_which_pair_up():
    cells = make_grid(["spleen", "lung"], pretrainings={"instance_pixel": 2})
    assert len(cells) == len({cell.name for cell in cells}) == 144
    assert cells[0] == Cell("spleen", "random", 0.2, 0)
    of_pixel = [cell.pretraining for cell in cells if cell.init == "instance_pixel"]
    assert of_pixel.count(0) == of_pixel.count(1) == 18
    assert {cell.pretraining for cell in cells if cell.init != "instance_pixel"} == {0}
    primary = select(cells, {"task": ["spleen"], "fraction": [0.2], "init": ["random", "instance_pixel"]})
    assert len(primary) == 12
    assert primary[-1].name == "spleen-instance_pixel-020-seed5"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_cases(NAMES[:5], 0), "5 labelled cases; expected at least 6"),
        (lambda: split_cases(["a", *NAMES, "a"], 0), "case a is named twice"),
        (lambda: split_cases(NAMES, 0).subset(0.02), "fraction is 0.02 of 14 training cases, which leaves no case"),
        (lambda: split_cases(NAMES, 0).subset(0.0), "fraction is 0; expected above 0"),
        (lambda: make_grid(["spleen"], seeds=[0, 0]), r"seeds is \[0, 0\]; expected at least one, each once"),
        (lambda: make_grid(["spleen"], fractions=[1.5]), "expected above 0 and at most 1"),
        (lambda: make_grid(["spleen"], pretrainings={"nvidia": 0}), "nvidia has 0 pretrained weights"),
        (lambda: select(make_grid(["spleen"]), {"init": ["swin"]}), r"selection of init is \['swin'\]; expected"),
        (lambda: select(make_grid(["spleen"]), {"inits": ["random"]}), "selection names 'inits'; expected some of"),
        (lambda: check_seeds([0, 1, 2, 3, 4]), r"seeds \[0, 1, 2, 3, 4\]; expected \[0, 1, 2, 3, 4, 5\], 6 runs"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
