# SPDX-License-Identifier: Apache-2.0
"""Holds the parts that every op's suite shares: the implementations, the 2× rule, poisoned memory."""

import functools
import importlib
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from medaccel import _native, use_reference
from medaccel.ops._checks import max_error
from medaccel.ops._registry import OPS
from tests.cuda_emulation.sanitized import CSRC, build, compiler_is_missing, load_module

# The reference itself is in the list: what a kernel must hold, the truth must hold too.
# "cuda-emulated": the GPU's kernels, executed on the CPU, with σ on the host or on the device.
EMULATED = ("cuda-emulated", "cuda-emulated-sigma-on-device")
# "cuda": the kernels on a real GPU, where there is one; the suite's tensors stay on the CPU.
IMPLEMENTATIONS = ("reference", *(f"cpu-{isa}" for isa in _native.ISAS), *EMULATED, "cuda")
HERE = tuple(name for name in IMPLEMENTATIONS if name != "cuda" or torch.cuda.is_available())


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
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")
        with OnDevice(torch.device("cuda")):
            yield
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


class OnDevice(TorchDispatchMode):
    """Runs medaccel's registered ops on another device, from tensors on the CPU to results there: a suite that was
    written for the CPU then checks the device's kernels, gradients included."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "medaccel" or not self._serves(func, args):
            return func(*args, **(kwargs or {}))
        moved = pytree.tree_map_only(Tensor, lambda t: t.to(self.device), args)
        return pytree.tree_map_only(Tensor, lambda t: t.cpu(), func(*moved, **(kwargs or {})))

    def _serves(self, func: Any, args: Any) -> bool:
        """Tells whether the device's kernel takes this call, as the public function asks; skips where the device has
        no kernel of the op."""
        name = func._schema.name.removeprefix("medaccel::")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"medaccel::{name}", self.device.type.upper()):
            pytest.skip(f"{name} has no kernel on {self.device.type}")
        forward = name.removesuffix("_backward")
        if name != forward:  # the forward pass saved what this one needs
            return True
        asked = next(op for op in OPS.values() if op.registered == forward).load("predicate")
        first = args[0].to(self.device)
        if forward == "shifted_window_attention":
            return asked(first, args[0].shape[-1] // (3 * args[1].shape[1])) is None
        return (
            asked(first, args[1].to(self.device)) is None
            if forward == "pixel_contrastive_loss"
            else asked(first) is None
        )


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
