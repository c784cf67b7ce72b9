# SPDX-License-Identifier: Apache-2.0
"""Mistakes on the command line: status 2, a line or two on stderr, and nothing on disk made or removed."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from medaccel._commands import COMMANDS
from medaccel.cli import main
from medaccel.pretraining.config import PretrainingConfig
from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.methods import METHODS, method_class
from medaccel.restoration.pipeline import check as check_restoration
from medaccel.segmentation.config import SegmentationConfig
from medaccel.studies.settings import TRAINING
from medaccel.studies.typed import is_group

RUNS = ("restoration run", "pretraining run", "segmentation run")
CONFIGS: dict[str, Any] = {
    "restoration run": RestorationConfig,
    "pretraining run": PretrainingConfig,
    "segmentation run": SegmentationConfig,
}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command that must be refused, where an earlier run lies and --force is given; returns stderr."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "training").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 9\n")
    (run / "training" / "last.ckpt").write_bytes(b"weeks of work")
    (run / "report.html").write_text("the earlier report")

    def call(*arguments: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        capsys.readouterr()
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
        error = capsys.readouterr().err
        assert status == 2, error
        assert 1 <= len(error.strip().splitlines()) <= 2, error
        assert "Traceback" not in error
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return error

    return call


KEYS = {
    **{
        name: next(f.name for f in fields(config) if f.name == "seed" or f.name == "seeds")
        for name, config in CONFIGS.items()
    },
    "smooth": "sigma",
    "restoration score": "realisations",
    "restoration apply": "samples",
    "segmentation apply": "keep_largest",
    "verify": "devices",
    "demo": "output",
}


@pytest.mark.parametrize("command", KEYS)
def test_a_mistyped_name_gets_the_nearest_right_one(command: str, refused: Any, tmp_path: Path):
    key = KEYS[command]
    wrong = key[:-1] + "x" + key[-1]
    (tmp_path / "mistyped.yaml").write_text(f"{wrong}: 1\n")
    error = refused(*command.split(), "--config", "mistyped.yaml")
    assert f"mistyped.yaml: {wrong} is no option of this command (did you mean {key}?)" in error
    assert f"--{wrong} is no option of this command (did you mean --{key}?)" in refused(
        *command.split(), f"--{wrong}", "1"
    )


FILES = {
    "not yaml": ("a: [1", "not YAML"),
    "a list": ("- 1\n", "expected options by name"),
    "text": ("seed\n", "expected options by name"),
    "no utf-8": (b"\xff\xfe\x00", "expected a YAML file"),
}


@pytest.mark.parametrize("command", RUNS)
@pytest.mark.parametrize("what", [*FILES, "missing", "folder"])
def test_a_file_of_no_options_is_refused(command: str, what: str, refused: Any, tmp_path: Path):
    path = tmp_path / "x.yaml"
    content, sentence = FILES.get(what, (None, "expected a YAML file"))
    if what == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence in refused(*command.split(), "--config", "x.yaml")


def wrong_values(hint: Any) -> list[str]:
    """Values that an option of this type can't have."""
    if hint in (int, float):
        return ["abc", "[1, 2]", "{a: 1}", "true", "null", ".nan"]
    return ["abc", "3", "[1]", "null"] if "dict" in str(hint) or is_group(hint) else []


OPTIONS = [
    (command, name, value)
    for command in (*RUNS, "restoration score")
    for name, hint in COMMANDS[command].types().items()
    for value in wrong_values(hint)
]


@pytest.mark.parametrize(("command", "name", "value"), OPTIONS)
def test_a_value_of_another_type_is_refused_by_name(
    command: str, name: str, value: str, refused: Any, tmp_path: Path
):
    positional = ["run"] if command == "restoration score" else []
    error = refused(*command.split(), *positional, f"--{name}={value}")
    assert f"{name} is " in error
    assert "; expected " in error
    (tmp_path / "x.yaml").write_text(f"{name}: {value}\n")
    assert f"x.yaml: {name} is " in refused(*command.split(), *positional, "--config", "x.yaml")


