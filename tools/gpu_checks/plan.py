# SPDX-License-Identifier: Apache-2.0
"""Lists the stages, made from the registry of ops."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

from gpu_checks.build import WARMERS
from gpu_checks.context import ROOT, Stage


def _registry() -> ModuleType:
    """Loads the registry alone: the package may not be built yet."""
    name = "medaccel_registry"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "medaccel" / "ops" / "_registry.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def ops() -> dict[str, Any]:
    """Returns the rows of the registry."""
    rows: dict[str, Any] = _registry().OPS
    return rows


def plan(device: str) -> list[Stage]:
    """Returns all stages of both parts, in the order in which they run."""
    dry = not device.startswith("cuda")
    rows = ops()
    kernels = {name: type(row.kernels["cuda"]).__name__ == "Kernel" for name, row in rows.items()}
    stages = [
        Stage("facts", 1, "gpu_checks.facts", 60),
        Stage("build", 1, "gpu_checks.build", 300, item_limit=300),
    ]
    # The compilers get all processors once.
    stages += [
        Stage(f"warm:{i}", 1, "gpu_checks.build", 120, item_limit=120, together=True)
        for i in range(1 if dry else WARMERS)
    ]
    stages += [Stage(f"numbers:{op}", 1, "gpu_checks.numbers", 150, together=True) for op in rows]
    if dry:
        stages += [
            Stage(
                f"executed:{op}", 1, "gpu_checks.numbers", 600, 600, together=True,
                environment={"TRITON_INTERPRET": "1"} if row.kernels["cuda"].language == "Triton" else {},
            )
            for op, row in rows.items() if kernels[op]
        ]  # fmt: skip
    stages += [Stage(f"contracts:{op}", 1, "gpu_checks.contracts", 150, together=True) for op in rows]
    # Those first whose kernels are not torch's own: time may be short.
    ordered = sorted(rows, key=lambda op: not kernels[op])
    stages += [Stage("speed:attention", 1, "gpu_checks.speed_attention", 150, item_limit=60)]
    stages += [Stage(f"speed:{op}", 1, "gpu_checks.speed", 60, item_limit=60) for op in ordered]
    stages += [
        Stage(f"sanitizer:{op}", 1, "gpu_checks.numbers", 320, item_limit=200, together=True)
        for op in rows if kernels[op]
    ]  # fmt: skip
    return [*stages, Stage("network", 2, "gpu_checks.network", 600, item_limit=200)]


def chosen(stages: list[Stage], part: str, names: list[str] | None) -> list[Stage]:
    """Returns the stages of a part, or those with one of the names or kinds; ValueError where a name has none."""
    if names:
        for name in names:
            if not any(name in (stage.name, stage.kind) for stage in stages):
                kinds = ", ".join(dict.fromkeys(stage.kind for stage in stages))
                raise ValueError(f"stage is {name!r}; expected one of {kinds}, or one with an op, as in numbers:OP")
        return [stage for stage in stages if stage.name in names or stage.kind in names]
    return [stage for stage in stages if part in ("all", str(stage.part))]
