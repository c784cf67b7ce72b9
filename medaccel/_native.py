# SPDX-License-Identifier: Apache-2.0
"""The compiled modules: which is loaded and why, and the only functions that take a tensor's address.

Every function here keeps its tensors in locals until the kernel has returned: a copy made inside the call's
argument list would be freed before the kernel reads it.
"""

import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch  # before any compiled module: they share the OpenMP runtime that torch brings
from torch import Tensor

ISAS = ("baseline", "avx2", "avx512")
_CAPABILITY = {"AVX512": "avx512", "AVX2": "avx2"}  # torch's names; any other gets the baseline

DTYPES = {torch.float32: 0, torch.float64: 1}
GAUSSIAN_APPROX = {"erf": 0, "sampled": 1, "scalespace": 2}
GAUSSIAN_MODES = {"constant": 0, "reflect": 1, "nearest": 2, "mirror": 3, "wrap": 4}


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


def _strided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`'s values in the memory layout of `like`, whatever layout they came in."""
    return torch.empty_like(like).copy_(tensor)


def gaussian_filter(
    input: Tensor,
    sigma: Sequence[float],
    truncated: float,
    approx: str,
    mode: str,
    normalize: bool,
    adjoint: bool,
) -> Tensor:
    """The native filter, or its adjoint, of a float32 or float64 CPU tensor (B, C, *spatial) of any strides.

    The output has the strides that `torch.empty_like` gives. The input is copied only where it has no dense
    spatial axis (nor dense channels), as after ``x[..., ::2]``.
    """
    assert cpu is not None
    output = torch.empty_like(input)

    def run(source: Tensor, target: Tensor) -> bool:
        return cpu.gaussian_filter(
            source.data_ptr(), target.data_ptr(), DTYPES[source.dtype], source.shape, source.stride(),
            target.stride(), sigma, truncated, GAUSSIAN_APPROX[approx], GAUSSIAN_MODES[mode], normalize, adjoint,
            torch.get_num_threads(),
        )  # fmt: skip

    if not run(input, output):
        source = input.contiguous()
        target = torch.empty_like(source)
        run(source, target)
        output.copy_(target)
    return output


def gaussian_sigma_gradient(
    input: Tensor,
    grad: Tensor,
    sigma: Sequence[float],
    truncated: float,
    approx: str,
    mode: str,
    normalize: bool,
) -> list[float]:
    """Σ grad · ∂filter(input)/∂sigma, one number per spatial axis. Any strides, as above."""
    assert cpu is not None

    def run(x: Tensor, g: Tensor) -> list[float]:
        return cpu.gaussian_sigma_gradient(
            x.data_ptr(), g.data_ptr(), DTYPES[x.dtype], x.shape, x.stride(), g.stride(), sigma, truncated,
            GAUSSIAN_APPROX[approx], GAUSSIAN_MODES[mode], normalize, torch.get_num_threads(),
        )  # fmt: skip

    gradient = run(input, grad)
    if not gradient:
        x, g = input.contiguous(), grad.contiguous()
        gradient = run(x, g)
    return gradient
