# SPDX-License-Identifier: Apache-2.0
"""Runs `medaccel verify`: every kernel against its reference on the devices of this machine, errors and speed.

CI has no GPU, so this command checks the user's: numbers on the hardware, then speed against plain PyTorch (and
MONAI, if it is installed) and the share of the machine's ceiling: a copy's bandwidth, or a matrix product's rate.
On a GPU a kernel's bits are held to more: repeats, dirty memory, another stream, a CUDA graph, no waiting.
It needs torch, numpy and the built modules, nothing else: ``python -m medaccel.verify`` runs in a bare container
(tools/build_in_place builds there). Its JSON belongs into a bug report. The checks of each op are in the
``verify.py`` of its folder.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from medaccel._doctor import doctor
from medaccel.ops._checks import Check, Speed, Verifier
from medaccel.ops._isolated import isolated
from medaccel.ops._registry import OPS


def _peer(milliseconds: float | None, kernel_ms: float) -> str:
    """Formats a peer's time, and how many times the kernel's it is."""
    if milliseconds is None:
        return f"{'not here':>19}"
    return f"{milliseconds:>8.2f} ms{milliseconds / kernel_ms:>7.1f}×"


@dataclass
class Verification:
    """Holds the outcome; `str()` prints it, `json()` is for a bug report."""

    machine: list[tuple[str, str]]
    checks: list[Check] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def json(self) -> str:
        content = {
            "machine": dict(self.machine),
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "speeds": [asdict(speed) for speed in self.speeds],
        }
        return json.dumps(content, indent=1) + "\n"

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine] + [""]
        lines.append(
            f"{'op':<26}{'device':<8}{'dtype':<10}{'cases':>6}{'failed':>8}{'worst error / allowed':>23}  served by"
        )
        key = lambda c: (c.op, c.device, c.dtype, c.kernel)  # noqa: E731
        for (op, device, dtype, kernel), group in itertools.groupby(sorted(self.checks, key=key), key):
            checks = list(group)
            failed = sum(not c.passed for c in checks)
            worst = max(c.share for c in checks)
            lines.append(f"{op:<26}{device:<8}{dtype:<10}{len(checks):>6}{failed:>8}{worst:>23.2f}  {kernel}")
        lines += [
            f"FAILED {c.op} {c.device} {c.dtype} {c.case}: {c.fault or f'{c.share:.3g}'}"
            for c in self.checks
            if not c.passed
        ]
        lines += [
            "",
            f"{'op':<26}{'device':<8}{'case':<36}{'kernel':>11}{'PyTorch':>11}{'ratio':>8}{'MONAI':>11}{'ratio':>8}"
            f"{'of ceiling':>18}",
        ]
        for s in self.speeds:
            lines.append(
                f"{s.op:<26}{s.device:<8}{s.case:<36}{s.kernel_ms:>8.2f} ms{_peer(s.pytorch_ms, s.kernel_ms)}"
                f"{_peer(s.monai_ms, s.kernel_ms)}{100 * s.ceiling_share:>5.0f}% of {s.ceiling}"
            )
        lines += ["", "all held" if self.passed else "SOME KERNELS GIVE WRONG NUMBERS HERE: please report the JSON"]
        return "\n".join(lines)


def check_devices(names: Sequence[str]) -> None:
    """Raises ValueError unless all are devices that kernels are for and that torch sees here."""
    if not names:
        raise ValueError("devices is empty; expected some, such as cpu or cuda:0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    for name in names:
        try:
            device = torch.device(name)
        except (RuntimeError, TypeError):
            device = None
        if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise ValueError(f"devices names {name!r}, for which there are no kernels; expected some of {there}")
        if device.type == "cuda" and (device.index or 0) >= count:
            seen = f"torch sees {count} GPUs here" if count else "torch sees no GPU here"
            raise ValueError(f"devices names {name!r}, but {seen}; expected some of {there}")


def verify(*, devices: list[str] | None = None, speed: bool = True) -> Verification:
    """Runs everything on the devices given, by default the CPU and each GPU that torch sees.

    On a GPU each op has a process of its own: a check that crashes or hangs fails, and takes no other with it.

    Raises:
        ValueError: `check_devices` refuses the devices.
    """
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if devices is None else devices
    check_devices(names)
    outcome = Verification(doctor().facts)
    verifiers: dict[str, Verifier] = {name: op.load("verifier") for name, op in OPS.items()}
    for device in map(torch.device, names):
        if device.type == "cuda":
            for name in verifiers:
                for result in isolated(name, device, speed):
                    if isinstance(result, Speed):
                        outcome.speeds.append(result)
                    else:
                        outcome.checks.append(result)
            continue
        for verifier in verifiers.values():
            outcome.checks += verifier.checks(device)
        for verifier in verifiers.values() if speed else ():
            outcome.speeds += verifier.speeds(device)
    return outcome


if __name__ == "__main__":
    result = verify()
    print(result)
    sys.exit(0 if result.passed else 1)
