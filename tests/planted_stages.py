# SPDX-License-Identifier: Apache-2.0
"""Holds stages for tests/test_gpu_check.py that crash, hang and write half a line, without torch."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from gpu_checks.context import Context, Item, check, fact, speed


def _crash(context: Context, how: str) -> Iterator[dict[str, Any]]:
    yield check("said before", True)
    if (context.out / "mended").exists():
        yield check("said after", True)
        return
    if how == "exit":
        os._exit(7)
    if how == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(100)
    if how == "raise":
        raise RuntimeError("a kernel's\nerror")
    if how == "half a line":
        with (context.out / "results.jsonl").open("ab") as file:
            file.write(b'\n{"kind": "check", "name": "cut o')
        os._exit(0)
    if how == "wrong":
        yield check("two is three", False, "<2> & 3", share=1.5)


def items(context: Context) -> list[Item]:
    """Returns items by the stage's argument: each word is a way to end; "fine" ends well."""
    if context.argument == "no start":
        raise SystemExit("no driver")
    if context.stage.startswith("speed:"):
        rows = [speed("work", "ours", 1.0, by="clock"), speed("work", "peer", None, note="<none>")]
        return [Item("timing", lambda: iter(rows))]
    if context.stage.startswith("environment"):
        return [Item("it", lambda: iter([fact("PLANTED", os.environ.get("PLANTED"))]))]
    if context.stage.startswith("slow"):

        def wait() -> Iterator[dict[str, Any]]:
            yield fact("began", time.monotonic())
            time.sleep(0.5)
            yield fact("ended", time.monotonic())

        return [Item("wait", wait)]
    ways = context.argument.split(",")
    return [Item(f"{number} {how}", lambda how=how: _crash(context, how)) for number, how in enumerate(ways)]
