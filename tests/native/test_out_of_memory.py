# SPDX-License-Identifier: Apache-2.0
"""Out of memory inside an op: the exception reaches the caller, nothing leaks, and the next call works."""

import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import gaussian_filter
from tests.ops.checks import EMULATED, emulated_module, implementation

HERE = Path(__file__).resolve().parent
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")

# A border that wraps makes each thread keep 4 whole planes (36 MiB, half of the volume); the output is as large as
# the volume. Blocks beyond 32 MiB are always mapped on their own, so that the limit counts them to the byte.
LIMITED = """
import resource, sys
import torch
from medaccel.ops import gaussian_filter

threads, spare_mib, attempts = int(sys.argv[1]), int(sys.argv[2]), 6
x = torch.rand(1, 1, 8, 1536, 1536)

def call():
    torch.set_num_threads(threads)
    return gaussian_filter(x, 1.0, mode="wrap")

def address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

truth = call()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
start = address_space()
for _ in range(attempts):
    resource.setrlimit(resource.RLIMIT_AS, (start + (spare_mib << 20), hard))
    try:
        outcome = "the same bits" if torch.equal(call(), truth) else "WRONG"
    except (RuntimeError, MemoryError) as error:
        outcome = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    print(outcome.splitlines()[0])
print("kept, MiB:", address_space() - start >> 20)
print("after:", torch.equal(call(), truth))
"""


def run_limited(threads: int, spare_mib: int) -> tuple[list[str], int]:
    """Returns the result of each attempt with so much address space to spare, and how much of it was never given
    back."""
    command = [sys.executable, "-c", LIMITED, str(threads), str(spare_mib)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    *attempts, kept, after = result.stdout.splitlines()
    assert after == "after: True"
    return attempts, int(kept.removeprefix("kept, MiB: "))


@needs_linux
@pytest.mark.parametrize("threads", [1, 2])
def test_without_memory_for_the_output_the_user_meets_torchs_error(threads: int):
    attempts, kept = run_limited(threads, spare_mib=16)
    assert len(attempts) == 6
    assert all("RuntimeError" in a and "can't allocate memory: you tried to allocate" in a for a in attempts), (
        attempts
    )
    assert kept < 8


@needs_linux
@pytest.mark.parametrize("threads", [1, 2])
def test_without_memory_for_the_kernels_scratch_the_user_meets_a_memory_error(threads: int):
    attempts, kept = run_limited(threads, spare_mib=72 + 18)
    assert len(attempts) == 6
    assert set(attempts) == {"MemoryError: std::bad_alloc"}
    assert kept < 8


@needs_linux
def test_memory_for_one_threads_scratch_alone_gives_an_error_or_the_right_result_and_never_waits():
    # Which of the two depends on whether the threads overlap.
    attempts, kept = run_limited(2, spare_mib=72 + 54)
    assert len(attempts) == 6
    assert set(attempts) <= {"MemoryError: std::bad_alloc", "the same bits"}
    assert kept < 8


def test_an_exception_of_one_thread_ends_the_parallel_loop(tmp_path: Path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not here")
    program = tmp_path / "parallel"
    command = [compiler, "-std=gnu++17", "-O1", "-fopenmp", str(HERE / "parallel_driver.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == [
        "scratch of thread 0: bad_alloc",
        "scratch of thread 1: bad_alloc",
        "scratch of all: bad_alloc",
        "job 5: job 5 failed",
        "every job: a job failed",
        "none: nothing",
    ], result.stderr


# --- the GPU's wrapper: whichever of its allocations fails --------------------------------------------------------
class Allocator:
    """Torch's allocating functions as the wrappers call them, of which the n-th call fails; -1: none."""

    def __init__(self, fail_at: int) -> None:
        self.fail_at = fail_at
        self.calls = 0
        self.given: list[weakref.ref[Tensor]] = []

    def around(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_or_fail(*args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            if self.calls == self.fail_at + 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            tensor = allocate(*args, **kwargs)
            self.given.append(weakref.ref(tensor))
            return tensor

        return allocate_or_fail

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.given)


ALLOCATING = ((torch, "empty_like"), (torch, "zeros"), (Tensor, "new_empty"), (Tensor, "new_zeros"))


def allocator(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> Allocator:
    counter = Allocator(fail_at)
    for owner, name in ALLOCATING:
        monkeypatch.setattr(owner, name, counter.around(getattr(owner, name)))
    return counter


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """A tensor must go with its last reference: in a cycle, the GPU's memory would wait for the collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("where", EMULATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.slow
def test_whichever_allocation_of_the_gpu_filter_fails_torchs_error_arrives_and_nothing_stays(
    where: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    module = emulated_module()
    x, sigma = torch.randn(1, 2, 6, 7, 8, dtype=dtype), torch.full((3,), 1.0, dtype=torch.float64)
    with implementation(where):
        with monkeypatch.context() as patch:
            counted = allocator(patch, -1)
            truth = gaussian_filter(x, sigma)
        # the output, two temporaries, the workspace, and σ in the kernel's form where it lies on the device
        assert counted.calls == (5 if where == EMULATED[1] else 4)
        assert counted.alive() == 1  # the output
        for n in range(counted.calls):
            module.reset()
            with monkeypatch.context() as patch:
                failing = allocator(patch, n)
                with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB") as caught:
                    gaussian_filter(x, sigma)
            del caught  # its traceback holds the frames, and they the tensors
            assert len(failing.given) == n
            assert failing.alive() == 0
            assert module.launches() == []
            assert torch.equal(gaussian_filter(x, sigma), truth)


@pytest.mark.usefixtures("no_garbage_collection")
def test_a_backward_pass_that_runs_out_of_gpu_memory_can_be_repeated(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(1, 1, 6, 7, 8, requires_grad=True)
    sigma = torch.tensor([1.0, 0.7, 1.3], requires_grad=True)
    grad = torch.randn(1, 1, 6, 7, 8)
    with implementation(EMULATED[1]):
        y = gaussian_filter(x, sigma)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, (x, sigma), grad, retain_graph=True)

        with monkeypatch.context() as patch:
            counted = allocator(patch, -1)
            truth = backward()
        for n in range(counted.calls):
            with monkeypatch.context() as patch:
                failing = allocator(patch, n)
                with pytest.raises(torch.OutOfMemoryError) as caught:
                    backward()
            del caught
            assert failing.alive() == 0
        assert all(torch.equal(a, b) for a, b in zip(backward(), truth, strict=True))
    with use_reference():
        y = gaussian_filter(x, sigma)
        for ours, reference in zip(truth, backward(), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_an_output_that_no_machine_can_hold_is_torchs_error_on_every_path():
    x = torch.zeros(1).expand(1, 1, 1 << 17, 1 << 17, 1 << 17)  # 8 PiB as fp32, one element in memory
    for name in ("reference", "cpu-baseline", EMULATED[0]):
        with implementation(name), pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate"):
            gaussian_filter(x, 1.0)
