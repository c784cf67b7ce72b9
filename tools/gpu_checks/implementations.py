# SPDX-License-Identifier: Apache-2.0
"""Has the GPU's kernels run on CPU tensors in a dry run: CUDA C++ on the tests' emulator, Triton in its interpreter.

Both are the suite's own (tests/cuda_emulation, tests/triton_interpretation), and need what the suite needs.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from medaccel import _native
from medaccel.ops._registry import Kernel, Op


def unavailable(op: Op) -> str | None:
    """Says why an op's GPU kernel can't be executed here; None if it can."""
    kernel = op.kernels["cuda"]
    if not isinstance(kernel, Kernel):
        return str(kernel)
    try:
        import pytest  # noqa: F401 (the suite's own machinery)
    except ImportError as error:
        return f"the suite's packages are missing: {error}"
    if kernel.language == "Triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton was not told to interpret"
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"Triton can't be imported: {error}"
    return None


@contextmanager
def gpu_kernels(op: Op) -> Iterator[None]:
    """Serves calls on CPU tensors with the op's GPU kernel."""
    kernel = op.kernels["cuda"]
    assert isinstance(kernel, Kernel)
    if kernel.language == "Triton":
        _interpret(op.registered)
        yield
        return
    from tests.ops.checks import emulated_module

    _native.emulated, _native.emulate_device_sigma = emulated_module(), True
    try:
        yield
    finally:
        _native.emulated, _native.emulate_device_sigma = None, False


@functools.cache
def _interpret(registered: str) -> torch.library.Library:
    """Puts the GPU's implementation in the CPU's place, for the rest of the process."""
    library = torch.library.Library("medaccel", "IMPL")
    for name in (registered, f"{registered}_backward"):
        kernel = torch.library.get_kernel(f"medaccel::{name}", "CUDA")

        def call(keys: Any, *arguments: Any, kernel: Any = kernel) -> Any:
            return kernel.call_boxed(keys, *arguments)

        library.impl(name, call, "CPU", with_keyset=True, allow_override=True)
    return library
