# SPDX-License-Identifier: Apache-2.0
"""Occupancy as NVIDIA counts it, and the resources of a kernel as nvcc reports them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_resources import (
    KernelResources,
    Occupancy,
    compile_for_gpu,
    nvcc_is_missing,
    occupancy,
    parse_ptxas,
)

KERNELS = Path(__file__).parent / "cuda_emulation" / "kernels.cu"
needs_nvcc = pytest.mark.skipif(nvcc_is_missing() is not None, reason=str(nvcc_is_missing()))

# (threads, registers, shared bytes) → blocks on sm_80, sm_90 and sm_100, from CUDA 13.0's cuda_occupancy.h
# (cudaOccMaxActiveBlocksPerMultiprocessor).
NVIDIA = {
    (256, 32, 0): (8, 8, 8),
    (256, 33, 0): (6, 6, 6),
    (256, 40, 0): (6, 6, 6),
    (256, 64, 0): (4, 4, 4),
    (256, 128, 0): (2, 2, 2),
    (256, 255, 0): (1, 1, 1),
    (1024, 64, 0): (1, 1, 1),
    (1024, 65, 0): (0, 0, 0),
    (96, 32, 0): (21, 21, 21),
    (160, 72, 0): (5, 5, 5),
    (200, 50, 3000): (5, 5, 5),
    (64, 16, 0): (32, 32, 32),
    (32, 255, 0): (8, 8, 8),
    (32, 24, 5000): (27, 32, 32),
    (1, 1, 0): (32, 32, 32),
    (128, 32, 48 << 10): (3, 4, 4),
    (128, 168, 64 << 10): (2, 3, 3),
    (128, 32, 100 << 10): (1, 2, 2),
    (128, 32, 163 << 10): (1, 1, 1),
    (128, 32, 227 << 10): (0, 1, 1),
}


@pytest.mark.parametrize("block", NVIDIA)
def test_occupancy_is_that_of_nvidias_calculator(block: tuple[int, int, int]) -> None:
    assert tuple(occupancy(arch, *block).blocks for arch in (80, 90, 100)) == NVIDIA[block]


def test_occupancy_says_what_limits_it() -> None:
    assert occupancy(80, 256, 32) == Occupancy(8, 1.0, "threads")
    assert occupancy(80, 256, 40) == Occupancy(6, 0.75, "registers")
    assert occupancy(80, 128, 32, 48 << 10) == Occupancy(3, 0.1875, "shared memory")
    assert occupancy(80, 32, 16) == Occupancy(32, 0.5, "blocks")


def test_occupancy_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"arch is 75 \(expected one of \[80, 90, 100\]\)"):
        occupancy(75, 256, 32)
    with pytest.raises(ValueError, match=r"threads is 1056 \(expected 1 to 1024\)"):
        occupancy(80, 1056, 32)


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8medaccel5marchIfLi4EEEvPKT_PS1_i' for 'sm_80'
ptxas info    : Function properties for _ZN8medaccel5marchIfLi4EEEvPKT_PS1_i
    208 bytes stack frame, 380 bytes spill stores, 384 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4096 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 71.784 ms
ptxas info    : Compiling entry function '_ZN8medaccel12_GLOBAL__N_14fillEPfi' for 'sm_100'
ptxas info    : Function properties for _ZN8medaccel12_GLOBAL__N_14fillEPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _ZN8medaccel4slowEv
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 356 bytes cmem[0]
"""


def test_ptxas_report_is_read() -> None:
    fill, march = parse_ptxas(PTXAS)
    assert march == KernelResources(
        kernel="medaccel::march<float, 4>",
        signature="void medaccel::march<float, 4>(float const*, float*, int)",
        arch=80,
        registers=32,
        spill_store_bytes=380,
        spill_load_bytes=384,
        stack_bytes=208,
        static_shared_bytes=4096,
    )
    assert (fill.kernel, fill.arch, fill.registers, fill.static_shared_bytes) == ("medaccel::fill", 100, 8, 0)
    assert (fill.spill_store_bytes, fill.spill_load_bytes) == (12, 16)


def test_resources_lead_to_occupancy() -> None:
    march = parse_ptxas(PTXAS)[1]
    assert march.occupancy(256) == occupancy(80, 256, 32, 4096)
    assert march.occupancy(256, 40000) == occupancy(80, 256, 32, 44096)


@pytest.mark.slow
@needs_nvcc
def test_the_emulated_source_compiles_for_every_gpu_without_warnings_and_spills() -> None:
    kernels = compile_for_gpu(KERNELS)
    names = {k.kernel for k in kernels}
    assert {"kernels::laplacian_kernel", "kernels::row_sums_kernel<double, 96>"} <= names
    assert len(kernels) == 3 * len(names)
    for k in kernels:
        assert k.spill_store_bytes == k.spill_load_bytes == 0
        assert 0 < k.registers <= 64
        assert k.occupancy(96, 1000).blocks >= 8
    shared = {k.arch: k.static_shared_bytes for k in kernels if k.kernel == "kernels::laplacian_kernel"}
    assert shared[80] == 10 * 10 * 4


SPILLING = """\
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {
    float v[60], sum = 0;
    for (int i = 0; i < 60; ++i) v[i] = x[i * 32 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 60; ++i) v[i] += sum = sum * v[i] + x[i];
    __syncthreads();
    for (int i = 0; i < 60; ++i) x[i * 32 + threadIdx.x] = v[i] * sum;
}
"""


@needs_nvcc
def test_spills_are_an_error_unless_allowed(tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    with pytest.raises(RuntimeError, match=r"Registers are spilled .* function '_Z8spillingPf'"):
        compile_for_gpu(source, archs=(80,))
    (kernel,) = compile_for_gpu(source, archs=(80,), allow_spills=True)
    assert kernel.kernel == "spilling"
    assert kernel.spill_store_bytes > 0
    assert kernel.spill_load_bytes > 0


@needs_nvcc
def test_warnings_are_errors(tmp_path: Path) -> None:
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void kernel(float* x) { int unused = 1; x[0] = 1.f; }\n")
    with pytest.raises(RuntimeError, match='variable "unused" was declared but never referenced'):
        compile_for_gpu(source, archs=(80,))
