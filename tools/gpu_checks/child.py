# SPDX-License-Identifier: Apache-2.0
"""Runs one stage: ``python -m gpu_checks.child`` with a JSON object as its argument. `runner` starts it."""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from gpu_checks import records
from gpu_checks.context import Context

# The process ended because an error left the GPU unusable: the runner goes on in a fresh one.
BROKEN = 3


def _die_with_parent(parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the command that started this stage is gone")


def _is_broken(device: str) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(order: dict[str, Any]) -> int:
    """Runs the items that the order does not skip."""
    _die_with_parent(order["parent"])
    context = Context(order["stage"], order["device"], Path(order["out"]))
    file = Path(order["file"])

    def write(**record: Any) -> None:
        records.append(file, {**record, "stage": context.stage})

    items = importlib.import_module(order["module"]).items(context)
    if len({item.name for item in items}) != len(items):
        raise ValueError(f"{context.stage}: two items have the same name")
    write(kind="items", items=[item.name for item in items])
    skipped = set(order["skip"])
    for item in items:
        if item.name in skipped:
            continue
        write(kind="begin", item=item.name)
        try:
            for record in item.run():
                write(item=item.name, **record)
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            write(kind="end", item=item.name, status="failed", error=what)
        else:
            write(kind="end", item=item.name, status="done")
        if _is_broken(context.device):
            return BROKEN
    write(kind="complete")
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
