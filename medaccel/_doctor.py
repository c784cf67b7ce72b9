# SPDX-License-Identifier: Apache-2.0
"""`medaccel doctor`: what is installed, what is built, and which kernel serves each op on each device."""

import importlib.metadata
import platform
import sys
from dataclasses import dataclass

import torch

from medaccel import _native
from medaccel.ops import gaussian

# op -> what says why no kernel serves a tensor
OPS = {"gaussian_filter": gaussian.unsupported}


@dataclass
class Diagnosis:
    """Facts (name, value) and the table of kernels (op, device, what serves); `str()` gives the printed form."""

    facts: list[tuple[str, str]]
    kernels: list[tuple[str, str, str]]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts]
        header = ("op", "device", "kernel")
        rows = [header, *self.kernels]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines += [""] + [f"{op:<{widths[0]}}  {device:<{widths[1]}}  {kernel}" for op, device, kernel in rows]
        return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_fact() -> str:
    if _native.cpu is None:
        return f"no native module: {_native.cpu_problem}"
    supported = ", ".join(_native.cpu.supported_isas())
    return f"{_native.cpu.isa} in use (this processor runs: {supported}), {torch.get_num_threads()} thread(s)"


def cuda_state() -> str:
    """The CUDA kernels in one sentence: built or not, for what, and what the machine lets them do."""
    if _native.cuda is None:
        return "not built: nvcc was not there when medaccel was built (MEDACCEL_CUDA=1 makes that an error)"
    archs = ", ".join(f"sm_{a}" for a in _native.cuda.architectures.split(","))
    built = f"built for {archs} + PTX with nvcc {_native.cuda.cuda_version}"
    count, problem = _native.cuda.device_count()
    if count == 0:
        if "Insufficient" in problem:
            # The runtime gives one error for a missing driver and for one that is too old; torch's copy tells.
            driver = "driver too old" if _driver_version() else "no driver"
            return f"{built}; {driver} ({problem})"
        return f"{built}; no GPU ({problem or 'the driver lists none'})"
    states = []
    for index in range(count):
        try:
            states.append(f"cuda:{index} runs code for sm_{_native.cuda.running_architecture(index)}")
        except RuntimeError as error:
            states.append(f"cuda:{index} can't run it ({error})")
    return f"{built}; {'; '.join(states)}"


def _driver_version() -> str | None:
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().strip()
    except OSError:
        return None


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return devices


def doctor() -> Diagnosis:
    """Looks at this installation and machine; prints well, and changes nothing."""
    facts = [
        ("medaccel", _version("medaccel")),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        ("MONAI", _version("monai")),
        ("compiler", _native.cpu.compiler if _native.cpu else "unknown: no native module"),
        ("CPU kernels", _cpu_fact()),
        ("CUDA kernels", cuda_state()),
        ("devices", ", ".join(_device_name(d) for d in _devices())),
    ]
    kernels = []
    for op, unsupported in OPS.items():
        for device in _devices():
            reason = unsupported(torch.empty(1, 1, 1, device=device))
            native = f"C++, {_native.cpu.isa}" if _native.cpu else ""
            kernels.append((op, str(device), native if reason is None else f"plain PyTorch, since {reason}"))
    return Diagnosis(facts, kernels)


def _device_name(device: torch.device) -> str:
    return str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
