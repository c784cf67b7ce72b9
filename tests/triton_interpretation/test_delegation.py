# SPDX-License-Identifier: Apache-2.0
"""Marked tests run in an interpreting process, and their outcomes show in this one, whatever they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CONFTEST = """
from tests.triton_interpretation.delegation import (
    pytest_collection_modifyitems, pytest_configure, pytest_unconfigure
)
"""
TESTS = """
import os, pytest

@pytest.fixture
def only_in_the_child():
    assert os.environ["TRITON_INTERPRET"] == "1"

@pytest.mark.interpreted
@pytest.mark.parametrize("n", [1, 2])
def test_passes(n, only_in_the_child): pass

@pytest.mark.interpreted
def test_fails(): assert 40 + 1 == 42, "sum is off"

@pytest.mark.interpreted
def test_skips(): pytest.skip("for a reason")

@pytest.mark.interpreted
@pytest.mark.xfail(reason="known")
def test_known_to_fail(): assert False

def test_ordinary(): assert "TRITON_INTERPRET" not in os.environ
"""
CRASH = """
import os, pytest

@pytest.mark.interpreted
def test_crashes(): os._exit(3)
"""


def run_pytest(folder: Path, *options: str) -> str:
    root = Path(__file__).resolve().parents[2]
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "TRITON_", "MEDACCEL_"))}
    environment |= {"PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", str(folder), "-ra", "-p", "no:cacheprovider", *options]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return run.stdout + run.stderr


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    return tmp_path


@pytest.mark.parametrize("options", [[], ["-p", "xdist", "-n2"]], ids=["one process", "xdist"])
def test_outcomes_of_the_child_are_those_of_the_parent(suite: Path, options: list[str]) -> None:
    output = run_pytest(suite, *options)
    assert "1 failed, 3 passed, 1 skipped, 1 xfailed" in output
    assert "sum is off" in output
    assert "for a reason" in output


def test_a_selection_is_kept_to(suite: Path) -> None:
    assert "1 passed, 5 deselected" in run_pytest(suite, "-k", "test_passes and 2")


def test_a_crash_of_the_child_is_a_failure_with_its_exit_status(suite: Path) -> None:
    (suite / "test_some.py").write_text(CRASH)
    output = run_pytest(suite)
    assert "1 failed" in output
    assert "did not finish in its process" in output
    assert "exit status 3" in output
