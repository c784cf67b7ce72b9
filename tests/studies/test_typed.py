# SPDX-License-Identifier: Apache-2.0
"""Tests groups of options: typed, explained, and able to tell which options were given."""

import copy
import dataclasses
import inspect
import pickle
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest

from medaccel._arguments import prepared
from medaccel._commands import COMMANDS
from medaccel._parser import explanations
from medaccel.cli import main, parse
from medaccel.data import TwoViews
from medaccel.nets import SwinUNETR
from medaccel.pretraining.config import PretrainingConfig
from medaccel.pretraining.names import TASK_NAMES
from medaccel.pretraining.settings import NetworkSettings, SettingsByTask, ViewSettings
from medaccel.pretraining.tasks import TASKS
from medaccel.restoration.config import RestorationConfig
from medaccel.restoration.methods import METHODS, method_class
from medaccel.restoration.methods.classical import STABILISERS
from medaccel.restoration.methods.networks.nets import BASES
from medaccel.restoration.methods.networks.patches import REFERENCES
from medaccel.restoration.methods.networks.scaling import SCALINGS
from medaccel.restoration.settings import ClassicalSettings, SettingsByMethod, SwinSettings, TrainerSettings
from medaccel.segmentation.config import SegmentationConfig
from medaccel.segmentation.model.presets import PRESETS
from medaccel.segmentation.settings import SegmentationSettings
from medaccel.studies.typed import Count, Settings, combined, converted, hints_of, is_group

RUNS: dict[str, Any] = {
    "restoration run": RestorationConfig,
    "pretraining run": PretrainingConfig,
    "segmentation run": SegmentationConfig,
}


@dataclass(frozen=True, eq=False)
class Inner(Settings):
    """An inner group.

    Args:
        size: size.
        kind: kind.
    """

    renamed: ClassVar[dict[Any, str]] = {"extent": "size"}

    size: Count = 3
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, eq=False)
class Outer(Settings):
    """An outer group.

    Args:
        inner: inner group.
        names: names.
        table: inner groups by name.
    """

    separator: ClassVar[str] = "."

    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ("x",)
    table: dict[str, Inner] = field(default_factory=dict)


def test_a_group_has_all_options_and_holds_those_that_were_given():
    group = Outer.read({"inner": {"extent": 4}, "names": "a,b"})
    assert (group.inner.size, group.inner.kind, group.names) == (4, "a", ("a", "b"))
    assert group == {"inner": {"size": 4}, "names": ("a", "b")}
    assert list(group) == ["inner", "names"]
    assert "table" not in group
    assert group.get("table") is None
    assert not Outer()
    assert group.written() == {"inner": {"extent": 4}, "names": "a,b"}
    assert group.whole()["inner"] == {"extent": 4}
    assert Outer(names=("x",)) == {"names": ("x",)} != Outer()
    for again in (pickle.loads(pickle.dumps(group)), copy.deepcopy(group), Outer.read(group.written())):
        assert again == group
        assert again.written() == group.written()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"inner": {"size": 0}}, "outer.inner: size is 0; expected a whole number >= 1"),
        ({"inner": {"size": "many"}}, "outer.inner: size is 'many'; expected a whole number >= 1"),
        ({"inner": {"size": True}}, "outer.inner: size is True; expected a whole number >= 1"),
        ({"inner": {"kind": "c"}}, "outer.inner: kind is 'c'; expected one of a, b"),
        ({"inner": {"kind": [1]}}, "outer.inner: kind is [1]; expected one of a, b"),
        ({"inner": {"sise": 1}}, "outer.inner names ['sise']; expected some of size, kind (did you mean size?)"),
        ({"inner": {1: 1}}, "outer.inner names ['1']; expected some of size, kind"),
        ({"inner": 5}, "outer.inner is 5; expected settings by name, {name: value}"),
        ({"inner": None}, "outer.inner is None; expected settings by name, {name: value}"),
        ({"innr": {}}, "outer names ['innr']; expected some of inner, names, table (did you mean inner?)"),
        ({"table": {"one": {"size": -1}}}, "outer.table.one: size is -1; expected a whole number >= 1"),
        (
            {"inner": {"size": 1, "extent": 2}},
            "outer.inner: extent is given beside size, its name today; expected size",
        ),
        ([], "outer is []; expected settings by name, {name: value}"),
    ],
)
def test_a_mistake_is_told_with_its_path(given: Any, sentence: str):
    with pytest.raises(ValueError) as told:
        converted("outer", given, Outer)
    assert str(told.value).startswith(sentence)


