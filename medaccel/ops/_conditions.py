# SPDX-License-Identifier: Apache-2.0
"""Tries conditions under which a kernel's result must keep its bits: repeats, dirty memory, streams, CUDA graphs.

A kernel that reads memory which nobody wrote, works on another stream than the caller's, or waits for the device,
gives the right numbers in a quiet test and wrong ones in training. Each condition provokes one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from medaccel.ops._work import Work

# So many cycles of the GPU's clock, about 5 ms, delay a stream on which the inputs are made late.
_DELAY = 10_000_000


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Makes fresh tensors start as NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _repeated(work: Work) -> list[Tensor]:
    return work.run()


def _poisoned(work: Work) -> list[Tensor]:
    with poisoned_memory():
        return work.run()


def _zeroed(x: Tensor) -> Tensor:
    """Returns zeros with the strides of `x`; `x` itself where its elements share memory."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        return x
    zeros = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_()
    return zeros.requires_grad_(x.requires_grad)


def _on_another_stream(work: Work) -> list[Tensor]:
    """Makes the inputs late on a stream of its own: a kernel on any other stream reads zeros."""
    groups = work.tensors, work.grads, work.others
    tensors, grads, others = ([_zeroed(t) for t in group] for group in groups)
    late = replace(work, tensors=tensors, grads=grads, others=others)
    stream = torch.cuda.Stream(work.device)
    torch.cuda.synchronize(work.device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_DELAY)
        for before, after in zip(groups, (tensors, grads, others), strict=True):
            for source, target in zip(before, after, strict=True):
                if target is not source:
                    target.detach().copy_(source.detach())
        results = late.run()
    torch.cuda.synchronize(work.device)
    return results


def _without_waiting(work: Work) -> list[Tensor]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return work.run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _replayed(work: Work) -> list[Tensor]:
    """Captures the work in a CUDA graph, which runs nothing, and replays it."""
    stream = torch.cuda.Stream(work.device)
    stream.wait_stream(torch.cuda.current_stream(work.device))
    with torch.cuda.stream(stream):
        work.run()  # what a first call allocates or compiles is no part of the graph
    torch.cuda.synchronize(work.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(work.device), torch.cuda.graph(graph):
        results = work.run()
    graph.replay()
    torch.cuda.synchronize(work.device)
    return [r.clone() for r in results]


CONDITIONS: dict[str, Callable[[Work], list[Tensor]]] = {
    "repeated": _repeated,
    "poisoned memory": _poisoned,
    "another stream": _on_another_stream,
    "no waiting": _without_waiting,
    "graph replay": _replayed,
}
# The CPU has neither streams nor graphs.
ON_CPU = ("repeated", "poisoned memory")
_NEVER_WAITS = ("no waiting", "graph replay")


def faults(work: Work, expected: Sequence[Tensor], names: Iterable[str]) -> list[str]:
    """Returns a sentence for each condition of these names under which the results are not bitwise `expected`."""
    found = []
    for name in names:
        if (name not in ON_CPU and work.device.type != "cuda") or (work.reads_host and name in _NEVER_WAITS):
            continue
        try:
            results = CONDITIONS[name](work)
        except RuntimeError as error:
            found.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        changed = [i for i, (a, b) in enumerate(zip(results, expected, strict=True)) if not same_bits(a, b)]
        if changed:
            found.append(f"{name}: other bits in result {', '.join(map(str, changed))}")
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tells whether two tensors have the same shape, dtype and bytes, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*as_bytes)
