# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled modules: says which one is loaded, and why another is not.

It knows nothing of an op. Each op's ``native.py`` calls the modules; those files alone take a tensor's address, and
keep their tensors in locals until the kernel has returned: a copy made inside the call's argument list would be freed
before the kernel reads it.
"""

import functools
import importlib
import os
from types import ModuleType

import torch  # before any compiled module: they share the OpenMP runtime that torch brings
from torch import Tensor

ISAS = ("baseline", "avx2", "avx512")
_CAPABILITY = {"AVX512": "avx512", "AVX2": "avx2"}  # torch's names; any other gets the baseline

DTYPES = {torch.float32: 0, torch.float64: 1}
GPU_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _import(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"medaccel.{name}"), None
    except ImportError as error:
        return None, f"medaccel.{name} can't be loaded: {error}"


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    forced = os.environ.get("MEDACCEL_ISA")
    if forced is not None and forced not in ISAS:
        raise ImportError(f"MEDACCEL_ISA is {forced!r}; expected one of {', '.join(ISAS)}")
    baseline, problem = _import("_cpu_baseline")
    if baseline is None:
        return None, problem
    supported = baseline.supported_isas()
    if forced is not None and forced not in supported:
        raise ImportError(
            f"MEDACCEL_ISA is {forced!r}, but this processor runs only {', '.join(supported)}; "
            "unset it to let medaccel choose"
        )
    wanted = forced or _CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    if wanted not in supported:
        wanted = supported[-1]
    return (baseline, None) if wanted == "baseline" else _import(f"_cpu_{wanted}")


cpu, cpu_problem = _load_cpu()
cuda, cuda_problem = _import("_cuda")


def cpu_module() -> ModuleType:
    """Returns the CPU's module; the caller has made sure that it exists."""
    assert cpu is not None
    return cpu


def address(tensor: Tensor | None) -> int:
    """Returns a tensor's address, 0 for None; the caller keeps the tensor alive across the kernel's call."""
    return 0 if tensor is None else tensor.data_ptr()


# --- GPU ------------------------------------------------------------------------------------------------------
# Tests put the emulated module here: the GPU's code paths then run on CPU tensors.
emulated: ModuleType | None = None
# With it, σ counts as lying on the device or, if this is False, on the host.
emulate_device_sigma = False


# By these words the driver says that a build holds no code for a GPU; whatever else it says may pass.
_NO_CODE = (
    *("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidKernelImage", "cudaErrorInvalidDeviceFunction"),
    *("cudaErrorUnsupportedPtxVersion", "cudaErrorJitCompilerNotFound", "cudaErrorJitCompilationDisabled"),
    "no kernel image is available",
)


@functools.cache
def _probe_gpu(index: int) -> str | None:
    """Answers for `gpu_problem` where the answer holds for good; raises the driver's RuntimeError where it may not,
    which the cache doesn't keep."""
    if cuda is None:
        return f"the CUDA kernels are not built: {cuda_problem}"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            f"cuda:{index} is sm_{major}{minor}; the CUDA kernels need sm_80 or newer "
            "(Ampere); older GPUs run plain PyTorch"
        )
    try:
        cuda.running_architecture(index)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_CODE):
            raise
        return (
            f"this build has no code for cuda:{index}, sm_{major}{minor} (built for {cuda.architectures}; "
            f"rebuild with MEDACCEL_CUDA_ARCHS={major}{minor}): {error}"
        )
    return None


def gpu_problem(index: int) -> str | None:
    """Says in a sentence why the CUDA kernels don't run on this GPU; returns None if they do.

    That the build has code for the GPU, or none, is remembered. Any other error is told and the next call asks
    again: the GPU may be out of memory, or recording a graph, only now.
    """
    try:
        return _probe_gpu(index)
    except RuntimeError as error:
        return f"cuda:{index} can't say whether this build has code for it (the next call asks again): {error}"


@functools.cache
def _probe_triton(index: int) -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton can't be imported: {error}"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"cuda:{index} is sm_{major}{minor}; the Triton kernel needs sm_80 or newer (Ampere)"
    return None


def triton_problem(index: int) -> str | None:
    """Says in a sentence why no Triton kernel runs on this GPU; returns None if they do."""
    return _probe_triton(index)


# torch.compile asks once, while it compiles, instead of tracing into the probe. This is what
# torch.compiler.assume_constant_result sets; calling that would import all of Dynamo with medaccel. The mark stands
# on plain functions: Dynamo doesn't see it on what functools.cache returns, and then can't trace the probe.
gpu_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
triton_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def emulates_device_scalars() -> bool:
    """Tells whether a test makes σ, coefficients and keys on the host count as lying on the device."""
    return emulated is not None and emulate_device_sigma


def on_gpu_path(tensor: Tensor) -> bool:
    """Tells whether the GPU's kernels serve `tensor`: it is on a GPU, or a test emulates one."""
    return tensor.device.type == "cuda" or emulated is not None


def gpu_module(tensor: Tensor) -> tuple[ModuleType, int, int]:
    """Returns the module that serves `tensor`'s device, the device's index, and the current stream's handle."""
    if tensor.device.type == "cuda":
        assert cuda is not None
        return cuda, tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
    assert emulated is not None
    return emulated, 0, 0
