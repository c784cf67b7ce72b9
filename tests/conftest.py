# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test folders share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.triton_interpretation.fixtures import *  # noqa: F403 (hooks and fixtures: pytest looks them up here)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Returns the folder of real volumes: MEDACCEL_DATA, else shared/data beside the repository."""
    folder = Path(os.environ.get("MEDACCEL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"the real volumes are not at {folder} (MEDACCEL_DATA names another folder)")
    return folder


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_run() -> None:
    """A test that fails once must fail again."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries draw from the legacy state)
