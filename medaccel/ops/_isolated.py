# SPDX-License-Identifier: Apache-2.0
"""Runs one op's part of `medaccel verify` in a process of its own: ``python -m medaccel.ops._isolated OP DEVICE FIRST
SPEED``.

A kernel that reads beyond its memory makes every later CUDA call of its process fail, and one that loops for ever
ends nothing. Here the check that crashed or hung is the one that failed: a fresh process goes on after it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from medaccel.ops._checks import FLOOR, Check, Speed, Verifier, dtype_name
from medaccel.ops._registry import OPS

# A check takes seconds; the first call of a Triton kernel compiles it.
LIMIT_S = 180.0
# An op that crashes so often is given up; what was left counts as failed.
MOST_CRASHES = 5

_Write = Callable[[dict[str, Any]], None]


# --- the child's side --------------------------------------------------------------------------------------------
def serve(verifier: Verifier, op: str, device: torch.device, first: int, speed: bool, write: _Write) -> None:
    """Runs the checks from number `first` on, and then the timings; each outcome is written at once.

    Where an exception leaves the GPU unusable, the process ends, and the caller starts another.
    """
    items = [(dtype, case) for dtype in FLOOR for case in verifier.cases]
    for number, (dtype, case) in enumerate(items[first:], first):
        write({"begin": number, "dtype": dtype_name(dtype), "case": case})
        try:
            check = verifier.check(device, dtype, case)
        except Exception as error:
            check = _failed(op, device, dtype_name(dtype), case, f"{type(error).__name__}: {_first_line(error)}")
        write({"check": asdict(check)})
        _end_if_broken(device)
    if speed and first <= len(items):
        write({"begin": len(items), "dtype": "", "case": "timings"})
        try:
            for one in verifier.speeds(device):
                write({"speed": asdict(one)})
        except Exception as error:
            what = f"{type(error).__name__}: {_first_line(error)}"
            write({"check": asdict(_failed(op, device, "", "timings", what))})
    write({"end": True})


def _end_if_broken(device: torch.device) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise SystemExit(f"the GPU can't be used any more: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _failed(op: str, device: torch.device, dtype: str, case: str, fault: str) -> Check:
    return Check(op, str(device), dtype, case, "its kernel", float("inf"), False, fault)


# --- the caller's side -------------------------------------------------------------------------------------------
def isolated(
    op: str,
    device: torch.device,
    speed: bool,
    command: Sequence[str] = (sys.executable, "-m", "medaccel.ops._isolated"),
    limit: float = LIMIT_S,
) -> Iterator[Check | Speed]:
    """Yields what `serve` writes in processes of their own, and a failed check for each that crashed or hung."""
    first, crashes = 0, 0
    while True:
        at: dict[str, Any] = {"begin": first, "dtype": "", "case": "start"}
        begun = answered = False
        with tempfile.TemporaryFile("w+") as errors:
            child = _Child([*command, op, str(device), str(first), str(int(speed))], errors)
            for record in child.records(limit):
                if record.get("end"):
                    child.finish()
                    return
                if "begin" in record:
                    at, begun, answered = record, True, False
                elif "check" in record:
                    answered = True
                    yield Check(**record["check"])
                elif "speed" in record:
                    yield Speed(**record["speed"])
            how = child.finish(limit)
            errors.seek(0)
            said = [line for line in errors.read().splitlines() if line.strip()][-1:]
        crashes += 1
        first = at["begin"] + 1
        if not answered:
            yield _failed(op, device, at["dtype"], at["case"], "; ".join([how, *said]))
        if not begun:
            return
        if crashes >= MOST_CRASHES:
            yield _failed(op, device, "", "the checks that were left", f"not run after {crashes} crashes")
            return


class _Child:
    """Holds a process whose standard output is JSON lines."""

    def __init__(self, command: Sequence[str], errors: IO[str]):
        package = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.hung = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def records(self, limit: float) -> Iterator[dict[str, Any]]:
        """Yields the records until the process ends or writes nothing for `limit` seconds; half lines are skipped."""
        while True:
            try:
                line = self.lines.get(timeout=limit)
            except queue.Empty:
                self.hung = True
                return
            if line is None:
                return
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def finish(self, limit: float = LIMIT_S) -> str:
        """Ends the process, and says how it ended."""
        if not self.hung:
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.hung = True
        if self.hung:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return f"no answer for {limit:g} s"
        code = self.process.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"ended with status {code}"


if __name__ == "__main__":
    name, where, start, timed = sys.argv[1:]
    # Whatever else is printed goes to the errors: the output is for records.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write_line(record: dict[str, Any]) -> None:
        output.write(json.dumps(record) + "\n")
        output.flush()

    serve(OPS[name].load("verifier"), name, torch.device(where), int(start), timed == "1", write_line)
