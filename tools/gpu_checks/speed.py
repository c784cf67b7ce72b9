# SPDX-License-Identifier: Apache-2.0
"""Stage 5: each op's speed on its production size beside what its users have, and verify's own timings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_checks.context import NO_GPU, Context, Item, check, speed
from gpu_checks.numbers import smallest
from gpu_checks.timing import measure
from medaccel.ops import _checks, use_reference
from medaccel.ops._registry import OPS

# Each call finds inputs of its own, so that no cache holds what the call before it read.
ROTATING = 3
# A peer's result may differ by this share of the largest before its time is left out; cuDNN multiplies fp32 as TF32.
PARITY = {torch.float32: 4e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}

Forward = Callable[..., Any]


# --- what an op's users have in torch ------------------------------------------------------------------------------
def _native_norm(x: Tensor, residual: Tensor) -> Tensor:
    return F.leaky_relu_(F.instance_norm(x).add_(residual), 0.01)


@functools.cache
def _taps(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Returns the production case's taps, one tensor an axis: made once, as a user's layer does."""
    from medaccel.ops.gaussian import reference
    from medaccel.ops.gaussian.cases import PRODUCTION

    return [reference.taps(torch.tensor(s), 4.0, "erf", False).to(device, dtype) for s in PRODUCTION.sigma]


def _three_convolutions(x: Tensor, sigma: Tensor) -> Tensor:
    for axis, taps in enumerate(_taps(x.device, x.dtype)):
        n = len(taps) // 2
        # conv3d pads with zeros alone
        x = F.pad(x, [n if a == axis else 0 for a in (2, 1, 0) for _ in range(2)], mode="replicate")
        x = F.conv3d(x, taps.reshape([1, 1, *(-1 if a == axis else 1 for a in range(3))]))
    return x


PEERS: dict[str, dict[str, Forward]] = {
    "instance_norm_act": {"torch's instance norm": _native_norm},
    "gaussian_filter": {"three convolutions": _three_convolutions},
}


# A dry run takes these cases, which have the production case's operands.
SMALL = {"instance_norm_act": "residual_of_another_layout"}


def _referenced(forward: Forward) -> Forward:
    def call(*tensors: Tensor) -> Any:
        with use_reference():
            return forward(*tensors)

    return call


def contenders(work: _checks.Work, *, compiled: bool) -> dict[str, Forward]:
    """Returns the ways to do the work: medaccel's first, plain PyTorch, the same compiled, and the op's peers."""
    found = {"medaccel": work.forward, "PyTorch": _referenced(work.forward)}
    found |= PEERS.get(work.op, {})
    if compiled:
        found["PyTorch, compiled"] = _referenced(torch.compile(work.forward))
        found |= {f"{name}, compiled": torch.compile(f) for name, f in PEERS.get(work.op, {}).items()}
    return found


def calls_of(works: list[_checks.Work], forward: Forward, training: bool) -> list[Callable[[], object]]:
    """Returns the same call on each work's inputs."""
    mine = [replace(work, forward=forward) for work in works]
    return [work.run if training else work.output for work in mine]


def differs(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> str:
    """Says by how much a peer's results are off, or nothing where they agree."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a.shape != b.shape:
            return f"result {i} has another shape"
        largest = float(b.abs().max()) if b.numel() else 0.0
        error = _checks.max_error(a, b.to(a.device)) if b.numel() else 0.0
        if not error <= PARITY[dtype] * max(largest, 1e-30):
            return f"result {i} is off by {error:.2g} of {largest:.2g}"
    return ""


def race(
    context: Context,
    name: str,
    works: list[_checks.Work],
    ways: dict[str, Forward],
    training: bool,
    share: Any = None,
) -> Iterator[dict[str, Any]]:
    """Times every way to do the work, first medaccel's; one that differs or fails has a note instead of a time."""
    device, dtype = works[0].device, works[0].tensors[0].dtype
    ours: list[Tensor] | None = None
    for way, forward in ways.items():
        more: dict[str, Any] = {"training": training, "dtype": _checks.dtype_name(dtype)}
        try:
            calls = calls_of(works, forward, training)
            result = list(calls[0]())  # type: ignore[call-overload]
            if ours is None:
                ours = result
            elif note := differs(ours, result[:1], dtype):
                yield speed(name, way, None, note=note, **more)
                continue
            more |= measure(calls, device)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the GPU is broken: the rest goes to a new process
            what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            yield speed(name, way, None, note=what, **more)
            continue
        if share is not None and way == "medaccel":
            more["ceiling_share"] = share(more["ms"])
        yield speed(name, way, more.pop("ms"), **more)


def _moved_bytes(work: _checks.Work) -> int:
    """Counts the bytes of inputs and outputs, each once: a copy of them can't be beaten."""
    return sum(t.numel() * t.element_size() for t in [*work.tensors, *work.output()])


def _op(context: Context, dtype: torch.dtype, training: bool) -> Iterator[dict[str, Any]]:
    op = context.argument
    verifier, device = OPS[op].load("verifier"), torch.device(context.device)
    case = SMALL.get(op, smallest(op, 1)[0]) if context.dry else verifier.production
    works = [verifier.work(device, dtype, case) for _ in range(ROTATING)]
    share = None
    if not context.dry and not training:
        moved = _moved_bytes(works[0])
        share = lambda ms: moved / ms / _checks.copy_rate(device)  # noqa: E731
    ways = contenders(works[0], compiled=not context.dry)
    yield from race(context, f"{op}, {case}", works, ways, training, share)


def _verifys(context: Context) -> Iterator[dict[str, Any]]:
    """Times what `medaccel verify` times."""
    if context.dry:
        yield check(f"{context.argument}, verify's timings", None, NO_GPU)
        return
    for one in OPS[context.argument].load("verifier").speeds(torch.device(context.device)):
        row = asdict(one)
        work = f"{row.pop('op')}, {row.pop('case')}"
        yield speed(work, "medaccel", row.pop("kernel_ms"), ceiling_share=row["ceiling_share"], by="events")
        yield speed(work, "PyTorch", row.pop("pytorch_ms"), by="events")
        if row["monai_ms"] is not None:
            yield speed(work, "MONAI", row["monai_ms"], by="events")


def items(context: Context) -> list[Item]:
    """Returns one op's timings."""
    found = [
        Item(
            f"{_checks.dtype_name(dtype)}, {'forward + backward' if training else 'forward'}",
            lambda d=dtype, t=training: _op(context, d, t),  # type: ignore[misc]
        )
        for dtype in (torch.bfloat16, torch.float32)
        for training in (False, True)
    ]
    return [*found, Item("verify", lambda: _verifys(context))]