def test_what_is_given_later_is_combined_with_what_was_given():
    hint = Outer
    before = {"inner": {"extent": 2, "kind": "b"}, "table": {"one": {"size": 1}}}
    assert combined(before, {"inner": {"kind": "a"}}, hint)["inner"] == {"extent": 2, "kind": "a"}
    assert combined(before, 5, hint, ["inner", "size"])["inner"] == {"size": 5, "kind": "b"}
    # A table whose names are a user's own is replaced as a whole, and changed by a path.
    assert combined(before, {"table": {"two": {}}}, hint)["table"] == {"two": {}}
    assert combined(before, 5, hint, ["table", "one", "kind"])["table"] == {"one": {"size": 1, "kind": 5}}
    assert combined(None, 5, hint, ["table", "two", "size"]) == {"table": {"two": {"size": 5}}}
    assert combined({1.0: {"size": 1}}, 5, dict[Any, Inner], ["1.0", "size"]) == {1.0: {"size": 5}}
    assert before == {"inner": {"extent": 2, "kind": "b"}, "table": {"one": {"size": 1}}}


def groups_of(kind: Any, path: str = "") -> dict[str, Any]:
    """Every option of a dataclass and of the groups in it, by its name on the command line."""
    found: dict[str, Any] = {}
    for name, hint in hints_of(kind).items():
        found[path + name] = hint
        if is_group(hint):
            found |= groups_of(hint, f"{path}{name}.")
        elif any(is_group(inner) for inner in typing.get_args(hint)):
            found |= {f"{path}{name}.NAME.{key}": one for key, one in hints_of(typing.get_args(hint)[1]).items()}
    return found


