# SPDX-License-Identifier: Apache-2.0
"""What a run was made of, file by file, so that data which changed between two runs of a folder is noticed.

A file is known by its size, its time of change and the SHA-256 of all that it holds. As long as size and time are the
recorded ones its content is not read again; where one differs, the content decides: a copied or touched file is the
same one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medaccel.studies.digest import file_sha256
from medaccel.studies.tables import write_json

INPUTS = "inputs.json"
_READERS = 4  # hashing releases the interpreter's lock; more readers than this gain nothing from a disk
_ADVICE = "choose another --output, or --force to start clean"
_NAMED = 3  # of many files that differ, this many are named

Record = dict[str, dict[str, Any]]


def record(files: Iterable[Path]) -> Record:
    """Size, time of change (ns) and SHA-256 of each file, by its absolute path."""
    paths = sorted({path.resolve() for path in files})
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(map(str, paths), pool.map(_known_by, paths), strict=True))


def differences(before: Record, files: Iterable[Path], *, lenient: bool = False) -> tuple[list[str], Record]:
    """What differs from the recorded files, a sentence each, and the record with the times of today.

    Args:
        before: of `record`.
        files: of today.
        lenient: files that are gone, or are new, don't count.
    """
    paths = {str(path.resolve()): path.resolve() for path in files}
    said, after = [], dict(before)
    for name, known in before.items():
        path = paths.get(name, Path(name))
        if not path.is_file() or (name not in paths and not lenient):
            if not lenient:
                said.append(f"{name} was there and is not now")
            continue
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (known["size"], known["mtime_ns"]):
            continue
        after[name] = _known_by(path)
        if after[name]["sha256"] != known["sha256"]:
            said.append(f"{name} has changed")
    if not lenient:
        said += [f"{name} is new" for name in paths if name not in before]
    return said, after


def refuse_changes(where: Path, noun: str, said: list[str], advice: str = _ADVICE) -> None:
    """Raises ValueError where `differences` has found any.

    Args:
        where: the folder of what was made of the files.
        noun: what that is.
        said: of `differences`.
        advice: what to do about it.
    """
    if said:
        more = f", and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
        raise ValueError(
            f"{where} holds a {noun} of other data: {', '.join(said[:_NAMED])}{more}; {advice}, or bring the earlier "
            "data back"
        )


def check_inputs(folder: Path, noun: str, files: Iterable[Path], advice: str = _ADVICE) -> None:
    """Records the files in the folder's inputs.json, or refuses those that differ from what is recorded there.

    Raises:
        ValueError: names what differs.
    """
    path, files = folder / INPUTS, list(files)
    if not path.exists():
        save(path, record(files))
        return
    before = read(path)
    said, after = differences(before, files)
    refuse_changes(folder, noun, said, advice)
    if after != before:
        save(path, after)


def read(path: Path) -> Record:
    """The record that a file holds.

    Raises:
        ValueError: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all({"size", "mtime_ns", "sha256"} <= set(known) for known in found.values()):
            return dict(found)
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"{path}: not a record of input files; delete it to record them anew")


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Writes a record, atomically."""
    write_json(path, found)


def _known_by(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_sha256(path)}
