# SPDX-License-Identifier: Apache-2.0
"""Reads files of tensors, as `torch.save` writes them, after verifying their checksums.

`torch.load` verifies none: a flipped byte in a weight gives a wrong weight, and one in the archive's directory can
give uninitialised memory.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medaccel.data.files import check_input

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 20
_DIRECTORY = 0x10  # DOS attribute of a folder; torch silently reads nothing from a member that has it
_MOST_RATIO = 64  # torch stores without compression, and compressing weights gains little


def load_tensors(
    path: str | os.PathLike[str],
    *,
    what: str = "a file of tensors",
    map_location: str | torch.device | None = "cpu",
    mmap: bool = False,
) -> Any:
    """Loads the content of a file of `torch.save` without running any code in the file.

    Args:
        path: the file. Archives, as torch writes since 1.6, have checksums; older files have none to verify.
        what: the expected kind of file, for messages.
        map_location: device of the tensors.
        mmap: leave the tensors on disk, and read them when they are used; nothing is verified then (`check_tensors`
            does).

    Raises:
        OSError: the file does not exist, or may not be read.
        ValueError: the path is a folder, pipe or device; the file is damaged, cut short or of another kind, or holds
            more than tensors and plain values. The message names the file.
    """
    import torch

    path = check_input(path)
    if not mmap and (fault := archive_fault(path)) is not None:
        raise ValueError(f"{path}: not {what} that can be read ({fault})")
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # an unpickler of damaged bytes can stumble in any way
        # torch's own message about content that it refuses advises running the file's code.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {found[1]}, where tensors and plain values are expected" if found else first_line(error)
        raise ValueError(f"{path}: not {what} that can be read ({reason})") from error


def check_tensors(path: str | os.PathLike[str]) -> None:
    """Verifies that a file of tensors which this package wrote, hence an archive, is whole.

    Raises:
        OSError: `check_input` refuses the path.
        ValueError: the file is no archive, is cut short, or has a wrong checksum; the message names the file.
    """
    path = check_input(path)
    fault = archive_fault(path) if zipfile.is_zipfile(path) else "no archive, or cut short"
    if fault is not None:
        raise ValueError(f"{path}: not a file of tensors that can be read ({fault})")


def archive_fault(path: Path) -> str | None:
    """Says in a sentence what is wrong with an archive; returns None for a whole one, and for a file that is no
    archive.

    A file that is no archive is older than torch 1.6, or not torch's: `torch.load` says which.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > _MOST_RATIO * path.stat().st_size:
                return "it unpacks to far more than it holds"
            for member in members:
                if member.is_dir() or member.external_attr & _DIRECTORY:
                    return f"damaged: {member.filename} is a folder in it"
                with archive.open(member) as stream:
                    while stream.read(_PIECE):
                        pass  # a wrong checksum raises at the end
    except Exception as error:  # zipfile can stumble in many ways, such as a seek to nowhere
        return f"damaged or cut short: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """Shortens an error to one line; torch's have many, with advice that doesn't fit."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
