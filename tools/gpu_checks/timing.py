# SPDX-License-Identifier: Apache-2.0
"""Times calls: events or the replay of a CUDA graph on a GPU, the clock on the CPU; memory and host time besides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from medaccel.ops import _checks

Call = Callable[[], object]
COUNT = 60  # timings whose median counts
LONG_MS = 20.0  # a call that takes longer is timed fewer times: its median is steady sooner


def measure(calls: Sequence[Call], device: torch.device, *, graph: bool = True) -> dict[str, Any]:
    """Returns what one contender needs; `calls` are the same work on inputs of their own, taken in turn.

    ms: the median time of a call; that of a graph's replay, which has no launches of Python's, where it can be
    captured. eager_ms: between events, so that Python counts where it is slower than the GPU. host_us: microseconds
    until a call returns to Python. peak_mib: memory above the inputs.
    """
    if device.type != "cuda":
        return _on_cpu(calls)
    turn = _in_turn(calls)
    for _ in range(3 * len(calls)):
        turn()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    turn()
    torch.cuda.synchronize(device)
    count = COUNT if 1e3 * (time.perf_counter() - start) < LONG_MS else 10
    eager = statistics.median(_checks.event_times(turn, device, count))
    result: dict[str, Any] = {"eager_ms": eager, "ms": eager, "by": "events", "count": count}
    result["host_us"] = _host_us(turn, device)
    result["peak_mib"] = _peak(calls[0], device)
    if graph:
        try:
            result |= {"ms": _replayed(calls, device, count), "by": "graph replay"}
        except RuntimeError as error:
            result["note"] = f"no graph: {(str(error).splitlines() or [''])[0][:120]}"
    return result


def _on_cpu(calls: Sequence[Call]) -> dict[str, Any]:
    turn = _in_turn(calls)
    turn()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        turn()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": statistics.median(times), "by": "clock", "count": 3}


def _in_turn(calls: Sequence[Call]) -> Call:
    number = -1

    def turn() -> object:
        nonlocal number
        number = (number + 1) % len(calls)
        return calls[number]()

    return turn


def _host_us(call: Call, device: torch.device) -> float:
    """Returns the time until a call returns, the median of 20 on an idle GPU."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def _peak(call: Call, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _replayed(calls: Sequence[Call], device: torch.device, count: int) -> float:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize(device)
    graphs = []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph)
    return statistics.median(_checks.event_times(_in_turn([graph.replay for graph in graphs]), device, count))
