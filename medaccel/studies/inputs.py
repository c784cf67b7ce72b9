# SPDX-License-Identifier: Apache-2.0
"""Records the input files of a run, so that data which changed between two runs of a folder is noticed.

A file is identified by its size, its time of change and the SHA-256 of its content. While size and time equal the
recorded ones, the content is not read again; if one differs, the content decides: a copied or touched file counts as
the same.
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
_NAMED = 3  # an error names this many of the files that differ

Record = dict[str, dict[str, Any]]


def record(files: Iterable[Path]) -> Record:
    """Returns size, time of change (ns) and SHA-256 of each file, by its absolute path."""
    paths = sorted({path.resolve() for path in files})
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(map(str, paths), pool.map(_known_by, paths), strict=True))


def differences(before: Record, files: Iterable[Path], *, lenient: bool = False) -> tuple[list[str], Record]:
    """Returns the differences from the recorded files, a sentence each, and the record with today's times.

    Args:
        before: the earlier result of `record`.
        files: today's files.
        lenient: ignore files that are gone or new.
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
    """Raises ValueError if `differences` has found any.

    Args:
        where: the folder of the things that were made from the files.
        noun: the name of these things.
        said: the sentences of `differences`.
        advice: what the user can do about it.
    """
    if said:
        more = f", and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
        raise ValueError(
            f"{where} holds a {noun} of other data: {', '.join(said[:_NAMED])}{more}; {advice}, or bring the earlier "
            "data back"
        )


def check_inputs(folder: Path, noun: str, files: Iterable[Path], advice: str = _ADVICE) -> None:
    """Records the files in the folder's inputs.json, or refuses files that differ from its record.

    Raises:
        ValueError: some files differ; the message names them.
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
    """Returns the record in a file.

    Raises:
        ValueError: the file holds no record.
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
