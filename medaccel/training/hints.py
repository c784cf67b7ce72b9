# SPDX-License-Identifier: Apache-2.0
"""Chooses which of Lightning's messages a user sees."""

import logging


def _worth_showing(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or "set_float32_matmul_precision" in record.getMessage()


def quieten_lightning() -> None:
    """Silences Lightning's hints on worker counts and accelerators, which repeat the settings.

    Its hint on the precision of fp32 products stays: medaccel's kernels follow that setting too.
    """
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.removeFilter(_worth_showing)
    logger.addFilter(_worth_showing)