@pytest.mark.parametrize("command", RUNS)
def test_help_explains_every_option(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    kind = RUNS[command]
    owners = {"": kind} | {
        f"{name}.": hint for name, hint in groups_of(kind).items() if is_group(hint) and "NAME" not in name
    }
    for path, owner in owners.items():
        for name, said in explanations(owner).items():
            if path + name in SET_BY_THE_STUDY:
                continue
            # What all networks have stands once, with the options for all methods; the others stand with the methods.
            once = command == "restoration run" and "." in path
            assert re.search(rf"--{re.escape(path + name)}[ :]", text) or (once and f".{name} " in text), path + name
            assert said[1:].rstrip(".") in text, path + name


SET_BY_THE_STUDY = [f"pretraining.{name}" for name in ("output", "preset", "tasks", "seed")]


@pytest.mark.parametrize("command", RUNS)
def test_help_is_readable(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines[: lines.index("examples:")] if len(line) > 100] == []
    assert not [line for line in lines if "Annotated" in line or "NoneType" in line or "<class" in line]


@pytest.mark.parametrize("command", RUNS)
def test_every_option_of_a_group_is_refused_by_name(command: str, capsys: pytest.CaptureFixture[str]):
    """Nonsense, and a letter too many."""
    parser, hints = COMMANDS[command].parser(), COMMANDS[command].types()
    parser.prog = f"medaccel {command}"
    for name, hint in groups_of(RUNS[command]).items():
        if "." not in name:
            continue
        option, key = name.replace("NAME", "spleen"), name.rpartition(".")[2]
        mistakes = [(f"--{option}x=1", f"(did you mean {key}?)")]
        if not takes_any_text(hint):
            mistakes.append((f"--{option}=[{{a: 1}}]", f"{key} is "))
        for word, sentence in mistakes:
            with pytest.raises(SystemExit) as end:
                prepared(parser, [word], hints)
            error = capsys.readouterr().err
            assert end.value.code == 2
            assert sentence in error, (word, error)
            assert len(error.splitlines()) == 2


def takes_any_text(hint: Any) -> bool:
    return hint in (str, Path) or (
        bool({str, Path} & set(typing.get_args(hint))) and typing.get_origin(hint) is not Annotated
    )


def given(words: list[str]) -> Any:
    return parse(words)[1]


def test_an_option_of_a_file_is_not_lost_to_another_one_on_the_command_line(tmp_path: Path):
    """Both the file's other settings of that method and those of other methods stay."""
    (tmp_path / "a.yaml").write_text(
        "trainer: {steps: 50, precision: 32-true}\n"
        "settings: {swin_unetr: {feature_size: 24, give_back: 1.5, base: nlm}, nlm: {patch_size: 3}}\n"
        "simulator: {n_angles: 48}\n"
    )
    words = ["restoration", "run", "--config", str(tmp_path / "a.yaml")]
    found = given(
        [
            *words,
            *("--settings.swin_unetr.steps", "5", "--settings.swin_unetr.base", "gaussian"),
            *("--settings.tv.rounds", "1", "--trainer", "{num_workers: 2}", "--simulator.n_subsets", "6"),
        ]
    )
    assert found.settings == {
        "swin_unetr": {"feature_size": 24, "give_back": 1.5, "base": "gaussian", "steps": 5},
        "nlm": {"patch_size": 3},
        "tv": {"rounds": 1},
    }
    assert found.trainer == {"steps": 50, "precision": "32-true", "num_workers": 2}
    assert found.simulator == {"n_angles": 48, "n_subsets": 6}
    # The new name of a setting takes the place of the old one's.
    again = given([*words, "--settings.swin_unetr.residual_shrinkage", "2"])
    assert again.settings["swin_unetr"] == {"feature_size": 24, "residual_shrinkage": 2, "base": "nlm"}
    # Whichever stands first: what comes later holds.
    first = given(["restoration", "run", "--trainer.steps", "7", "--trainer.warm_up", "1", *words[2:]])
    assert first.trainer == {"steps": 50, "precision": "32-true", "warm_up": 1}
    (tmp_path / "b.yaml").write_text("trainer.steps: 60\nsettings: {nlm: {patch_distance: 2}}\n")
    both = given([*words, "--config", str(tmp_path / "b.yaml")])
    assert both.trainer["steps"] == 60
    assert both.settings["nlm"] == {"patch_size": 3, "patch_distance": 2}


def test_tables_are_replaced_as_a_whole_and_changed_by_a_path(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "tasks:\n  spleen:\n    preset: phantom_spleen\n"
        "    by_fraction: {0.5: {steps: 700}, 1.0: {steps: 1000, zoom: 0.1}}\n"
        "  lung: {preset: phantom_lung}\n"
        "weights: {a: [x.pt]}\npretraining: {trainer: {steps: 10}, tasks: {}}\n"
    )
    words = ["segmentation", "run", "--config", str(tmp_path / "a.yaml")]
    found = given(
        [
            *words,
            *("--tasks.spleen.settings.steps", "5", "--tasks.spleen.by_fraction.1.0.steps", "9"),
            *("--weights.b", "y.pt", "z.pt", "--pretraining.trainer.batch_size", "2"),
        ]
    )
    assert found.tasks == {
        "spleen": {
            "preset": "phantom_spleen",
            "by_fraction": {"0.5": {"steps": 700}, "1.0": {"steps": 9, "zoom": 0.1}},
            "settings": {"steps": 5},
        },
        "lung": {"preset": "phantom_lung"},
    }
    assert found.weights == {"a": ["x.pt"], "b": ["y.pt", "z.pt"]}
    assert found.pretraining == {"trainer": {"steps": 10, "batch_size": 2}, "tasks": {}}
    assert given([*words, "--tasks", "{lung: {}}"]).tasks == {"lung": {}}
    # Without a file, the defaults are what is changed.
    assert given(["segmentation", "run", "--tasks.spleen.check_units", "false"]).tasks == {
        "spleen": {"check_units": False},
        "lung": {},
    }


def test_lists_of_groups_may_be_written_as_people_write_them():
    for words in (["32", "32", "64"], ["32,32,64"], ["[32,32,64]"], ["[32, 32, 64]"]):
        found = given(["restoration", "run", "--settings.swin_unetr.roi_size", *words, "--seed", "3"])
        config = RestorationConfig(settings=found.settings)
        assert config.settings.swin_unetr.roi_size == (32, 32, 64)
        assert found.seed == 3
    config = RestorationConfig(settings=given(["restoration", "run", "--settings.tv.strengths", "2"]).settings)
    assert config.settings.tv.strengths == (2,)


def test_only_what_was_given_is_printed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["restoration", "run", "--trainer.steps", "50", "--print_config"])
    printed = capsys.readouterr().out
    assert "trainer:\n  steps: 50\n" in printed
    assert "warm_up" not in printed


