# SPDX-License-Identifier: Apache-2.0
"""Holds the parts that every op's suite shares: the implementations, the 2× rule, poisoned memory."""

import functools
import importlib
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pybind11
import pytest
import torch
from torch import Tensor

from medaccel import _native, use_reference
from medaccel.ops._checks import max_error
from tests.cuda_emulation.sanitized import CSRC, build, compiler_is_missing, load_module

# The reference itself is in the list: what a kernel must hold, the truth must hold too.
# "cuda-emulated": the GPU's kernels, executed on the CPU, with σ on the host or on the device.
EMULATED = ("cuda-emulated", "cuda-emulated-sigma-on-device")
IMPLEMENTATIONS = ("reference", *(f"cpu-{isa}" for isa in _native.ISAS), *EMULATED)


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Runs the ops on one implementation; skips where this machine has none."""
    if name == "reference":
        with use_reference():
            yield
        return
    if name in EMULATED:
        _native.emulated, _native.emulate_device_sigma = emulated_module(), name == EMULATED[1]
        try:
            yield
        finally:
            _native.emulated = None
        return
    isa = name.removeprefix("cpu-")
    try:
        baseline = importlib.import_module("medaccel._cpu_baseline")
        module = importlib.import_module(f"medaccel._cpu_{isa}")
    except ImportError as error:
        pytest.skip(f"{name} is not built: {error}")
    if isa not in baseline.supported_isas():
        pytest.skip(f"this processor can't run {isa}")
    before, _native.cpu = _native.cpu, module
    try:
        yield
    finally:
        _native.cpu = before


@functools.cache
def emulated_module() -> ModuleType:
    """The GPU kernels' module built by g++ against the emulator; compiled once and kept between runs."""
    if compiler_is_missing():
        pytest.skip("g++ is not here to build the emulated kernels")
    include = sysconfig.get_path("include")
    flags = (
        *("-DMEDACCEL_MODULE=_emulated", "-DMEDACCEL_EMULATED", '-DMEDACCEL_CUDA_ARCHS="emulated"'),
        *('-DMEDACCEL_CUDA_VERSION="none"', f"-isystem{pybind11.get_include()}", f"-isystem{include}"),
    )
    folders = sorted(kernel.parent for kernel in CSRC.glob("*/cuda.cu"))
    sources = tuple(folder / file for folder in folders for file in ("cuda.cu", "bind_cuda.cpp"))
    return load_module("_emulated", build((*sources, CSRC / "cuda_module.cpp"), extra_flags=flags, shared=True))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors start as NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_twice_as_good(
    actual: Tensor, plain: Tensor, truth: Tensor, floor: float, scale: float | None = None
) -> None:
    """The 2× rule: error at most twice that of plain PyTorch in the same precision, plus floor · scale.

    scale: the size of the numbers that are summed up; by default the largest |truth|, which is too little for a sum
    whose terms cancel.
    """
    if scale is None:
        scale = float(truth.detach().abs().nan_to_num(0).max()) if truth.numel() else 0.0
    error, plain_error = max_error(actual, truth), max_error(plain, truth)
    allowed = 2 * plain_error + floor * scale
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g} (plain PyTorch {plain_error:.3g})"
