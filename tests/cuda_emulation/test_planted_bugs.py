# SPDX-License-Identifier: Apache-2.0
"""Each checker catches the bugs that it is for, and lets their corrected twins pass."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cuda_emulation.sanitized import (
    ADDRESS,
    ORDERS,
    THREAD,
    Result,
    build,
    compiler_is_missing,
    in_parallel,
    run,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler_is_missing() is not None, reason=str(compiler_is_missing())),
]

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / f"{name}.cu" for name in ("memory_bugs", "thread_bugs", "host_bugs", "planted_bugs"))

# The bug, the build that it is run in, and how the finding of the checker that must catch it begins.
PLANTED = [
    ("global_out_of_bounds", ADDRESS, "AddressSanitizer: use-after-poison"),
    ("global_out_of_bounds_by_a_slice", ADDRESS, "AddressSanitizer: use-after-poison"),
    ("shared_out_of_bounds", ADDRESS, "UndefinedBehaviorSanitizer: index 63 out of bounds for type 'float [63]'"),
    ("dynamic_shared_out_of_bounds", ADDRESS, "AddressSanitizer: use-after-poison"),
    ("shared_row_out_of_bounds", ADDRESS, "AddressSanitizer: use-after-poison"),
    ("uninitialised_shared", ADDRESS, "CheckFailed: uninitialised shared memory"),
    ("misaligned_load", ADDRESS, "UndefinedBehaviorSanitizer: reference binding to misaligned address"),
    ("misaligned_shared", ADDRESS, "UndefinedBehaviorSanitizer: store to misaligned address"),
    ("int32_overflow", ADDRESS, "UndefinedBehaviorSanitizer: signed integer overflow"),
    ("int32_truncation", ADDRESS, "AddressSanitizer: SEGV"),
    ("unwritten_output", ADDRESS, "CheckFailed: unwritten output: element 64"),
    ("halo_off_by_one", ADDRESS, "CheckFailed: host reference: element 63"),
    ("missing_barrier", THREAD, "ThreadSanitizer: data race"),
    ("race_between_threads", THREAD, "ThreadSanitizer: data race"),
    ("missing_syncwarp", THREAD, "ThreadSanitizer: data race"),
    ("race_between_blocks", THREAD, "ThreadSanitizer: data race"),
    ("missing_fence", THREAD, "ThreadSanitizer: data race"),
    ("race_between_streams", THREAD, "ThreadSanitizer: data race"),
    ("read_before_synchronising", THREAD, "ThreadSanitizer: data race"),
    ("barrier_divergence", ADDRESS, "KernelFault: barrier divergence"),
    ("deadlock", ADDRESS, "KernelFault: deadlock"),
    ("wrong_lane_mask", ADDRESS, "KernelFault: wrong lane mask: lane 16 calls with the mask 0x0000ffff"),
    ("divergent_shuffle", ADDRESS, "KernelFault: wrong lane mask: lanes of one mask (0xffffffff)"),
    ("undefined_lane", ADDRESS, "CheckFailed: undefined lane"),
    ("wrong_stream", ADDRESS, "KernelFault: wrong stream: fill"),
    ("default_stream", ADDRESS, "KernelFault: wrong stream: cudaMemsetAsync"),
    ("wrong_device", ADDRESS, "KernelFault: wrong device: fill"),
    ("wrong_device_of_a_tensor", ADDRESS, "KernelFault: wrong device: fill_struct"),
    ("needless_synchronisation", ADDRESS, "CheckFailed: host reference: the host does not wait"),
    ("stream_of_another_device", ADDRESS, "CudaError: cuda_emulation/host_bugs.cu:"),
    ("shared_memory_limit_of_one_device", ADDRESS, "CudaError: cuda_emulation/host_bugs.cu:"),
    ("empty_grid", ADDRESS, "CudaError: cuda_emulation/host_bugs.cu:"),
    ("earlier_error", ADDRESS, "CudaError: cuda_emulation/host_bugs.cu:"),
    ("error_of_a_kernel_before", ADDRESS, "CudaError: cuda_emulation/host_bugs.cu:"),
    ("failing_launch", ADDRESS, "CudaError: cuda_emulation/host_bugs.cu:"),
    ("failing_call", ADDRESS, "CudaError: cuda_emulation/host_bugs.cu:"),
]

# What the message of an error that CUDA itself would report must say.
CUDA_ERRORS = {
    "stream_of_another_device": "cudaErrorInvalidResourceHandle (the stream belongs to device 1, current is",
    "shared_memory_limit_of_one_device": "launch of fill_through_shared failed: cudaErrorInvalidValue (102400 bytes",
    "empty_grid": "launch of fill failed: cudaErrorInvalidConfiguration (grid (0,1,1)",
    "earlier_error": "before the launch of fill: error of an earlier kernel or call: cudaErrorIllegalAddress",
    "error_of_a_kernel_before": "launch of fill met the error of a kernel launched earlier",
    "failing_launch": "launch of fill failed: cudaErrorNoKernelImageForDevice",
    "failing_call": "cudaMemsetAsync(out.data(), 0, 32, nullptr) failed: cudaErrorMemoryAllocation",
}


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return dict(zip((ADDRESS, THREAD), in_parallel(lambda s: build(SOURCES, s), (ADDRESS, THREAD)), strict=True))


@pytest.fixture(scope="module")
def planted(programs: dict[str, Path]) -> dict[str, Result]:
    results = in_parallel(lambda bug: run(programs[bug[1]], ["planted", bug[0]]), PLANTED)
    return {name: result for (name, _, _), result in zip(PLANTED, results, strict=True)}


@pytest.mark.parametrize(("bug", "finding"), [(name, finding) for name, _, finding in PLANTED])
def test_planted_bug_is_caught_by_its_checker(planted: dict[str, Result], bug: str, finding: str) -> None:
    assert (planted[bug].finding or "nothing was found").startswith(finding)


@pytest.mark.parametrize("bug", CUDA_ERRORS)
def test_cuda_error_names_place_kernel_and_cause(planted: dict[str, Result], bug: str) -> None:
    assert CUDA_ERRORS[bug] in planted[bug].output
    assert re.search(r"host_bugs\.cu:\d+", planted[bug].output)


@pytest.mark.parametrize("order", ORDERS)
def test_corrected_twins_pass_asan_and_ubsan(programs: dict[str, Path], order: str) -> None:
    result = run(programs[ADDRESS], ["corrected"], order=order)
    assert result.finding is None
    assert result.output.count("ok ") == len(PLANTED)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_corrected_twins_pass_tsan(programs: dict[str, Path], order: str) -> None:
    result = run(programs[THREAD], ["corrected"], order=order)
    assert result.finding is None
    assert result.output.count("ok ") == len(PLANTED)


def lines_with(source: str, text: str) -> list[int]:
    return [i for i, line in enumerate((FOLDER / source).read_text().splitlines(), 1) if text in line]


def test_divergence_report_names_both_barriers_and_who_waits_there(planted: dict[str, Result]) -> None:
    report = planted["barrier_divergence"].output
    assert "in kernel halves<planted>" in report
    assert "block (0,0,0)" in report
    waiting = [
        (int(a), int(b), int(n))
        for a, b, n in re.findall(r"threads (\d+)-(\d+) wait in __syncthreads at .*?:(\d+)", report)
    ]
    assert [(a, b) for a, b, _ in waiting] == [(0, 31), (32, 63)]
    assert waiting[0][2] != waiting[1][2]
    assert {n for _, _, n in waiting} <= set(lines_with("thread_bugs.cu", "__syncthreads"))


def test_deadlock_report_names_the_lanes_that_are_waited_for(planted: dict[str, Result]) -> None:
    report = planted["deadlock"].output
    (line,) = lines_with("thread_bugs.cu", "waits for all 32 lanes")
    assert re.search(
        rf"threads 0-15 wait in a warp operation at .*:{line}, mask 0xffffffff, for the lanes 0xffff0000", report
    )
    (line,) = lines_with("thread_bugs.cu", "waits for all threads")
    assert re.search(rf"threads 16-31 wait in __syncthreads at .*:{line}", report)


def test_race_report_names_the_lines_of_the_kernel(planted: dict[str, Result]) -> None:
    (line,) = lines_with("thread_bugs.cu", "bins[t % 4] += 1")
    assert f"thread_bugs.cu:{line}" in planted["race_between_threads"].output
