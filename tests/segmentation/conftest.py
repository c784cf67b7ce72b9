# SPDX-License-Identifier: Apache-2.0
"""A tiny task and a cell that was run on it, for several files of tests."""

from pathlib import Path
from typing import Any

import pytest

from medaccel.phantoms.ct_dataset import write_task
from tests.segmentation.cells import run_tiny


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spleens of seven phantoms, 8 mm: two to test on, three to train on, two to choose on."""
    folder = tmp_path_factory.mktemp("tiny") / "task"
    write_task(folder, "spleen", 7, spacing=(8.0, 8.0, 8.0), progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_cell(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Returns folder and result of a finished cell from random initialization."""
    folder = tmp_path_factory.mktemp("tiny") / "cell"
    return folder, run_tiny(tiny_task, folder)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spleens of nine phantoms, 8 mm."""
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, "spleen", 9, spacing=(8.0, 8.0, 8.0), progress=False)
    return folder
