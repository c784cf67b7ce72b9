# SPDX-License-Identifier: Apache-2.0
"""Provides the restoration methods behind one interface, `medaccel.restoration.methods.base.Method`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medaccel.restoration.methods.base import Method, RestorationTask

# Name -> module:class, imported at its first use: Lightning and MONAI take seconds.
METHODS = {
    "gaussian1": "medaccel.restoration.methods.gaussian:Gaussian1",
    "gaussian3": "medaccel.restoration.methods.gaussian:Gaussian3",
    "gaussian_mix": "medaccel.restoration.methods.gaussian:GaussianMixture",
    "nlm": "medaccel.restoration.methods.classical:NonLocalMeans",
    "tv": "medaccel.restoration.methods.classical:TotalVariation",
    "bm4d": "medaccel.restoration.methods.bm4d:BM4D",
    "bm4d_noise": "medaccel.restoration.methods.bm4d:BM4DByNoise",
    "unet": "medaccel.restoration.methods.unet:UNetMethod",
    "swin_unetr": "medaccel.restoration.methods.swin:SwinUNETRMethod",
    "diffusion_sdedit": "medaccel.restoration.methods.sdedit:DiffusionSDEdit",
    "diffusion_conditional": "medaccel.restoration.methods.conditional:DiffusionConditional",
}
# Key of a checkpoint -> its type, as `Method.save` writes it.
_KEYS = {
    "method": str,
    "input_seconds": list,
    "target_seconds": int,
    "settings": dict,
    "fitted": dict,
    "state": dict,
}


def method_class(name: str) -> type[Method]:
    """Returns the class of a method; raises ValueError if no method has that name."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; expected one of {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found


def make_method(name: str, task: RestorationTask, settings: Mapping[str, Any] | None = None) -> Method:
    """Makes a method that is not fitted yet; raises ValueError for an unknown name or setting."""
    try:
        return method_class(name)(task, settings)
    # a network raises these for impossible sizes
    except (TypeError, IndexError, KeyError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{name}: its settings {dict(settings or {})} can't be used ({reason})") from error


def load_method(path: str | os.PathLike[str], expected: str | None = None) -> Method:
    """Loads a fitted method from the file that `Method.save` wrote, onto the CPU.

    Args:
        path: the checkpoint.
        expected: the method that it must hold; None: any.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, no checkpoint, or has another format or an unknown method; the message names
            the file, its content and the expected one.
    """
    from medaccel.data.tensors import first_line
    from medaccel.restoration.methods.base import FORMAT, Fitted, RestorationTask

    content = _content(path)
    found = content.get("format")
    if found != FORMAT:
        raise ValueError(f"{path}: a checkpoint of format {found!r}; expected {FORMAT}")
    for key, kind in _KEYS.items():
        if not isinstance(content.get(key), kind):
            state = f"is a {type(content[key]).__name__}" if key in content else "is missing"
            raise ValueError(f"{path}: {key!r} {state} in this checkpoint; expected a {kind.__name__}")
    if expected is not None and content["method"] != expected:
        raise ValueError(f"{path}: a checkpoint of {content['method']!r}; expected {expected!r}")
    try:
        task = RestorationTask(tuple(content["input_seconds"]), content["target_seconds"])
        method = method_class(content["method"])(task, content["settings"])
        method.fitted = Fitted(**content["fitted"])
        method.load_state(content["state"])
    except Exception as error:  # a state of another shape or kind may raise anything
        raise ValueError(
            f"{path}: not a checkpoint of {content['method']!r} that can be used ({first_line(error)})"
        ) from error
    return method


def _content(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    from medaccel.data.tensors import load_tensors

    content = load_tensors(path, what="a checkpoint")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a method's checkpoint")
    return content
