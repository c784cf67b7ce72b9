# SPDX-License-Identifier: Apache-2.0
"""Computes a short digest that differs wherever two sets of options differ."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(values: Any) -> str:
    """Returns 12 hexadecimal digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
