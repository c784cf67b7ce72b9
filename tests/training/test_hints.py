# SPDX-License-Identifier: Apache-2.0
"""Tests which of Lightning's messages are shown."""

from __future__ import annotations

import logging

import pytest
import torch

from medaccel.training.hints import quieten_lightning

cuda = pytest.importorskip("lightning.fabric.accelerators.cuda")


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages that pass Lightning's logger, quietened as for training."""
    import lightning.pytorch  # noqa: F401 (it names the logger)

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "level", logging.INFO)
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logger, "handlers", [handler])
    quieten_lightning()
    quieten_lightning()
    assert len(logger.filters) == 1
    return found


def test_the_hint_on_fp32_products_is_shown_and_others_are_not(messages: list[str], monkeypatch: pytest.MonkeyPatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    cuda._check_cuda_matmul_precision.cache_clear()
    cuda._check_cuda_matmul_precision(torch.device("cuda", 0))
    cuda._check_cuda_matmul_precision.cache_clear()
    rank_zero_info("GPU available: True")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").error("something failed")
    assert len(messages) == 2
    assert "torch.set_float32_matmul_precision('medium' | 'high')" in messages[0]
    assert messages[1] == "something failed"


def test_every_pipeline_quietens_lightning_that_way():
    """A level on that logger would hide the hint."""
    from pathlib import Path

    import medaccel

    for file in Path(medaccel.__file__).parent.rglob("*.py"):
        assert "utilities.rank_zero" not in file.read_text() or file.name == "hints.py", file
