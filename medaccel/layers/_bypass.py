# SPDX-License-Identifier: Apache-2.0
"""Decides whether a layer's children are still the ones that its kernel stands in for.

A drop-in layer skips some of its children and reads their parameters instead. Users edit models after `accelerate`:
they exchange an activation, add hooks, adapters, weight norm or quantised layers. So each layer class has one table
of the children that it bypasses; `accelerate` reports from it, every forward checks it, the tests are made from it.
"""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _nn_module

# A hook for all modules of the process would not see a child that is skipped.
_GLOBAL_HOOKS = (
    _nn_module._global_forward_hooks,
    _nn_module._global_forward_pre_hooks,
    _nn_module._global_backward_hooks,
    _nn_module._global_backward_pre_hooks,
)


@dataclass(frozen=True)
class Child:
    """One child that a layer computes without calling it.

    Attributes:
        path: the child's path from the layer: "norm1", "attn.softmax".
        types: the exact classes that the kernel stands in for.
        expected: these classes in words, for the report.
        values: a function that returns None if the kernel serves the child's settings, else these settings in words.
        optional: True if the layer may lack the child.
    """

    path: str
    types: tuple[type[nn.Module], ...]
    expected: str
    values: Callable[[Any], str | None] | None = None
    optional: bool = False
    names: tuple[str, ...] = field(init=False)
    forwards: dict[type[nn.Module], Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.path.split(".")))
        object.__setattr__(self, "forwards", {kind: kind.forward for kind in self.types})


def problem(layer: nn.Module, children: tuple[Child, ...]) -> str | None:
    """Describes, for a report, the first bypassed child of `layer` that is not stock; returns None if all of them
    are.

    A child is stock where its class is exactly the expected one, it has no hooks, and its `forward` is the class's.
    Parametrizations, pruning, weight norm, adapters and quantisation all change one of these.
    """
    if global_hooks():
        return "hooks for all modules are registered, which its children would not call"
    for child in children:
        found: Any = layer
        for name in child.names:
            attributes = found.__dict__
            if name in attributes:  # hides the registered child
                found = attributes[name]
                if not isinstance(found, nn.Module):
                    break
            else:
                found = attributes["_modules"].get(name)
                if found is None:
                    break
        if found is None and child.optional:
            continue
        kind = type(found)
        if kind not in child.types:
            return f"its {child.path} is a {kind.__name__}; expected {child.expected}"
        if found._forward_hooks or found._forward_pre_hooks or found._backward_hooks or found._backward_pre_hooks:
            return f"its {child.path} has hooks, which would not be called"
        _ = found.forward  # torch.compile guards each attribute that is looked up: a later replacement recompiles
        if "forward" in found.__dict__ or kind.forward is not child.forwards[kind]:
            return f"its {child.path}'s forward has been replaced"
        if child.values is not None and (value := child.values(found)) is not None:
            return f"its {child.path} {value}"
    return None


def global_hooks() -> bool:
    """Tells whether torch calls hooks on every module of the process."""
    return any(map(bool, _GLOBAL_HOOKS))


_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def warn_once(layer: nn.Module, reason: str) -> None:
    """Warns that `layer` runs MONAI's forward, once per layer and reason (once per class while it is compiled)."""
    if torch.compiler.is_compiling():
        _warn_while_compiling(type(layer).__name__, reason)
    elif reason not in _warned.setdefault(layer, set()):
        _warned[layer].add(reason)
        _warn(type(layer).__name__, reason)


def _warn(name: str, reason: str) -> None:
    warnings.warn(
        f"medaccel: a {name} runs MONAI's own forward: {reason}. medaccel.accelerate(model) lists such layers",
        stacklevel=2,
    )


_warned_while_compiling: set[tuple[str, str]] = set()


def _warn_while_compiling(name: str, reason: str) -> None:
    if (name, reason) not in _warned_while_compiling:
        _warned_while_compiling.add((name, reason))
        _warn(name, reason)


# torch.compile calls this function while it traces; it could not trace into the warning.
_warn_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def number(value: object) -> bool:
    """Tells whether a setting is a plain number, which a kernel can take; a tensor may need a gradient."""
    return type(value) is float or type(value) is int
