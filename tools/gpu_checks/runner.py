# SPDX-License-Identifier: Apache-2.0
"""Runs stages, each in a process of its own with a time limit, and records how each ended.

The child announces its items; one that crashes or hangs is recorded as such, and a fresh process goes on after it.
Nothing that a stage wrote is lost by what happens to it later, or to another stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_checks import records
from gpu_checks.child import BROKEN
from gpu_checks.context import ROOT, Stage

# A stage that crashes so often is given up.
MOST_CRASHES = 8
# A child that has not announced its items by then hangs: importing torch on a cold disk takes long.
START_LIMIT = 120.0


@dataclass
class Running:
    """Holds a stage whose process runs, and what is known of it."""

    stage: Stage
    deadline: float
    process: subprocess.Popen[bytes]
    log: Path
    items: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    complete: bool = False
    crashes: int = 0
    since: float = field(default_factory=time.monotonic)  # of the last sign of life
    started: float = field(default_factory=time.monotonic)

    @property
    def current(self) -> str | None:
        """The item that is being run."""
        return self.begun[-1] if self.begun and self.begun[-1] not in self.ended else None

    def take(self, record: records.Record) -> None:
        """Notes what the process wrote."""
        self.since = time.monotonic()
        kind = record.get("kind")
        if kind == "items":
            self.items = record["items"]
        elif kind == "begin":
            self.begun.append(record["item"])
        elif kind == "end":
            self.ended.add(record["item"])
        elif kind == "complete":
            self.complete = True


class Runner:
    """Runs stages on a device, and writes into a folder.

    Args:
        out: the folder; ``results.jsonl`` and ``logs`` are made there.
        device: "cuda" or "cpu".
        seconds: for all stages together; those that would begin later are not run.
        workers: how many stages may run at once, if they time nothing.
    """

    def __init__(self, out: Path, device: str, seconds: float, workers: int):
        self.out, self.device, self.workers = out, device, workers
        self.file = out / "results.jsonl"
        self.end = time.monotonic() + seconds
        self.active: list[Running] = []
        self.tail = records.Tail(self.file, from_end=True)
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, stages: Sequence[Stage], done: Mapping[str, Sequence[str]] | None = None) -> None:
        """Runs them in their order, without the items that are `done` by stage.

        On an interrupt everything is stopped, and recorded as not run.
        """
        waiting = list(stages)
        try:
            while waiting or self.active:
                while waiting and self._may_start(waiting[0]):
                    stage = waiting.pop(0)
                    self._write(stage, kind="start")
                    if time.monotonic() >= self.end:
                        self._write(stage, kind="stage", status="not run", error="no time was left")
                        continue
                    limit = min(self.end, time.monotonic() + stage.limit)
                    self.active.append(self._start(stage, limit, (done or {}).get(stage.name, [])))
                time.sleep(0.05)
                self._look()
                for running in list(self.active):
                    self._watch(running)
        except KeyboardInterrupt:
            for running in self.active:
                self._kill(running)
                self._write(running.stage, kind="stage", status="interrupted", error="the command was interrupted")
            for stage in waiting:
                self._write(stage, kind="stage", status="not run", error="the command was interrupted")
            raise

    def _look(self) -> None:
        """Gives each running stage what its process wrote since the last look."""
        for record in self.tail.read():
            for running in self.active:
                if record.get("stage") == running.stage.name:
                    running.take(record)

    def _may_start(self, stage: Stage) -> bool:
        others = [running.stage for running in self.active]
        alike = all(other.together and other.kind == stage.kind for other in others)
        return not others or (stage.together and alike and len(others) < self.workers)

    def _write(self, stage: Stage, **record: Any) -> None:
        records.append(self.file, {**record, "stage": stage.name})

    def _start(self, stage: Stage, deadline: float, skip: Sequence[str]) -> Running:
        log = self.out / "logs" / f"{stage.name.replace(':', '-')}.log"
        order = {
            "stage": stage.name,
            "module": stage.module,
            "device": self.device,
            "out": str(self.out),
            "file": str(self.file),
            "skip": list(skip),
            "parent": os.getpid(),
        }
        paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **stage.environment}
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "gpu_checks.child", json.dumps(order)],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        return Running(stage, deadline, process, log, begun=list(skip), ended=set(skip))

    def _watch(self, running: Running) -> None:
        """Sees whether a stage has ended, crashed or hung, and goes on accordingly."""
        now = time.monotonic()
        code = running.process.poll()
        limit = running.stage.item_limit if running.items else START_LIMIT
        if code is not None:
            self._look()  # what it wrote last
            if running.complete and code == 0:
                self._finish(running, "done", "")
            else:
                self._after_crash(running, _how(code), code)
        elif now >= running.deadline:
            self._kill(running)
            self._look()
            self._finish(running, "timed out", "the stage's time was over")
        elif now - running.since >= limit:
            self._kill(running)
            self._look()
            self._after_crash(running, f"no answer for {limit:g} s", None)

    def _after_crash(self, running: Running, how: str, code: int | None) -> None:
        stage, item = running.stage, running.current
        if item is None and code != BROKEN:
            # It crashed outside of an item: another process would do the same.
            self._finish(running, "crashed", f"{how}; {_last_line(running.log)}")
            return
        if item is not None:
            status = "timed out" if code is None else "crashed"
            self._write(stage, kind="end", item=item, status=status, error=how)
            running.ended.add(item)
        if set(running.begun) >= set(running.items):
            self._finish(running, "done", "")
            return
        if running.crashes + 1 >= MOST_CRASHES:
            self._finish(running, "crashed", f"given up after {MOST_CRASHES} crashes")
            return
        again = self._start(stage, running.deadline, running.begun)
        again.items, again.ended = running.items, running.ended
        again.crashes, again.started = running.crashes + 1, running.started
        self.active[self.active.index(running)] = again

    def _finish(self, running: Running, status: str, error: str) -> None:
        if running.current is not None:
            self._write(running.stage, kind="end", item=running.current, status=status, error=error)
            running.ended.add(running.current)
        for item in running.items:
            if item not in running.begun:
                self._write(running.stage, kind="end", item=item, status="not run", error=error)
        seconds = round(time.monotonic() - running.started, 1)
        self._write(running.stage, kind="stage", status=status, error=error, seconds=seconds)
        self.active.remove(running)
        print(f"{running.stage.name:<36}{status:<12}{seconds:>7.1f} s  {error}", flush=True)

    def _kill(self, running: Running) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()


def _how(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "ended early" if code == 0 else f"ended with status {code}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