@pytest.mark.parametrize("command", RUNS)
@pytest.mark.parametrize("key", TRAINING)
def test_a_trainers_setting_of_another_type_is_refused_before_anything_is_made(command: str, key: str, refused: Any):
    group = "settings" if command == "segmentation run" else "trainer"
    for value in ("[abc]", "{a: 1}", "abc" if not isinstance(TRAINING[key], str) else "7", "null"):
        if key == "gradient_clip" and value == "null":
            continue  # none
        error = refused(*command.split(), "--output", "run", "--force", f"--{group}.{key}", value)
        assert f"{key} is " in error
        assert "expected" in error
    error = refused(*command.split(), "--output", "run", "--force", f"--{group}.{key}x", "1")
    assert f"(did you mean {key}?)" in error


SETTINGS = [(name, key) for name in METHODS for key in method_class(name).defaults]


@pytest.mark.parametrize(("method", "key"), SETTINGS)
def test_a_methods_setting_of_another_type_is_refused(method: str, key: str):
    for value in ({"a": 1}, [{"a": 1}], "abc", True):
        default = method_class(method).defaults[key]
        if isinstance(default, bool) and value is True:
            continue
        if key == "varied_folder" and value == "abc":  # a name of a folder
            continue
        with pytest.raises(ValueError, match=rf"{method}.*{key}|{key} is"):
            check_restoration(RestorationConfig(methods=(method,), settings={method: {key: value}}))


