# SPDX-License-Identifier: Apache-2.0
"""The validator of Debian's dicom3tools (dciodvfy), where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def errors(path: Path) -> list[str]:
    """Returns the errors that the validator finds in a file, a line each."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not here (apt-get install dicom3tools)")
    found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=60)
    lines = (found.stdout + found.stderr).splitlines()
    assert lines, "the validator says nothing"
    return [line for line in lines if line.startswith(("Error", "Abort"))]
