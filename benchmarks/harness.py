# SPDX-License-Identifier: Apache-2.0
"""Measures for every benchmark here: interleaved runs, medians, memory beside time, no speed without parity.

Fresh memory costs page faults, which for a 256³ output take three times as long as copying it: a table must say
whether the C library's allocator is left as it is (as for a user) or told to keep freed memory (`warm_allocator`,
which compares the arithmetic alone), for every contender alike.
"""

import argparse
import csv
import ctypes
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from medaccel import use_reference


def warm_allocator() -> bool:
    """Keeps freed memory in the process, so that an output's pages are faulted in once; returns False without
    glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    return bool(libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, (1 << 31) - 1))


def add_allocator(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `choose_allocator` takes."""
    parser.add_argument(
        "--allocator",
        choices=("default", "warm"),
        default="default",
        help="the C library's as it is (a large output's pages are faulted in at each call), or keeping freed memory",
    )


def choose_allocator(name: str) -> None:
    """Warms the allocator if that was asked for; raises SystemExit if it can't be warmed."""
    if name == "warm" and not warm_allocator():
        raise SystemExit("this C library's allocator can't be told to keep memory; use --allocator default")


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Returns how far the process's resident memory rises above its start while `call` runs, its result included."""
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc_trim(0)
    start = peak = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    peak = max(peak, _resident())
    done.set()
    watcher.join()
    del result
    return peak - start


@dataclass
class Contender:
    """Describes one way to do the work: `call` does it once. `parity` says how far its result may be from
    medaccel's."""

    name: str
    call: Callable[[], object]
    times: list[float] = field(default_factory=list)
    extra_bytes: int = 0

    def quantile(self, share: float) -> float:
        """Returns a quantile of the times, in seconds."""
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def measure(contenders: Sequence[Contender], *, seconds: float = 3.0, least: int = 5) -> None:
    """Times the contenders in turn, A B C A B C …, so that a machine that drifts slows all of them.

    It takes at least `least` rounds after one that isn't counted, and goes on until `seconds` have passed.
    """
    for contender in contenders:
        contender.call()
    start = time.perf_counter()
    while len(contenders[0].times) < least or time.perf_counter() - start < seconds:
        for contender in contenders:
            before = time.perf_counter()
            contender.call()
            contender.times.append(time.perf_counter() - before)


def machine() -> dict[str, str]:
    """Describes the machine that the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": model,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def write_table(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Writes the rows as CSV, and beside them the machine as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps(machine(), indent=1) + "\n")


def rows_of(work: str, contenders: list[Contender]) -> list[dict[str, object]]:
    """Returns and prints the contenders' rows of the table: time, its ratio to the first contender's, extra
    memory."""
    ours, rows = contenders[0], []
    for c in contenders:
        c.extra_bytes = peak_extra_bytes(c.call)
        rows.append(
            {
                "work": work,
                "contender": c.name,
                "p20_ms": round(1e3 * c.quantile(0.2), 2),
                "median_ms": round(1e3 * c.median, 2),
                "p80_ms": round(1e3 * c.quantile(0.8), 2),
                "times_medaccel": round(c.median / ours.median, 2),
                "extra_memory_mib": round(c.extra_bytes / 2**20, 1),
            }
        )
        print(
            f"{work:<56}{c.name:<24}{1e3 * c.median:>9.2f} ms{c.median / ours.median:>8.2f}×"
            f"{c.extra_bytes / 2**20:>9.1f} MiB",
            flush=True,
        )
    return rows


def check_parity(name: str, ours: Sequence[torch.Tensor], peer: Sequence[torch.Tensor], bound: float) -> None:
    """SystemExit where a result is off by more than `bound` of its largest: nothing is timed then."""
    for a, b in zip(ours, peer, strict=True):
        error = float((a - b).abs().max() / b.abs().max())
        if not error <= bound:
            raise SystemExit(
                f"{name}: differs from medaccel by {error:.2g}; expected at most {bound}, so nothing is timed"
            )


def against_reference(
    run: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]], tensors: Sequence[torch.Tensor], bound: float
) -> list[Contender]:
    """Returns medaccel and the op's plain PyTorch reference on the same tensors, after a check that they agree."""

    def plain() -> Sequence[torch.Tensor]:
        with use_reference():
            return run(tensors)

    check_parity("PyTorch", run(tensors), plain(), bound)
    return [Contender("medaccel", lambda: run(tensors)), Contender("PyTorch", plain)]


def command(description: str | None, works: Mapping[str, Callable[[], list[Contender]]], *, quick: int = 1) -> None:
    """The command line of a benchmark: measures the works, prints, and writes the table where it is told to.

    `quick` is the number of works that --quick measures.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the first work or works only, for one second")
    add_allocator(parser)
    parser.add_argument("--output", type=Path, help="write the rows to this CSV file")
    arguments = parser.parse_args()
    choose_allocator(arguments.allocator)
    print(", ".join(f"{k} {v}" for k, v in machine().items()), f"{arguments.allocator} allocator", sep=", ")
    print("time: median; ×: that time over medaccel's; memory: peak above the start, results included")
    rows: list[dict[str, object]] = []
    for work in list(works)[: quick if arguments.quick else None]:
        contenders = works[work]()
        measure(contenders, seconds=1.0 if arguments.quick else 3.0, least=3)
        rows += rows_of(work, contenders)
    if arguments.output:
        write_table(arguments.output, rows)
