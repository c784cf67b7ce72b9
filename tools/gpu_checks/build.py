# SPDX-License-Identifier: Apache-2.0
"""Stage 2: builds for the GPU's own architecture, and compiles the Triton kernels that later stages launch."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_checks import native_build
from gpu_checks.context import NO_GPU, Context, Item, check, fact

# So many processes share the compilation of Triton's kernels.
WARMERS = 8


def _build(context: Context) -> Iterator[dict[str, Any]]:
    if context.dry:
        missing = [isa for isa in native_build.isas() if not list(native_build.PACKAGE.glob(f"_cpu_{isa}*.so"))]
        if missing:
            with tempfile.TemporaryDirectory() as folder:
                names = native_build.build(None, Path(folder))
            yield fact("built", ", ".join(names))
        yield check("the GPU's module is built", None, NO_GPU)
        return
    architecture = native_build.own_architecture(context.device)
    if architecture is None or int(architecture) < 80:
        yield check("the GPU's module is built", False, f"sm_{architecture} is too old; the kernels need sm_80")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield fact("built", native_build.ensure(architecture, Path(folder)))
    from medaccel import _native

    reason = _native.gpu_problem(torch.device(context.device).index or 0)
    yield check("the GPU's module runs", reason is None, reason or "")


def _warm(context: Context) -> Iterator[dict[str, Any]]:
    """Runs this process's share of the calls whose kernels Triton compiles; its cache on disk keeps them."""
    if context.dry:
        yield check("Triton's kernels are compiled", None, NO_GPU)
        return
    from gpu_checks.speed_attention import configurations
    from medaccel.ops import _checks
    from medaccel.ops._registry import OPS, Kernel
    from medaccel.ops.window_attention import verify

    device = torch.device(context.device)
    works: list[Any] = []
    for op in OPS.values():
        kernel = op.kernels["cuda"]
        if isinstance(kernel, Kernel) and kernel.language == "Triton":
            verifier = op.load("verifier")
            for dtype, case in itertools.product(list(_checks.FLOOR)[1:], [*verifier.cases, verifier.production]):
                works.append(lambda v=verifier, d=dtype, c=case: v.work(device, d, c))
    works += [lambda c=c: verify.work_of(c.case, device, c.dtype, "") for c in configurations(context)]
    mine = works[int(context.argument) :: WARMERS]
    for make in mine:
        work = make()
        if work.reason is None:
            work.run()
    yield fact(f"calls that process {context.argument} compiled for", len(mine))


def items(context: Context) -> list[Item]:
    """Returns the build, or one process's share of the compilation."""
    if context.argument:
        return [Item("warm", lambda: _warm(context))]
    return [Item("build", lambda: _build(context))]
