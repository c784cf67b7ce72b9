# SPDX-License-Identifier: Apache-2.0
"""Lists the ops: one row for each public op, with everything that belongs to it.

`medaccel doctor`, `medaccel verify`, the parametrised tests, the benchmarks and the README's table of ops are made
from `OPS`. A row names things by their paths, which are imported at their first use, so that ``import medaccel``
stays light. tests/ops/test_registry.py fails if a cell of a row is missing or untrue.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Kernel:
    """Describes a kernel: its language, its source (from the repository's root), and its limits."""

    language: str  # "C++", "CUDA C++" or "Triton"
    source: str
    limits: str = ""

    def __str__(self) -> str:
        return f"{self.language} ({self.limits})" if self.limits else self.language


@dataclass(frozen=True)
class NoKernel:
    """Holds the reason why a device has no kernel of an op, which runs its plain PyTorch reference there."""

    reason: str

    def __str__(self) -> str:
        return f"plain PyTorch: {self.reason}"


@dataclass(frozen=True)
class Op:
    """Describes one public op. Paths are "module:attribute", or "module" for a module."""

    name: str  # in `medaccel.ops`
    folder: str  # in medaccel/ops, csrc and (test_<folder>.py) tests/ops
    docs: str  # its purpose, in the README's table
    registered: str  # torch.ops.medaccel.<registered>, and <registered>_backward
    function: str
    reference: str
    predicate: str  # `unsupported(tensor, …)`: the reason why no kernel serves; None if one does
    kernels: Mapping[str, Kernel | NoKernel]  # by device type, every one of `DEVICES`
    cases: str  # the module of sample inputs
    verifier: str  # a `Verifier`
    benchmark: str  # a module of the repository, `python -m` runs it

    def load(self, cell: str) -> Any:
        """Returns the object or module that a cell's path names."""
        return _load(getattr(self, cell))

    def unsupported(self, tensor: Tensor) -> str | None:
        """Says why no kernel serves the op's first tensor; returns None if one does."""
        predicate: Callable[[Tensor], str | None] = self.load("predicate")
        return predicate(tensor)


@functools.cache
def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    found: ModuleType = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def _cpu(folder: str) -> Kernel:
    return Kernel("C++", f"csrc/{folder}/cpu.cpp")


_ROWS = (
    Op(
        name="diffusion_step",
        folder="diffusion_step",
        docs="one update of a diffusion sampler, with its noise",
        registered="diffusion_step",
        function="medaccel.ops.diffusion_step:diffusion_step",
        reference="medaccel.ops.diffusion_step.reference:diffusion_step",
        predicate="medaccel.ops.diffusion_step:unsupported",
        kernels={
            "cpu": _cpu("diffusion_step"),
            "cuda": Kernel("CUDA C++", "csrc/diffusion_step/cuda.cu", "sm_80 and newer"),
        },
        cases="medaccel.ops.diffusion_step.cases",
        verifier="medaccel.ops.diffusion_step.verify:VERIFIER",
        benchmark="benchmarks.bench_diffusion_step",
    ),
    Op(
        name="gaussian_filter",
        folder="gaussian",
        docs="Gaussian smoothing of signals, images and volumes, differentiable by input and σ",
        registered="gaussian_filter",
        function="medaccel.ops.gaussian:gaussian_filter",
        reference="medaccel.ops.gaussian.reference:gaussian_filter",
        predicate="medaccel.ops.gaussian:unsupported",
        kernels={
            "cpu": _cpu("gaussian"),
            "cuda": Kernel("CUDA C++", "csrc/gaussian/cuda.cu", "sm_80 and newer"),
        },
        cases="medaccel.ops.gaussian.cases",
        verifier="medaccel.ops.gaussian.verify:VERIFIER",
        benchmark="benchmarks.bench_gaussian",
    ),
    Op(
        name="info_nce_loss",
        folder="nt_xent",
        docs="InfoNCE: each query against all keys, also across processes",
        registered="similarity_lse",
        function="medaccel.ops.nt_xent:info_nce_loss",
        reference="medaccel.ops.nt_xent.reference:similarity_lse",
        predicate="medaccel.ops.nt_xent:unsupported",
        kernels={
            "cpu": _cpu("nt_xent"),
            "cuda": NoKernel("one matrix product makes a batch's scores, which fit in memory"),
        },
        cases="medaccel.ops.nt_xent.cases",
        verifier="medaccel.ops.nt_xent.verify:INFO_NCE",
        benchmark="benchmarks.bench_nt_xent",
    ),
    Op(
        name="instance_norm_act",
        folder="instance_norm",
        docs="instance norm, a residual's sum and a leaky ReLU in one",
        registered="instance_norm_act",
        function="medaccel.ops.instance_norm:instance_norm_act",
        reference="medaccel.ops.instance_norm.reference:instance_norm_act",
        predicate="medaccel.ops.instance_norm:unsupported",
        kernels={
            "cpu": _cpu("instance_norm"),
            "cuda": Kernel("CUDA C++", "csrc/instance_norm/cuda.cu", "sm_80 and newer"),
        },
        cases="medaccel.ops.instance_norm.cases",
        verifier="medaccel.ops.instance_norm.verify:VERIFIER",
        benchmark="benchmarks.bench_instance_norm",
    ),
    Op(
        name="nt_xent_loss",
        folder="nt_xent",
        docs="NT-Xent (SimCLR): each embedding against all others, also across processes",
        registered="similarity_lse",
        function="medaccel.ops.nt_xent:nt_xent_loss",
        reference="medaccel.ops.nt_xent.reference:similarity_lse",
        predicate="medaccel.ops.nt_xent:unsupported",
        kernels={
            "cpu": _cpu("nt_xent"),
            "cuda": NoKernel("one matrix product makes a batch's scores, which fit in memory"),
        },
        cases="medaccel.ops.nt_xent.cases",
        verifier="medaccel.ops.nt_xent.verify:NT_XENT",
        benchmark="benchmarks.bench_nt_xent",
    ),
    Op(
        name="pixel_consistency_loss",
        folder="pixel_consistency",
        docs="PixPro's loss: the cosines of near pixels of two views",
        registered="pixel_pair_similarity",
        function="medaccel.ops.pixel_consistency:pixel_consistency_loss",
        reference="medaccel.ops.pixel_consistency.reference:pair_similarity",
        predicate="medaccel.ops.pixel_consistency:unsupported",
        kernels={
            "cpu": _cpu("pixel_consistency"),
            "cuda": Kernel("Triton", "medaccel/ops/pixel_consistency/triton.py", "fp32, bf16, fp16"),
        },
        cases="medaccel.ops.pixel_consistency.cases",
        verifier="medaccel.ops.pixel_consistency.verify:VERIFIER",
        benchmark="benchmarks.bench_pixel_consistency",
    ),
    Op(
        name="pixel_contrastive_loss",
        folder="pixel_contrast",
        docs="contrast between the pixels of two views, without an N × N tensor",
        registered="pixel_contrastive_loss",
        function="medaccel.ops.pixel_contrast:pixel_contrastive_loss",
        reference="medaccel.ops.pixel_contrast.reference:pixel_contrastive_loss",
        predicate="medaccel.ops.pixel_contrast:unsupported",
        kernels={
            "cpu": _cpu("pixel_contrast"),
            "cuda": Kernel("Triton", "medaccel/ops/pixel_contrast/triton.py", "fp32, bf16, fp16; up to 256 channels"),
        },
        cases="medaccel.ops.pixel_contrast.cases",
        verifier="medaccel.ops.pixel_contrast.verify:VERIFIER",
        benchmark="benchmarks.bench_pixel_contrast",
    ),
    Op(
        name="pixel_propagation",
        folder="propagation",
        docs="PixPro's propagation: each pixel's value from all pixels that look alike",
        registered="pixel_propagation",
        function="medaccel.ops.propagation:pixel_propagation",
        reference="medaccel.ops.propagation.reference:pixel_propagation",
        predicate="medaccel.ops.propagation:unsupported",
        kernels={
            "cpu": _cpu("propagation"),
            "cuda": Kernel("Triton", "medaccel/ops/propagation/triton.py", "fp32, bf16, fp16; up to 256 channels"),
        },
        cases="medaccel.ops.propagation.cases",
        verifier="medaccel.ops.propagation.verify:VERIFIER",
        benchmark="benchmarks.bench_propagation",
    ),
    Op(
        name="shifted_window_attention",
        folder="window_attention",
        docs="attention within the shifted windows of a Swin transformer, without roll, padding, partition or mask",
        registered="shifted_window_attention",
        function="medaccel.ops.window_attention:shifted_window_attention",
        reference="medaccel.ops.window_attention.reference:shifted_window_attention",
        predicate="medaccel.ops.window_attention:unsupported",
        kernels={
            "cpu": _cpu("window_attention"),
            "cuda": Kernel(
                "Triton", "medaccel/ops/window_attention/triton.py", "fp32, bf16, fp16; head dimensions up to 64"
            ),
        },
        cases="medaccel.ops.window_attention.cases",
        verifier="medaccel.ops.window_attention.verify:VERIFIER",
        benchmark="benchmarks.bench_window_attention",
    ),
)

OPS = {op.name: op for op in _ROWS}


def table() -> str:
    """Returns the README's table of ops, in Markdown; tools/ops_table writes it there."""
    lines = ["| op | what it does | CPU | CUDA |", "|---|---|---|---|"]
    lines += [f"| `{op.name}` | {op.docs} | {op.kernels['cpu']} | {op.kernels['cuda']} |" for op in OPS.values()]
    return "\n".join(lines) + "\n"
