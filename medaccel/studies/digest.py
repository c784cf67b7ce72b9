# SPDX-License-Identifier: Apache-2.0
"""Computes SHA-256 digests of options and of files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


def digest(values: Any) -> str:
    """Returns 12 hexadecimal digits of the SHA-256 of plain values; they differ wherever two sets of options do."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal digits."""
    content = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()
