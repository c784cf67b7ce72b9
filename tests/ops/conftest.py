# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the ops' tests."""

import contextlib
from collections.abc import Iterator

import pytest

from medaccel import use_reference


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernel, and then the reference, serves the test."""
    with use_reference() if request.param == "reference" else contextlib.nullcontext():
        yield
