# SPDX-License-Identifier: Apache-2.0
"""Options as people write them on the command line and in files: lists, merged files, names of folders."""

import json
from pathlib import Path

import pytest
import yaml

from medaccel.cli import main, parse
from medaccel.pretraining.config import PretrainingConfig
from medaccel.restoration.config import RestorationConfig

LISTS = {
    "methods": [
        ["gaussian1", "nlm"],
        ["gaussian1,nlm"],
        ["[gaussian1,nlm]"],
        ["[gaussian1, nlm]"],
        ["gaussian1, nlm"],
    ],
    "also_seconds": [["20", "30"], ["20,30"], ["[20,30]"]],
}


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, found in LISTS.items() for given in found])
def test_lists_may_be_written_as_people_write_them(name: str, given: list[str], tmp_path: Path):
    wanted = {"methods": ("gaussian1", "nlm"), "also_seconds": (20, 30)}[name]
    for tail in ([], ["--seed", "3"]):
        _, found = parse(["restoration", "run", f"--{name}", *given, *tail])
        assert tuple(found[name]) == wanted
    if len(given) == 1:
        assert tuple(parse(["restoration", "run", f"--{name}={given[0]}"])[1][name]) == wanted
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({name: yaml.safe_load(given[0])}))
        assert tuple(parse(["restoration", "run", "--config", str(tmp_path / "x.yaml")])[1][name]) == wanted


def test_an_only_entry_stands_for_a_list_and_negative_numbers_for_themselves(tmp_path: Path):
    assert parse(["restoration", "run", "--methods", "nlm"])[1].methods == ("nlm",)
    assert RestorationConfig(methods="nlm").methods == ("nlm",)  # type: ignore[arg-type]
    assert parse(["pretraining", "run", "--windows", "-1000", "400"])[1].windows == ((-1000, 400),)
    assert parse(["pretraining", "run", "--windows", "[-1000,400]", "[-160,240]"])[1].windows == (
        (-1000, 400),
        (-160, 240),
    )
    assert parse(["pretraining", "run", "--scans", "a", "b"])[1].scans == (Path("a"), Path("b"))
    assert parse(["segmentation", "run", "--select.init", "random", "--inits", "random"])[1].select == {
        "init": ["random"]
    }
    assert parse(["smooth", "--sigma", "1", "1", "2", "a.nii", "b.nii"])[1].sigma == (1, 1, 2)
    assert parse(["smooth", "a.nii", "b.nii", "--sigma", "2"])[1].sigma == 2


def test_what_a_command_needs_at_its_end_is_not_the_lists():
    found = parse(["restoration", "score", "--methods", "gaussian1", "nlm", "runs/mine"])[1]
    assert (found.run, found.methods) == (Path("runs/mine"), ("gaussian1", "nlm"))


def test_files_and_options_are_merged_key_by_key(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("trainer: {steps: 50, learning_rate: 1e-4}\nseed: 3\n")
    found = parse(["pretraining", "run", "--config", str(tmp_path / "a.yaml"), "--trainer.steps", "100"])[1]
    assert found.trainer == {"steps": 100, "learning_rate": 1e-4}
    assert found.seed == 3


def test_the_options_can_be_printed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["pretraining", "run", "--seed", "3", "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 3


def test_names_of_folders_are_taken_letter_by_letter():
    assert parse(["restoration", "run", "--output", "1e3", "--train_studies", "a, b"])[1].output == Path("1e3")
    assert parse(["restoration", "run", "--train_studies", "a, b"])[1].train_studies == Path("a, b")


def test_a_configuration_can_be_read_back(tmp_path: Path):
    for config in (RestorationConfig(), PretrainingConfig()):
        again = type(config).of(Path("x"), json.loads(json.dumps(config.plain())))
        assert again.digest() == config.digest()
