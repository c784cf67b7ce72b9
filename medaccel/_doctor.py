# SPDX-License-Identifier: Apache-2.0
"""Defines `medaccel doctor` and `explain`: what is installed and built, and which kernel serves an op where, or why
none.

Both read the registry of ops, and each op's own `unsupported`, by which the op itself chooses.
"""

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch
from medaccel.ops._registry import OPS, Kernel


@dataclass
class Diagnosis:
    """Holds facts (name, value) and the table of kernels (op, device, what serves); `str()` gives the printed
    form."""

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
    """Describes the CUDA kernels in one sentence: built or not, for what, and what the machine lets them do."""
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
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:  # one without kernels (Apple's, Intel's) is listed too, with the reason
        devices += [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())]
    return devices


def _serving(name: str, tensor: Tensor) -> tuple[str | None, str]:
    """Returns the kernel of an op that serves `tensor`, and its target, ("C++", "avx2"); or (None, why plain PyTorch
    serves it)."""
    if _dispatch.reference_forced:
        return None, "use_reference() is in force"
    op, device = OPS[name], tensor.device
    reason = op.unsupported(tensor)
    if reason is not None:
        return None, reason
    if device.type == "cpu":
        assert _native.cpu is not None
        return "C++", _native.cpu.isa
    kernel = op.kernels["cuda"]
    assert isinstance(kernel, Kernel)
    if kernel.language == "Triton":  # compiled at its first call, for the GPU that it finds
        major, minor = torch.cuda.get_device_capability(device)
        return kernel.language, f"sm_{major}{minor}"
    assert _native.cuda is not None
    return kernel.language, f"code for sm_{_native.cuda.running_architecture(device.index)}"


def explain(op: str | Callable[..., object], input: Tensor) -> str:
    """Says which kernel serves an op on a tensor, or why plain PyTorch does: one sentence, nothing is computed.

    Args:
        op: a function of `medaccel.ops`, or its name.
        input: the op's first tensor (`input`, `qkv`, `sample`); its device and dtype decide.

    Raises:
        ValueError: no op has that name; the message lists the known ones.
        TypeError: `input` is not a floating-point tensor: the op refuses it too.

    >>> import torch, medaccel
    >>> medaccel.explain("gaussian_filter", torch.zeros(1, 1, 9, device="meta"))
    "gaussian_filter on meta, float32: plain PyTorch, since gaussian_filter has no kernel for device 'meta'"
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"explain: op is {name!r}; expected one of {sorted(OPS)}")
    if not isinstance(input, Tensor) or not input.is_floating_point():
        kind = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"explain: input is {kind}; {name} takes a floating-point tensor")
    dtype = str(input.dtype).removeprefix("torch.")
    kernel, detail = _serving(name, input)
    served = f"plain PyTorch, since {detail}" if kernel is None else f"its {kernel} kernel ({detail})"
    return f"{name} on {input.device}, {dtype}: {served}"


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
    for name in OPS:
        for device in _devices():
            kernel, detail = _serving(name, torch.empty(1, 1, 1, device=device))
            served = f"plain PyTorch, since {detail}" if kernel is None else f"{kernel}, {detail}"
            kernels.append((name, str(device), served))
    return Diagnosis(facts, kernels)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
