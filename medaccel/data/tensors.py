# SPDX-License-Identifier: Apache-2.0
"""Files of tensors, as `torch.save` writes them, read after their checksums have been verified.

`torch.load` verifies none: a flipped byte in a weight is a wrong weight, and one in the archive's directory can be
memory that nobody wrote.
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
_DIRECTORY = 0x10  # of a member's attributes, as DOS has them; torch reads nothing of a folder, and says nothing
_MOST_RATIO = 64  # torch stores without compression; who packs an archive again gains little with weights


def load_tensors(
    path: str | os.PathLike[str],
    *,
    what: str = "a file of tensors",
    map_location: str | torch.device | None = "cpu",
    mmap: bool = False,
) -> Any:
    """What a file of `torch.save` holds, without running any code of the file's.

    Args:
        path: the file. Archives, as torch writes since 1.6, have checksums; older files have none to verify.
        what: it is expected to be, for messages.
        map_location: device of the tensors.
        mmap: leave them on disk, and read what is looked at; nothing is verified then (`check_tensors` does).

    Raises:
        OSError: no such file, or it may not be read.
        ValueError: a folder, pipe or device; a file that is damaged, cut short or of another kind, or that holds more
            than tensors and plain values. The message names the file.
    """
    import torch

    path = check_input(path)
    if not mmap and (fault := archive_fault(path)) is not None:
        raise ValueError(f"{path}: not {what} that can be read ({fault})")
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # an unpickler of damaged bytes can stumble in any way
        # torch's own sentence on what it doesn't load is the advice to run the file's code.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {found[1]}, where tensors and plain values are expected" if found else first_line(error)
        raise ValueError(f"{path}: not {what} that can be read ({reason})") from error


def check_tensors(path: str | os.PathLike[str]) -> None:
    """Verifies that a file of tensors of our own, hence an archive, is whole.

    Raises:
        OSError: as `check_input`.
        ValueError: it is no archive, cut short, or a checksum is wrong; the message names the file.
    """
    path = check_input(path)
    fault = archive_fault(path) if zipfile.is_zipfile(path) else "no archive, or cut short"
    if fault is not None:
        raise ValueError(f"{path}: not a file of tensors that can be read ({fault})")


def archive_fault(path: Path) -> str | None:
    """What is wrong with an archive, in a sentence; None for a whole one, and for what is no archive at all.

    That is a file of before torch 1.6, or none of torch's: `torch.load` tells.
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
    """An error in one line; torch's have many, with advice that doesn't fit."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
