# SPDX-License-Identifier: Apache-2.0
"""Says what a stage is given, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = "not run: no GPU"


@dataclass(frozen=True)
class Stage:
    """Describes one stage: a process of its own, with a time limit.

    Attributes:
        name: "numbers:gaussian_filter"; what stands after the colon is the stage's argument.
        part: 1 or 2.
        module: the module whose `items(context)` makes its items.
        limit: seconds for the whole stage.
        item_limit: seconds for one of its items.
        together: True if it may run beside its neighbours of the same kind: it times nothing.
        environment: variables that its process gets besides.
    """

    name: str
    part: int
    module: str
    limit: float
    item_limit: float = 90.0
    together: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The name without its argument."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Context:
    """Holds what a stage knows of the run: its own name, the device, the folder of results."""

    stage: str
    device: str
    out: Path

    @property
    def argument(self) -> str:
        """What stands after the colon of the stage's name."""
        return self.stage.partition(":")[2]

    @property
    def dry(self) -> bool:
        """True on the CPU: small sizes, and what needs a GPU says that it was not run."""
        return not self.device.startswith("cuda")


@dataclass(frozen=True)
class Item:
    """Describes one step of a stage; `run` yields records, each of which is written at once."""

    name: str
    run: Callable[[], Iterable[dict[str, Any]]]


def fact(name: str, value: object, **more: Any) -> dict[str, Any]:
    """Returns the record of something measured or read that is neither right nor wrong."""
    return {"kind": "fact", "name": name, "value": value, **more}


def check(name: str, held: bool | None, note: str = "", **more: Any) -> dict[str, Any]:
    """Returns the record of a check; `held` is None where it was not run, and `note` says why."""
    return {"kind": "check", "name": name, "held": held, "note": note, **more}


def speed(work: str, contender: str, ms: float | None, **more: Any) -> dict[str, Any]:
    """Returns the record of a timing; `ms` is None where the contender could not do the work, and `note` says why."""
    return {"kind": "speed", "work": work, "contender": contender, "ms": ms, **more}
