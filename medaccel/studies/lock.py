# SPDX-License-Identifier: Apache-2.0
"""Lets one process at a time work in a folder: the lock ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, OWNER = ".lock", ".lock-owner"
# Workers forked by a killed process keep its lock until they notice that it is gone.
_PATIENCE = 10.0  # s


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Holds the lock of a folder, which exists, for the block.

    The operating system frees it when the process ends, so none is left behind by a kill.

    Args:
        folder: the folder that no other process may work in meanwhile.
        what: its name in the message.

    Raises:
        ValueError: another process has it; the message names that process and its machine.
    """
    lock = FileLock(folder / LOCK)
    _acquire(lock, folder, what)
    try:
        (folder / OWNER).write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        # removed while the lock is held: a process that waits for the file sees that it is gone
        for name in (OWNER, LOCK):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        lock.release()


def busy(folder: Path) -> bool:
    """Tells whether a process works in a folder now."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _acquire(lock: FileLock, folder: Path, what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            pid, host = _owner(folder)
            if (pid is not None and (host != socket.gethostname() or _alive(pid))) or time.monotonic() > deadline:
                who = f"process {pid} on {host}" if pid is not None else "another process"
                raise ValueError(
                    f"{folder}: {who} is working on this {what}; wait until it has ended, or choose another --output"
                ) from None
            time.sleep(0.1)


def _owner(folder: Path) -> tuple[int | None, str]:
    """Returns process and machine as the owner recorded them; None if it did not."""
    try:
        pid, host = (folder / OWNER).read_text(encoding="utf-8").split()
        return int(pid), host
    except (OSError, ValueError):
        return None, ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
