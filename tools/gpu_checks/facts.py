# SPDX-License-Identifier: Apache-2.0
"""Stage 1: what the machine is, and the ceilings that speeds are compared with."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from gpu_checks.context import NO_GPU, ROOT, Context, Item, fact


def _output(*command: str) -> str:
    """Returns the first line that a command prints; "not here" where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return "not here"
    return (done.stdout.strip().splitlines() or ["not here"])[-1] if done.returncode == 0 else "not here"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def gpu_name(device: str) -> str:
    """Returns the GPU's name; "none" for the CPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "none"


def _machine(context: Context) -> Iterator[dict[str, Any]]:
    yield fact("Python", f"{platform.python_version()} ({sys.executable})")
    yield fact("platform", platform.platform())
    yield fact("processors", os.cpu_count())
    yield fact("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}")
    for package in ("triton", "numpy", "monai", "pybind11"):
        yield fact(package, _version(package))
    yield fact("compiler", _output("g++", "-dumpfullversion"))
    yield fact("nvcc", _output(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"))
    yield fact("commit", _output("git", "rev-parse", "HEAD"))
    if context.dry:
        yield fact("GPU", NO_GPU)
        return
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit"
    yield fact("driver, clock, highest clock, power", _output("nvidia-smi", query, "--format=csv,noheader"))
    properties = torch.cuda.get_device_properties(context.device)
    yield fact("GPU", properties.name)
    yield fact("capability", f"{properties.major}.{properties.minor}")
    yield fact("multiprocessors", properties.multi_processor_count)
    yield fact("memory, GiB", round(properties.total_memory / 2**30, 1))


def _copy(context: Context) -> Iterator[dict[str, Any]]:
    from medaccel.ops import _checks

    if context.dry:
        x = torch.empty(32 << 20, dtype=torch.uint8)
        yield fact("copy, GB/s", round(2 * x.numel() / _checks.copy_ms(x) / 1e6, 1), size="32 MB")
        return
    yield fact("copy, GB/s", round(_checks.copy_rate(torch.device(context.device)) / 1e6, 1), size="2 GB")


def _product(context: Context, dtype: torch.dtype, precision: str) -> Iterator[dict[str, Any]]:
    from medaccel.ops import _checks

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    _checks.product_rate.cache_clear()  # it knows nothing of the precision
    try:
        rate = _checks.product_rate(torch.device(context.device), dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    name = "TF32" if precision == "high" else _checks.dtype_name(dtype)
    yield fact(f"product, {name}, TFLOP/s", round(rate / 1e9, 2), size="1024³" if context.dry else "8192³")


def items(context: Context) -> list[Item]:
    """Returns the facts, the copy, and the products."""
    kinds = {"bf16": (torch.bfloat16, "highest"), "fp32": (torch.float32, "highest"), "TF32": (torch.float32, "high")}
    if context.dry:
        del kinds["TF32"]
    return [
        Item("machine", lambda: _machine(context)),
        Item("copy", lambda: _copy(context)),
        *(
            Item(f"product, {name}", lambda kind=kind: _product(context, *kind))  # type: ignore[misc]
            for name, kind in kinds.items()
        ),
    ]