ELSEWHERE = ("..", ".", "", "a/b", "/tmp/x", ".hidden", "a\nb", "a/", "x" * 200)
OWN = ("config.yaml", "checkpoints", "Scored")
MORE = {
    "restoration run": [
        (["--train_studies", "nowhere"], "nowhere"),
        (["--methods", "gaussian1,median"], "expected some of gaussian1"),
        (["--phantom_spacings", "[[4, 4]]"], "phantom_spacings is"),
        (["--simulator", "{dose: 2}"], "simulator has an unknown parameter"),
        (["--simulator", "{n_angles: abc}"], "n_angles"),
        (["--settings", "{gaussian1: 5}"], "settings.gaussian1 is 5; expected settings by name"),
        (["--settings", "{gausian1: {}}"], "did you mean gaussian1?"),
        (["--trainer", "{accelerator: gpu}"], "torch sees no GPU here"),
        (["--methods", "swin_unetr", "--settings.swin_unetr.accelerator", "cuda"], "torch sees no GPU here"),
        (["--trainer", "{strategy: dpp}"], "did you mean ddp?"),
        (["--seed"], "--seed has no value"),
        (["--seed", "-1"], "seed is -1; expected a whole number from 0"),
        (["--seed", "99999999999999999999"], "expected a whole number from 0"),
        (["extra"], "unrecognized arguments: extra"),
    ],
    "pretraining run": [
        (["--scans", "nowhere"], "nowhere"),
        (["--preset", "instanc"], "did you mean instance?"),
        (["--roi_size", "64,64"], "roi_size is '64,64'; expected three whole numbers"),
        (["--trainer.accelerator", "gpu"], "torch sees no GPU here"),
        (["--trainer.accelerator", "tpu"], "expected one of auto, cpu"),
        (["--network", "{feature_sise: 12}"], "did you mean feature_size?"),
        (["--network", "{feature_size: abc}"], "network.feature_size is 'abc'; expected a whole number"),
        (["--network", "{feature_size: 13}"], "network is {'feature_size': 13}"),
        (["--network", "{depths: [2, abc, 2, 2]}"], "network.depths is"),
        (["--views", "{scale: abc}"], "views.scale is 'abc'"),
        (["--views", "{scal: [0.5, 1]}"], "did you mean scale?"),
        (["--views", "{region: 0.1}"], "views is {'region': 0.1}"),
        (["--tasks", "{pixel: abc}"], "tasks.pixel is 'abc'; expected a number"),
        (["--tasks", "{pixl: 1}"], "did you mean pixel?"),
        (["--settings", "{pixel: {temperature: abc}}"], "pixel: temperature is 'abc'"),
        (["--settings", "{inpainting: {sides: [a, b]}}"], "inpainting: sides is"),
        (["--settings", "{pixel: {level: [1]}}"], "pixel: level is"),
    ],
    "segmentation run": [
        (["--settings", "{learning_rate: abc}"], "learning_rate is 'abc'; expected a number"),
        (["--settings", "{accelerator: gpu}"], "torch sees no GPU here"),
        (["--tasks", "{spleen: {data: nowhere}}", "--primary", "{none: true}"], "nowhere"),
        (["--tasks", "{spleen: {settings: 5}}"], "tasks.spleen.settings is 5; expected settings by name"),
        (["--tasks", "{spleen: {dta: x}}"], "did you mean data?"),
        (["--tasks", "{spleen: 7}"], "tasks.spleen is 7"),
        (["--phantoms", "{cases: abc}"], "phantoms: cases is 'abc'; expected a whole number"),
        (["--phantoms", "{spacing: 4}"], "phantoms.spacing is [4]"),
        (["--pretraining", "{held_out: abc}"], "pretraining: held_out is 'abc'; expected a number"),
        (["--pretraining", "{scan: [a]}"], "did you mean scans?"),
        (["--pretraining", "{scans: [nowhere]}"], "nowhere"),
        (["--pretraining", "{trainer: {learning_rate: abc}}"], "learning_rate is 'abc'"),
        (
            ["--weights", "{a: no.pt}", "--inits", "random,a", "--primary", "{none: true}"],
            "weights.a: no.pt not found",
        ),
        (["--backend", "ray"], "ray is not installed here"),
        (["--inits", "random", "instance_pixl"], "did you mean instance_pixel?"),
        (["--fractions", "0.2,abc"], "fractions is '0.2,abc'; expected a list of numbers"),
        (["--cell", "0"], "holds a study with other options"),
        (["--seeds", "0", "99999999999", "--primary", "{none: true}"], "expected a whole number from 0"),
        (["--cell", "abc"], "cell is 'abc'; expected a whole number"),
        (["--select.init", "nvidea"], "selection of init"),
        (["--primary", "{fraction: abc}"], "primary: fraction is 'abc'; expected a number"),
    ],
    "restoration score": [
        (["nowhere"], "nowhere: holds no run"),
        (["run", "--samples", "abc"], "samples is 'abc'; expected a whole number"),
        *((["run", "--name", name], "expected the name of a folder") for name in ELSEWHERE),
        *((["run", "--name", name], "which the run's own files have") for name in OWN),
        (["run", "--dicom", "x", "--name", "train"], "which the run's own files have"),
        (["run", "--test_studies", "/"], "--name gives one"),
    ],
    "verify": [
        (["--devices", "[cuda:0]"], "'cuda:0', but torch sees no GPU here; expected some of cpu"),
        (["--devices", "cuda"], "torch sees no GPU here"),
        (["--devices", "cpu", "mps"], "'mps', for which there are no kernels"),
        (["--devices", "gpu:zero"], "'gpu:zero', for which there are no kernels"),
        (["--devices", "cpu:3"], "'cpu:3', for which there are no kernels"),
        (["--devices", "[]"], "devices is empty"),
        (["--speed", "maybe"], "speed is 'maybe'; expected true or false"),
    ],
    "smooth": [
        (["a.nii", "b.nii", "--unit", "cm"], "unit is 'cm'; expected one of mm, voxel"),
        (["a.nii"], "output"),
        (["a.nii", "b.nii", "--sigma", "abc"], "sigma is 'abc'"),
        (["a.nii", "b.nii", "--sigma", "1,2"], "sigma is"),
    ],
}


@pytest.mark.parametrize(
    ("command", "options", "sentence"),
    [(command, options, sentence) for command, found in MORE.items() for options, sentence in found],
)
def test_a_mistake_is_answered_in_a_sentence(command: str, options: list[str], sentence: str, refused: Any):
    force = ["--output", "run", "--force"] if command in RUNS else []
    assert sentence in refused(*command.split(), *force, *options)


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["restoration"], ["restoration", "rnu"], ["demmo"]])
def test_what_is_no_command_is_answered_with_those_that_there_are(words: list[str], refused: Any):
    assert "expected one of" in refused(*words)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_index_beyond_the_gpus_is_refused(force: list[str], refused: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "torch sees 2 GPUs here; expected some of cpu, cuda:0, cuda:1" in refused("verify", "--devices", "cuda:2")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "config.yaml", "report.html"])
def test_a_scorings_name_leads_nowhere_else_from_python_either(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="name is"):
        ScoreConfig(tmp_path, name=name)
    assert ScoreConfig(tmp_path, name="patient 7_a.1").label == "patient 7_a.1"
