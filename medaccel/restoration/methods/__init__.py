# SPDX-License-Identifier: Apache-2.0
"""The restoration methods behind one interface, `medaccel.restoration.methods.base.Method`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medaccel.restoration.methods.base import Method, Task

_HERE = "medaccel.restoration.methods."
# Where each class is: options are read, and --help is printed, without importing Lightning.
METHODS: dict[str, str] = {
    "gaussian1": _HERE + "gaussian:Gaussian1",
    "gaussian3": _HERE + "gaussian:Gaussian3",
    "gaussian_mix": _HERE + "gaussian:GaussianMixture",
    "nlm": _HERE + "classical:NonLocalMeans",
    "tv": _HERE + "classical:TotalVariation",
    "bm4d": _HERE + "classical:BM4D",
    "swin_unetr": _HERE + "swin:SwinUNETRMethod",
    "diffusion_sdedit": _HERE + "sdedit:DiffusionSDEdit",
    "diffusion_conditional": _HERE + "conditional:DiffusionConditional",
}


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises ValueError for an unknown name."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; expected one of {', '.join(METHODS)}")
    module, attribute = METHODS[name].split(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found


def make_method(name: str, task: Task, settings: Mapping[str, Any] | None = None) -> Method:
    """A method that is not fitted yet. Raises ValueError for an unknown name or setting."""
    return method_class(name)(task, settings)


def load_method(path: str | Path, expected: str | None = None) -> Method:
    """A fitted method from the file that `Method.save` wrote.

    Args:
        path: of the checkpoint.
        expected: the method that it must be of; None: any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, of another format or method, or its weights don't fit its settings.
    """
    import torch

    from medaccel.restoration.methods.base import FORMAT, Fitted, Task

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that can be read ({error}); fit the method again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: a checkpoint of format {found!r}; this version reads format {FORMAT}")
    if expected is not None and content["method"] != expected:
        raise ValueError(f"{path}: a checkpoint of {content['method']!r}; expected {expected!r}")
    task = Task(tuple(content["input_seconds"]), content["target_seconds"])
    method = make_method(content["method"], task, content["settings"])
    try:
        method.load_state(content["state"])
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: its weights do not fit {content['method']} of its settings ({error})") from error
    method.fitted = Fitted(**content["fitted"])
    return method
