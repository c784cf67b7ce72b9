# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the Triton harness, and the hooks that run `interpreted` tests in their own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .delegation import pytest_collection_modifyitems, pytest_configure, pytest_unconfigure

if TYPE_CHECKING:
    from .interpret import Interpreter

__all__ = [
    "interpreter",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_unconfigure",
    "triton_cache",
]


@pytest.fixture
def interpreter() -> Iterator[Interpreter]:
    """The checked interpreter, switched on for the whole test; the test must be marked `interpreted`."""
    from .interpret import interpreting

    with interpreting() as running:
        yield running


@pytest.fixture(scope="session")
def triton_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of compiled kernels, kept in pytest's cache between runs where there is one."""
    cache = getattr(request.config, "cache", None)
    return Path(cache.mkdir("triton")) if cache is not None else tmp_path_factory.mktemp("triton")