def test_yaml_takes_on_for_true_and_inpainting_does_not_mind(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("settings: {inpainting: {on: all}}\n")
    found = given(["pretraining", "run", "--config", str(tmp_path / "a.yaml")])
    assert PretrainingConfig(settings=found.settings).settings.inpainting.on == "all"
    assert given(["pretraining", "run", "--settings.inpainting.on", "all"]).settings == {"inpainting": {"on": "all"}}


# --- What the settings are settings of ---


def choices(kind: Any, name: str) -> set[Any]:
    return set(typing.get_args(hints_of(kind)[name]))


def test_the_choices_are_those_of_the_code():
    assert choices(SwinSettings, "scaling") == set(SCALINGS)
    assert choices(SwinSettings, "base") == set(BASES)
    assert choices(SwinSettings, "reference") == set(REFERENCES)
    assert choices(ClassicalSettings, "stabiliser") == set(STABILISERS)


def test_there_is_a_group_for_every_method_and_task():
    assert SettingsByMethod.option_names() == list(METHODS)
    for name, kind in hints_of(SettingsByMethod).items():
        assert method_class(name).Settings is kind
        assert set(kind.option_names()) <= set(TrainerSettings.option_names())
    assert SettingsByTask.option_names() == list(TASK_NAMES)
    for name, kind in hints_of(SettingsByTask).items():
        assert TASKS[name].Settings is kind


@pytest.mark.parametrize(("kind", "target"), [(NetworkSettings, SwinUNETR), (ViewSettings, TwoViews)])
def test_arguments_of_a_class_have_its_defaults(kind: Any, target: Any):
    parameters = inspect.signature(target.__init__).parameters
    for one in dataclasses.fields(kind):
        default = parameters[one.name].default
        assert getattr(kind(), one.name) == (tuple(default) if isinstance(default, list) else default)


def test_every_group_is_a_frozen_dataclass_with_explanations():
    for kind in RUNS.values():
        for name, hint in groups_of(kind).items():
            if is_group(hint):
                assert dataclasses.is_dataclass(hint), name
                assert set(explanations(hint)) == set(hint.option_names()), name
                with pytest.raises(dataclasses.FrozenInstanceError):
                    hint().separator = "x"


def test_the_generic_preset_is_the_settings_default():
    assert not PRESETS["generic"]
    assert SegmentationSettings() == PRESETS["generic"]


@pytest.mark.parametrize("command", RUNS)
@pytest.mark.parametrize("size", ["small", "full"])
def test_the_files_in_configs_have_settings_that_there_are(command: str, size: str):
    path = Path(__file__).parents[2] / "configs" / f"{command.split()[0]}_{size}.yaml"
    options = given([*command.split(), "--config", str(path)]).as_dict()
    config = RUNS[command](**{k: v for k, v in options.items() if k in hints_of(RUNS[command])})
    if command == "restoration run":
        from medaccel.restoration.methods import make_method
        from medaccel.restoration.pipeline import settings_of, task_of

        for name in config.methods:
            make_method(name, task_of(config), settings_of(config, name))


def test_commands_know_the_types_of_their_options():
    for command, kind in RUNS.items():
        assert hints_of(kind).items() <= COMMANDS[command].types().items()
