# SPDX-License-Identifier: Apache-2.0
"""Tests commands without the packages of `medaccel[pipelines]`: they say what to install; kernels need none."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from medaccel._commands import PACKAGES

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from medaccel.cli import main
sys.exit(main(sys.argv[1:]))
"""
EXTRAS = [
    "monai",
    "einops",
    "lightning",
    "tensorboard",
    "scipy",
    "skimage",
    "matplotlib",
    "jinja2",
    "SimpleITK",
    "joblib",
]
NEEDING = {
    "demo": [],
    "restoration run": ["--help"],
    "restoration score": ["run"],
    "restoration apply": ["--checkpoint", "a.pt", "b.nii", "c.nii"],
    "pretraining run": [],
    "segmentation run": [],
    "segmentation apply": ["--checkpoint", "a.pt", "b.nii", "c.nii"],
}


def _without(names: list[str], *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(names=set(names))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder, timeout=120
    )


@pytest.mark.parametrize("command", NEEDING)
@pytest.mark.slow
def test_without_the_extras_a_command_says_what_to_install(command: str, tmp_path: Path):
    found = _without(EXTRAS, *command.split(), *NEEDING[command], folder=tmp_path)
    assert found.returncode == 2, found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert 'pip install "medaccel[pipelines]"' in found.stderr
    assert f"medaccel {command} needs " in found.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["doctor"], ["--help"], ["smooth", "--help"], ["restoration", "--help"]])
@pytest.mark.slow
def test_the_kernels_commands_need_no_extras(arguments: list[str], tmp_path: Path):
    found = _without(EXTRAS, *arguments, folder=tmp_path)
    assert found.returncode == 0, found.stderr


def test_one_extra_that_is_missing_is_named(tmp_path: Path):
    found = _without(["skimage"], "restoration", "run", folder=tmp_path)
    assert found.returncode == 2
    assert "needs scikit-image, which is not installed here" in found.stderr


def test_the_extras_are_those_of_the_package():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    listed = re.search(r"^pipelines = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    declared = {re.split(r"[<>=]", name)[0] for name in re.findall(r'^    "([^"]+)"', listed[1], re.MULTILINE)}
    assert set(PACKAGES.values()) == declared
