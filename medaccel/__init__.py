# SPDX-License-Identifier: Apache-2.0
"""Provides fast kernels for 3-D medical imaging, and the pipelines built on them.

``import medaccel`` loads torch and the compiled CPU kernels and nothing else: MONAI, Lightning and the pipelines are
imported when they are first used.
"""

import importlib
from typing import Any

from medaccel import ops
from medaccel._accelerate import AccelerationReport, accelerate, revert
from medaccel._doctor import doctor, explain
from medaccel._version import __version__ as __version__
from medaccel.ops import use_reference

_LAZY = ("data", "diffusion", "layers", "losses", "nets", "report", "restoration")
__all__ = ["AccelerationReport", "accelerate", "doctor", "explain", "ops", "revert", "use_reference", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"medaccel.{name}")
    raise AttributeError(f"module 'medaccel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
