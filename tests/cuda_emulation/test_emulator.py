# SPDX-License-Identifier: Apache-2.0
"""The emulator computes what a GPU would, in any order, and says no to what it doesn't know."""

from __future__ import annotations

import subprocess
import sysconfig
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.cuda_emulation.sanitized import (
    ADDRESS,
    CSRC,
    ORDERS,
    THREAD,
    build,
    build_and_run,
    compiler_is_missing,
    load_module,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler_is_missing() is not None, reason=str(compiler_is_missing())),
]

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "kernels.cu", FOLDER / "check_kernels.cpp")
CASES = 9


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_agree_with_the_host_in_every_order(order: str) -> None:
    result = build_and_run(SOURCES, order=order)
    assert result.finding is None
    assert result.output.count("ok ") == CASES


@pytest.mark.parametrize(("sanitizer", "order"), [(ADDRESS, "fwd"), (ADDRESS, "rand1"), (THREAD, "rev")])
def test_kernels_pass_the_sanitizers(sanitizer: str, order: str) -> None:
    result = build_and_run(SOURCES, sanitizer, order=order)
    assert result.finding is None
    assert result.output.count("ok ") == CASES


@pytest.mark.parametrize("order", ["backwards", "rand", "rand-1", "random7"])
def test_unknown_order_is_refused(order: str) -> None:
    result = build_and_run(SOURCES, order=order)
    assert result.returncode != 0
    assert f"MEDACCEL_EMU_ORDER is '{order}' (expected fwd, rev, or rand and a number" in result.output


# ---- What is not emulated does not compile ----


@pytest.mark.parametrize(
    "statement",
    [
        "__shared__ float x[4]; x[0] = 1.f;",
        "float y = __expf(1.f); (void)y;",
        "atomicAdd(static_cast<short*>(nullptr), short{1});",
        "__half h = __half(1.f); h = h + h;",
        "cudaStreamBeginCapture(nullptr, 0);",
        "unsigned lanes = __activemask(); (void)lanes;",
        "__syncthreads_or(1);",
    ],
)
def test_what_is_not_emulated_does_not_compile(statement: str, tmp_path: Path) -> None:
    assert not compiles(statement, tmp_path)


def test_what_is_emulated_compiles(tmp_path: Path) -> None:
    assert compiles("SHARED(float, x, [4]); x[0] = sqrtf(1.f); __syncthreads();", tmp_path)


def compiles(statement: str, folder: Path) -> bool:
    source = folder / "statement.cu"
    source.write_text(f'#include "common/cuda_portable.h"\n__global__ void kernel() {{ {statement} }}\n')
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{CSRC}", "-x", "c++", str(source)]
    return subprocess.run(command, capture_output=True).returncode == 0


# ---- Within a Python module ----


@pytest.fixture(scope="module")
def module() -> ModuleType:
    pybind11 = pytest.importorskip("pybind11")
    include = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    sources = (FOLDER / "kernels.cu", FOLDER / "emulator_module.cpp")
    return load_module("emulator_module", build(sources, extra_flags=(*include, "-O1"), shared=True))


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def tickets(module: ModuleType, blocks: int, threads: int) -> np.ndarray:
    counter = np.zeros(1, np.int32)
    ticket = np.full((blocks, threads), -1, np.int32)
    module.take_tickets(address(counter), address(ticket), blocks, threads)
    return ticket


def test_order_of_blocks_and_threads_is_the_one_asked_for(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {}
    for order in ORDERS:
        monkeypatch.setenv("MEDACCEL_EMU_ORDER", order)
        taken[order] = tickets(module, 6, 40)
        np.testing.assert_array_equal(tickets(module, 6, 40), taken[order])
    in_order = np.arange(240).reshape(6, 40)
    np.testing.assert_array_equal(taken["fwd"], in_order)
    np.testing.assert_array_equal(taken["rev"], in_order[::-1, ::-1])
    for name in ("rand1", "rand2"):
        assert set(taken[name].ravel()) == set(range(240))
        assert (np.diff(taken[name][0]) < 0).any()  # threads are shuffled,
        assert (np.diff(taken[name].min(axis=1)) < 0).any()  # and so are blocks
    assert (taken["rand1"] != taken["rand2"]).any()


def test_module_works_after_a_fault(module: ModuleType) -> None:
    out = np.zeros(64, np.int32)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="barrier divergence") as caught:
            module.diverge(address(out))
        np.testing.assert_array_equal(tickets(module, 3, 64).ravel(), np.arange(192))
    assert "in kernel diverge" in str(caught.value)
    assert "threads 0-4 wait in __syncthreads" in str(caught.value)
    assert "threads 5-63 wait in __syncthreads" in str(caught.value)
    assert not out.any()


def test_refused_launch_is_an_exception(module: ModuleType) -> None:
    out = np.zeros(64, np.int32)
    with pytest.raises(
        RuntimeError, match=r"emulator_module.cpp:\d+: launch of diverge failed: .*block \(2000,1,1\)"
    ):
        module.launch_too_many_threads(address(out))
    tickets(module, 1, 32)  # the error was reported once, and does not linger


def test_device_code_outside_a_kernel_is_an_exception(module: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="device code was called outside a kernel"):
        module.device_code_on_the_host()


def test_launches_from_several_threads_do_not_mix(module: ModuleType) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.integers(-50, 50, 640, dtype=np.int32) for _ in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        expected = inputs[number].reshape(-1, 64).cumsum(axis=1, dtype=np.int32).ravel()
        for _ in range(20):
            out = np.full(640, -1, np.int32)
            module.scan(address(inputs[number]), address(out), 640)
            if not np.array_equal(out, expected):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


# ---- 16-bit numbers ----


def floats_near_every_half() -> np.ndarray:
    """Every fp16 and bf16 number, the midpoints between neighbours, and what lies just beside these."""
    half = np.arange(65536, dtype=np.uint32)
    exact = np.concatenate([half.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32), half << 16])
    midpoints = np.concatenate([exact[:65536] + 0x1000, exact[65536:] + 0x8000])
    subnormal = (np.arange(4096, dtype=np.float32) * np.float32(2.0**-26)).view(np.uint32)
    bits = np.concatenate([exact, midpoints, midpoints - 1, midpoints + 1, subnormal])
    return bits.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_conversion_to_16_bits_rounds_to_nearest_even(module: ModuleType, bfloat16: bool) -> None:
    torch = pytest.importorskip("torch")
    values = floats_near_every_half()
    half = np.zeros(values.size, np.uint16)
    module.to_half(address(values), address(half), values.size, bfloat16)
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(half[number], expected[number])
    assert (half[~number] == 0x7FFF).all()  # CUDA's NaN


@pytest.mark.parametrize("bfloat16", [False, True])
def test_conversion_from_16_bits_is_exact(module: ModuleType, bfloat16: bool) -> None:
    torch = pytest.importorskip("torch")
    half = np.arange(65536, dtype=np.uint16)
    values = np.zeros(half.size, np.float32)
    module.from_half(address(half), address(values), half.size, bfloat16)
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    expected = torch.from_numpy(half.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.signbit(values), np.signbit(expected))
