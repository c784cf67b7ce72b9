# SPDX-License-Identifier: Apache-2.0
"""Checks settings before any work: their names, the type of each value, and the abilities of this machine.

Types come from annotations (`check_fields`, `converted`) or from the defaults that a group of settings has
(`check_group`). A value that does not fit is refused in a sentence with its name, itself and what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

#: Settings of every network's training, and their defaults.
TRAINING: dict[str, Any] = {
    "steps": 600,  # optimizer steps
    "steps_per_epoch": 25,
    "batch_size": 1,  # over all processes
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "warm_up": 30,  # steps
    "ema_decay": 0.99,  # decay of the running average of the weights; 0: no average
    "gradient_clip": 1.0,  # None or 0: no clipping
    "checkpoint_minutes": 2.0,
    "cache": "memory",
    "num_workers": 0,
    "accelerator": "auto",
    "strategy": "auto",
    "precision": "32-true",
}
# These are Lightning's names; Lightning itself says if a device doesn't support one.
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (lambda v: v >= 1, "a whole number >= 1"),
    "steps_per_epoch": (lambda v: v >= 1, "a whole number >= 1"),
    "batch_size": (lambda v: v >= 1, "a whole number >= 1"),
    "learning_rate": (lambda v: v > 0, "a number above 0"),
    "weight_decay": (lambda v: v >= 0, "a number >= 0"),
    "warm_up": (lambda v: v >= 0, "a whole number >= 0"),
    "ema_decay": (lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    "gradient_clip": (lambda v: v >= 0, "a number >= 0"),
    "checkpoint_minutes": (lambda v: v >= 0, "a number >= 0"),
    "num_workers": (lambda v: v >= 0, "a whole number >= 0"),
    "accelerator": (lambda v: v in _ACCELERATORS, f"one of {', '.join(_ACCELERATORS)}"),
    "precision": (lambda v: v in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}"),
}
_LARGEST_SEED = 2**31 - 1  # leaves room for numbers that are added to a seed
_COUNTED = {2: "two", 3: "three", 4: "four"}


@contextmanager
def before_work() -> Iterator[None]:
    """Marks errors of the block as raised before anything was made or removed: the command's exit status is 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        error.exit_status = 2  # type: ignore[union-attr]
        raise


def nearest(name: str, known: Collection[str]) -> str:
    """Returns a question after the known name that is most like an unknown one; empty if no name is like it."""
    found = difflib.get_close_matches(str(name), [str(other) for other in known], n=1)
    return f" (did you mean {found[0]}?)" if found else ""


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


def check_group(whose: str, given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Completes and checks a group of settings: each has its default's type, and those of `TRAINING` are in their
    range.

    The accelerator is not checked here but by `check_accelerator`, because a checkpoint may come from another
    machine.

    Args:
        whose: the beginning of a message.
        given: values by name. A default of None has an unknown type, so its setting is not checked.
        defaults: names and defaults of the group.

    Raises:
        ValueError: `given` is no mapping, has an unknown name, or a value of another type or out of range.
    """
    check_keys(whose, given, defaults)
    values: dict[str, Any] = {}
    for key, value in given.items():
        hint = hint_of(defaults[key])
        if key == "gradient_clip" and value is None:
            values[key] = None
            continue
        name = f"{whose}: {key}"
        if key in TRAINING and key in _RANGES:
            fits, expected = _RANGES[key]
            try:
                converted_value = converted(name, value, hint)
            except ValueError as error:
                raise ValueError(f"{name} is {value!r}; expected {expected}") from error
            if not fits(converted_value):
                raise ValueError(f"{name} is {value!r}; expected {expected}")
        else:
            converted_value = converted(name, value, hint)
        if key == "strategy" and converted_value != "auto":
            _check_strategy(name, converted_value)
        values[key] = list(converted_value) if isinstance(converted_value, tuple) else converted_value
    return values


def check_accelerator(name: str, value: str) -> None:
    """Raises ValueError if this machine doesn't have the accelerator that is asked for."""
    if value in ("gpu", "cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"{name} is {value!r}, but torch sees no GPU here; expected auto or cpu")


def _check_strategy(name: str, value: str) -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    known = ("auto", *StrategyRegistry.available_strategies())
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}{nearest(value, known)}")


def hint_of(default: Any) -> Any:
    """Returns the type that a default stands for."""
    if default is None:
        return Any
    if isinstance(default, list | tuple):
        inner = {hint_of(entry) for entry in default}
        return tuple[inner.pop() if len(inner) == 1 else Any, ...]  # type: ignore[misc]
    return dict[str, Any] if isinstance(default, dict) else type(default)


def check_fields(options: Any) -> None:
    """Converts the fields of a frozen dataclass to their annotated types, such as lists to tuples and text to paths.

    Raises:
        ValueError: a value has another type.
    """
    kind: Any = type(options)
    for name, hint in hints_of(kind).items():
        object.__setattr__(options, name, converted(name, getattr(options, name), hint))


@cache
def hints_of(target: Any) -> dict[str, Any]:
    """Returns the annotations of a dataclass's fields or of a function's parameters, as types."""
    if dataclasses.is_dataclass(target):
        return typing.get_type_hints(target)
    function = target.__init__ if inspect.isclass(target) else target
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, function.__globals__)
            except NameError:  # imported for type checkers alone
                hint = Any
        found[name] = Any if hint is inspect.Parameter.empty else hint
    return found


