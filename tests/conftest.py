# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test folders share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real volumes: MEDACCEL_DATA, else shared/data beside the repository."""
    folder = Path(os.environ.get("MEDACCEL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"the real volumes are not at {folder} (MEDACCEL_DATA names another folder)")
    return folder
