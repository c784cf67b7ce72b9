# SPDX-License-Identifier: Apache-2.0
"""Stage 3: every case of verify in every dtype, and one production size, under conditions; a sanitizer besides."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from gpu_checks import implementations
from gpu_checks.context import NO_GPU, ROOT, Context, Item, check
from medaccel.ops import _checks
from medaccel.ops._registry import OPS, Kernel

# What needs a graph or forbids waiting is a contract, in the next stage.
CONDITIONS = ("repeated", "poisoned memory", "another stream")
SANITIZER_S = 150.0


def as_record(one: _checks.Check, **more: Any) -> dict[str, Any]:
    """Returns the record of a check of verify."""
    name = f"{one.op}, {one.dtype}, {one.case}"
    note = "; ".join(filter(None, [one.fault, "" if one.kernel == "its kernel" else one.kernel]))
    return check(name, one.passed, note, share=one.share, served=one.kernel == "its kernel", **more)


def smallest(op: str, count: int, dtype: torch.dtype = torch.float32) -> list[str]:
    """Returns the names of the op's cases with the fewest elements, none of them empty."""
    verifier = OPS[op].load("verifier")
    sizes = {}
    for case in verifier.cases:
        work = verifier.work(torch.device("cpu"), dtype, case)
        elements = sum(t.numel() for t in work.tensors)
        if min(t.numel() for t in work.tensors) > 0:
            sizes[case] = elements
    return sorted(sizes, key=lambda case: sizes[case])[:count]


def _one(context: Context, dtype: torch.dtype, case: str) -> Iterator[dict[str, Any]]:
    verifier = OPS[context.argument].load("verifier")
    work = verifier.work(torch.device(context.device), dtype, case)
    yield as_record(_checks.compare(work, CONDITIONS))
    if context.dry and work.reason is None:
        yield check(f"{context.argument}, another stream", None, NO_GPU)


def _production(context: Context, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    verifier = OPS[context.argument].load("verifier")
    if context.dry:
        yield check(f"{context.argument}, production size", None, NO_GPU)
        return
    yield from _one(context, dtype, verifier.production)


def _gpu_kernel(context: Context) -> Iterator[dict[str, Any]]:
    """Executes the GPU's kernel without a GPU, on the op's smallest cases."""
    op = OPS[context.argument]
    verifier = op.load("verifier")
    reason = implementations.unavailable(op)
    if reason is not None:
        yield check(f"{op.name}, the GPU's kernel executed here", None, f"not run: {reason}")
        return
    kernel = op.kernels["cuda"]
    assert isinstance(kernel, Kernel)
    how = "interpreted" if kernel.language == "Triton" else "emulated"
    cases = smallest(op.name, 2 if how == "interpreted" else 5)
    for case in cases:
        work = verifier.work(torch.device("cpu"), torch.float32, case)
        with implementations.gpu_kernels(op):
            yield as_record(_checks.compare(work, CONDITIONS), how=how)


# The smallest case runs once forward and backward; the sanitizer makes it ten to a hundred times slower.
_SANITIZED = """
import sys, torch
from medaccel.ops._registry import OPS
op, case = sys.argv[1:]
OPS[op].load("verifier").work(torch.device("cuda"), torch.float32, case).run()
torch.cuda.synchronize()
"""


def _sanitize(context: Context, tool: str) -> Iterator[dict[str, Any]]:
    op = OPS[context.argument]
    name = f"{op.name}, compute-sanitizer {tool}"
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if context.dry or found is None or not isinstance(op.kernels["cuda"], Kernel):
        reason = NO_GPU if context.dry else "not run: it is not installed" if found is None else "not run: no kernel"
        yield check(name, None, reason)
        return
    case = smallest(op.name, 1)[0]
    # Only this project's kernels: those of torch are not ours to check, and are many.
    command = [found, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", _SANITIZED, op.name, case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_S, cwd=ROOT)
    except subprocess.TimeoutExpired:
        yield check(name, None, f"not run: it took more than {SANITIZER_S:g} s")
        return
    text = done.stdout + done.stderr
    if done.returncode == 0:
        yield check(name, True, case=case)
    elif done.returncode == 9:
        errors = [line for line in text.splitlines() if line.startswith("=========") and len(line) > 12]
        yield check(name, False, "; ".join(errors[:4])[:600], case=case)
    else:  # the tool itself does not run here: often forbidden in a container
        yield check(name, None, f"not run: {(text.strip().splitlines() or ['no word'])[-1][:300]}")


def items(context: Context) -> list[Item]:
    """Returns an item for each case and dtype of the op."""
    op = OPS[context.argument]
    if context.stage.startswith("sanitizer:"):
        return [Item(tool, lambda tool=tool: _sanitize(context, tool)) for tool in ("memcheck", "racecheck")]  # type: ignore[misc]
    verifier = op.load("verifier")
    if context.stage.startswith("executed:"):
        return [Item("the GPU's kernel", lambda: _gpu_kernel(context))]
    cases = smallest(op.name, 4) if context.dry else verifier.cases
    pairs = list(itertools.product(_checks.FLOOR, cases))
    return [
        *(
            Item(f"{_checks.dtype_name(dtype)}, {case}", lambda d=dtype, c=case: _one(context, d, c))  # type: ignore[misc]
            for dtype, case in pairs
        ),
        *(
            Item(f"{_checks.dtype_name(dtype)}, production", lambda d=dtype: _production(context, d))  # type: ignore[misc]
            for dtype in list(_checks.FLOOR)[1:]
        ),
    ]