def converted(name: str, value: Any, hint: Any) -> Any:
    """Converts a value to the type `hint`: lists may be given as lists, as text with commas, or as their only entry.

    Args:
        name: the beginning of a message.
        value: a plain value, such as YAML gives.
        hint: a type. A type that is unknown here, such as a class, takes any value.

    Raises:
        ValueError: the value isn't of that type.
    """
    try:
        return _converted(value, hint)
    except _UnfitError as unfit:
        where = "".join(f".{key}" for key in unfit.path)
        raise ValueError(f"{name}{where} is {unfit.value!r}; expected {describe(unfit.hint)}") from None


def describe(hint: Any) -> str:
    """Describes a type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in inner if one is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if _is_list(hint):
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            return f"{_COUNTED.get(len(inner), len(inner))} {_plural(inner[0])}"
        return f"a list of {_plural(inner[0])}" if inner else "a list"
    if origin in (dict, Mapping) or hint is dict:
        return "settings by name, {name: value}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return words.get(hint, "another value")


def _plural(hint: Any) -> str:
    words = {bool: "true or false", int: "whole numbers", float: "numbers", str: "names", Path: "paths"}
    if _is_list(hint):
        return f"lists of {describe(hint)}"
    return words.get(hint, "values")


def _is_list(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    return origin in (tuple, list, Sequence)


class _UnfitError(Exception):
    def __init__(self, value: Any, hint: Any, path: Sequence[str] = ()) -> None:
        super().__init__()
        self.value, self.hint, self.path = value, hint, tuple(path)


def _converted(value: Any, hint: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, hint, inner)
    if origin is Literal:
        if value not in inner:
            raise _UnfitError(value, hint)
        return value
    if _is_list(hint):
        return _listed(value, hint, inner)
    if origin in (dict, Mapping) or hint is dict:
        return _mapped(value, hint, inner)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    if hint in (bool, int, float, str, Path):
        raise _UnfitError(value, hint)
    return value


def _first_that_fits(value: Any, hint: Any, options: Sequence[Any]) -> Any:
    if value is None:
        if type(None) in options:
            return None
        raise _UnfitError(value, hint)
    # A scalar is tried first: it would pass for a list of one.
    for option in sorted((one for one in options if one is not type(None)), key=_is_list):
        try:
            return _converted(value, option)
        except _UnfitError as unfit:
            last = unfit
    raise last if len(options) == 1 + (type(None) in options) else _UnfitError(value, hint)


def _listed(value: Any, hint: Any, inner: Sequence[Any]) -> Any:
    entry = inner[0] if inner else Any
    fixed = len(inner) if typing.get_origin(hint) is tuple and inner and inner[-1] is not Ellipsis else None
    entries = value
    if isinstance(value, str):
        entries = [_scalar(part.strip(), entry) for part in value.split(",") if part.strip()]
    elif not isinstance(value, list | tuple):
        if value is None or isinstance(value, Mapping):
            raise _UnfitError(value, hint)
        entries = [value]
    if _is_list(entry) and entries and not any(isinstance(one, list | tuple) for one in entries):
        entries = [entries]  # one entry of several numbers
    if fixed is not None and len(entries) != fixed:
        raise _UnfitError(value, hint)
    try:
        found = [_converted(one, entry) for one in entries]
    except _UnfitError as unfit:
        raise _UnfitError(value, hint) from unfit
    return found if typing.get_origin(hint) is list else tuple(found)


def _scalar(text: str, hint: Any) -> Any:
    """Converts a part of a text with commas: to a number if the list holds numbers."""
    if hint in (int, float, Any) or _is_list(hint):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _mapped(value: Any, hint: Any, inner: Sequence[Any]) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _UnfitError(value, hint)
    found = {}
    for key, entry in value.items():
        try:
            found[key] = _converted(entry, inner[1] if len(inner) == 2 else Any)
        except _UnfitError as unfit:
            raise _UnfitError(unfit.value, unfit.hint, (str(key), *unfit.path)) from None
    return found
