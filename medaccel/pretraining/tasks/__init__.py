# SPDX-License-Identifier: Apache-2.0
"""Lists the tasks by name, and the sets of them that the study compares.

Every task is a `base.PretextTask`; a loss is the sum of some, each with a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medaccel.pretraining.names import PRESETS, TASK_NAMES
from medaccel.pretraining.tasks.base import PretextTask, Step
from medaccel.pretraining.tasks.inpainting import Inpainting
from medaccel.pretraining.tasks.instance import Instance
from medaccel.pretraining.tasks.pixels import PixelContrast, PixPro
from medaccel.pretraining.tasks.rotation import Rotation

TASKS: Mapping[str, type[PretextTask]] = {
    task.name: task for task in (Inpainting, Rotation, Instance, PixelContrast, PixPro)
}
assert tuple(TASKS) == TASK_NAMES


def make_tasks(
    names: Sequence[str], settings: Mapping[str, Mapping[str, Any]], roi_size: Sequence[int]
) -> list[PretextTask]:
    """Makes the tasks of these names, in the registry's order.

    Raises:
        ValueError: names are unknown, or a task refuses its settings.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"tasks names {unknown}; expected some of {', '.join(TASKS)}")
    return [make(settings.get(name, {}), roi_size) for name, make in TASKS.items() if name in names]


__all__ = ["PRESETS", "TASKS", "PretextTask", "Step", "make_tasks"]
