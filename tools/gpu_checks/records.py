# SPDX-License-Identifier: Apache-2.0
"""Writes and reads the file of JSON lines to which every stage appends at once.

A record is one write to a file opened for appending, so that processes may write together. It begins with a line feed
besides ending with one: the half line of a process that was killed spoils no other record.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def plain(value: Any) -> Any:
    """Returns `value` as JSON can hold it: numbers that are not finite, and unknown objects, become text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return value if isinstance(value, str | int | bool) or value is None else str(value)


def append(path: Path, record: Record) -> None:
    """Appends one record."""
    data = f"\n{json.dumps(plain(record), ensure_ascii=False)}\n".encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, data)
    finally:
        os.close(file)


class Tail:
    """Reads the records that were appended since the last look."""

    def __init__(self, path: Path, *, from_end: bool = False):
        self.path = path
        self.offset = path.stat().st_size if from_end and path.exists() else 0
        self.rest = b""
        self.broken = 0  # lines that hold no record

    def read(self) -> list[Record]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        found = []
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                found.append(record)
            else:
                self.broken += 1
        return found


def read(path: Path) -> tuple[list[Record], int]:
    """Returns all records, and the number of lines that hold none."""
    tail = Tail(path)
    found = tail.read()
    if tail.rest.strip():  # the last line may lack its end, or its second half
        try:
            found.append(json.loads(tail.rest))
        except ValueError:
            tail.broken += 1
    return found, tail.broken


def latest(records: Iterable[Record]) -> list[Record]:
    """Returns the records without those of items and stages that were run again afterwards."""
    kept: dict[tuple[str, str | None], list[Record]] = {}
    for record in records:
        stage, item = record.get("stage", ""), record.get("item")
        if record.get("kind") in ("begin", "start"):
            kept[stage, item] = []
        kept.setdefault((stage, item), []).append(record)
    return [record for group in kept.values() for record in group]


def finished(records: Iterable[Record]) -> tuple[set[str], dict[str, list[str]]]:
    """Returns the stages that need not run again, and the finished items of each other stage."""
    complete: set[str] = set()
    unfinished: set[str] = set()
    items: dict[str, list[str]] = {}
    for record in latest(records):
        kind, stage, status = record.get("kind"), record.get("stage", ""), record.get("status")
        if kind == "end" and status in ("done", "failed"):
            items.setdefault(stage, []).append(record["item"])
        elif kind == "end":
            unfinished.add(stage)
        elif kind == "stage" and status == "done":
            complete.add(stage)
    return complete - unfinished, items
