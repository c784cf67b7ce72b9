# SPDX-License-Identifier: Apache-2.0
"""Coordinates several processes started by `torchrun`: one writes, and the others wait for it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The others wait this long while the first chooses on the validation studies, which takes hours for big ones.
_PATIENCE = datetime.timedelta(hours=24)


def world_size() -> int:
    """Returns how many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Returns how many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Returns this process's number."""
    return int(os.environ.get("RANK", "0"))


def join(accelerator: str = "auto") -> None:
    """Makes the process group if several processes run and none has made it.

    Raises:
        ValueError: this machine has more processes than GPUs, unless `accelerator` is "cpu".
    """
    if world_size() > 1 and not torch.distributed.is_initialized():
        gpus = 0 if accelerator == "cpu" else torch.cuda.device_count()
        if 0 < gpus < local_world_size():
            raise ValueError(f"torchrun started {local_world_size()} processes; expected at most {gpus}, one a GPU")
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)


def barrier() -> None:
    """Waits until all processes are here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave() -> None:
    """Waits for all processes and takes the group apart; a process that ended earlier would take the others with
    it."""
    barrier()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def first_process() -> Iterator[bool]:
    """Yields True in the process that does the work of the block; the others wait at its end."""
    yield rank() == 0
    barrier()
