# SPDX-License-Identifier: Apache-2.0
"""Checks settings before any work: their names, the type of each value, and the abilities of this machine.

Names and types are `typed`'s; here is what the pipelines share beyond that: the settings of every network's training,
and checks of seeds, records and devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from medaccel.studies.typed import (
    Count,
    CountFromZero,
    Limit,
    NotNegative,
    Positive,
    Settings,
    UnfitError,
    check_fields,
    converted,
    hints_of,
    nearest,
)

__all__ = [
    "TRAINING",
    "Settings",
    "TrainingSettings",
    "UnfitError",
    "before_work",
    "check_accelerator",
    "check_fields",
    "check_keys",
    "check_seeds_range",
    "check_written",
    "converted",
    "hints_of",
    "nearest",
]

# These are Lightning's names; Lightning itself says if a device doesn't support one.
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
_CACHES = ("memory", "disk", "none")
_LARGEST_SEED = 2**31 - 1  # leaves room for numbers that are added to a seed


class _Strategy(Limit):
    """The strategies are Lightning's, which is asked only about another one than "auto"."""

    def __init__(self) -> None:
        super().__init__(lambda _: True, 'one of Lightning\'s strategies, such as "auto" or "ddp"')

    def refusal(self, value: Any) -> str | None:
        if value == "auto":
            return None
        from lightning.pytorch.strategies import StrategyRegistry

        known = ("auto", *StrategyRegistry.available_strategies())
        return None if value in known else f"one of {', '.join(known)}{nearest(value, known)}"


#: The decay of a running average.
Decay = Annotated[float, Limit(lambda x: 0 <= x < 1, "a number from 0 to below 1")]
_Accelerator = Annotated[str, Limit(lambda v: v in _ACCELERATORS, f"one of {', '.join(_ACCELERATORS)}")]
_Precision = Annotated[str, Limit(lambda v: v in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}")]
_Cache = Annotated[str, Limit(lambda v: v in _CACHES, f"one of {', '.join(_CACHES)}")]
_StrategyName = Annotated[str, _Strategy()]


@dataclass(frozen=True, eq=False)
class TrainingSettings(Settings):
    """Holds the settings of every network's training.

    Args:
        steps: optimizer steps, a multiple of steps_per_epoch.
        steps_per_epoch: optimizer steps that are called an epoch, in the log and on the progress bar.
        batch_size: items of a step, over all processes.
        learning_rate: AdamW's largest learning rate, which is reached after the warm-up.
        weight_decay: AdamW's weight decay.
        warm_up: steps in which the learning rate rises to its largest.
        ema_decay: decay of the running average of the weights that is kept; 0 keeps the last weights.
        gradient_clip: largest norm of the gradient; null and 0 clip nothing.
        checkpoint_minutes: minutes between the checkpoints that an interrupted training goes on from.
        cache: where the training data are kept.
        num_workers: processes that prepare items; 0 prepares them in the training's own.
        accelerator: Lightning's accelerator.
        strategy: how several devices share the training.
        precision: Lightning's precision.
    """

    steps: Count = 600
    steps_per_epoch: Count = 25
    batch_size: Count = 1
    learning_rate: Positive = 2e-3
    weight_decay: NotNegative = 0.01
    warm_up: CountFromZero = 30
    ema_decay: Decay = 0.99
    gradient_clip: NotNegative | None = 1.0
    checkpoint_minutes: NotNegative = 2.0
    cache: _Cache = "memory"
    num_workers: CountFromZero = 0
    accelerator: _Accelerator = "auto"
    strategy: _StrategyName = "auto"
    precision: _Precision = "32-true"


#: Settings of every network's training, and their defaults.
TRAINING: dict[str, Any] = TrainingSettings.defaults()


@contextmanager
def before_work() -> Iterator[None]:
    """Marks errors of the block as raised before anything was made or removed: the command's exit status is 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        error.exit_status = 2  # type: ignore[union-attr]
        raise


def check_keys(whose: str, given: Any, known: Collection[str]) -> None:
    """Raises ValueError unless `given` is a mapping whose keys are all known."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{whose} is {given!r}; expected some of {', '.join(sorted(known))}, by name")
    unknown = sorted(str(key) for key in given if key not in known)
    if unknown:
        expected = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{whose} names {unknown}; expected some of {expected}{nearest(unknown[0], known)}")


def check_seeds_range(name: str, *seeds: int) -> None:
    """Raises ValueError for seeds that some generator refuses, such as Lightning's with its 32 bits."""
    for seed in seeds:
        if not 0 <= seed <= _LARGEST_SEED:
            raise ValueError(f"{name} is {seed}; expected a whole number from 0 to {_LARGEST_SEED}")


def check_written(record: Path, values: Mapping[str, Any], config: Any) -> None:
    """Raises ValueError if a run's record holds options that the dataclass `config` doesn't have."""
    known = [field.name for field in dataclasses.fields(config)]
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(
            f"{record}: holds options that are unknown: {', '.join(unknown)}{nearest(unknown[0], known)}"
        )


def check_accelerator(name: str, value: str) -> None:
    """Raises ValueError if this machine doesn't have the accelerator that is asked for."""
    if value in ("gpu", "cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"{name} is {value!r}, but torch sees no GPU here; expected auto or cpu")
