# SPDX-License-Identifier: Apache-2.0
"""Compiles the two small ops for every architecture with no GPU, and tests the gates on their resources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be compiled here")

from . import kernels
from .aot import ARCHS, Build, assert_resources, compile_all
from .errors import CompilationFailed, ResourceLimit

pytestmark = pytest.mark.slow

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KERNELS, BUGS = "tests.triton_interpretation.kernels", "tests.triton_interpretation.planted_bugs"


def scale_bias_build(arch: int, dtype: torch.dtype) -> Build:
    pointers = dict.fromkeys(("x_ptr", "scale_ptr", "bias_ptr", "y_ptr"), f"*{DTYPES[dtype]}")
    signature = pointers | {"n_elements": "i64", "channels": "i32"}
    return Build(f"{KERNELS}:scale_bias_kernel", arch, signature, {"BLOCK": kernels.SCALE_BIAS_BLOCK})


def matmul_build(arch: int, dtype: torch.dtype) -> Build:
    tile = kernels.TILES[arch][dtype]
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), f"*{DTYPES[dtype]}")
    return Build(
        f"{KERNELS}:matmul_kernel",
        arch,
        pointers | dict.fromkeys("mnk", "i32"),
        {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def copy_build(arch: int) -> Build:
    return Build(f"{BUGS}:copy", arch, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}, {"BLOCK": 128})


def with_aligned_rows(build: Build) -> Build:
    """Launches with n and k divisible by 16, which gives other code, vectorised and pipelined."""
    return replace(build, aligned=("a_ptr", "b_ptr", "c_ptr", "n", "k"))


def spilling_build(arch: int, num_warps: int) -> Build:
    tile = {"ROWS": 128, "COLUMNS": 64}
    return Build(f"{BUGS}:spills", arch, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, tile, num_warps)


def deep_build(arch: int, num_stages: int) -> Build:
    """A matrix product whose pipeline holds 32 KiB per stage."""
    build = replace(matmul_build(arch, torch.bfloat16), num_stages=num_stages)
    return with_aligned_rows(replace(build, constants={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}))


def test_ops_fit_every_architecture_without_spills(triton_cache: Path) -> None:
    builds = [make(arch, dtype) for make in (scale_bias_build, matmul_build) for arch in ARCHS for dtype in DTYPES]
    builds += [with_aligned_rows(matmul_build(arch, torch.bfloat16)) for arch in ARCHS]
    results = compile_all(builds, triton_cache)
    assert [result.build for result in results] == builds
    assert_resources(results)
    assert all(result.registers > 8 for result in results)
    assert not any(result.atomics for result in results)
    for result in results:
        on_matrix_units = "matmul" in result.build.kernel and result.build.signature["a_ptr"] != "*fp32"
        expected = {80: ["mma.sync"], 90: ["wgmma"], 100: ["tcgen05.mma"]}[result.build.arch]
        assert result.matrix_instructions == (expected if on_matrix_units else [])


def test_spill_gate_fires_on_a_kernel_that_spills(triton_cache: Path) -> None:
    *spilling, sound = compile_all([*(spilling_build(a, 1) for a in ARCHS), spilling_build(80, 4)], triton_cache)
    assert_resources([sound])
    for result in spilling:
        with pytest.raises(ResourceLimit, match=rf"spills sm_{result.build.arch} .*: spills \d+ bytes per thread"):
            assert_resources([result])
        assert_resources([result], spill_bytes=result.spill_stores + result.spill_loads)
    with pytest.raises(ResourceLimit, match=r"spills sm_80(.*\n)+.*spills sm_100"):
        assert_resources([*spilling, sound])
    with pytest.raises(ResourceLimit, match=r"\d+ registers \(allowed 32\)"):
        assert_resources([sound], registers=32)


def test_shared_memory_gate_knows_each_architecture(triton_cache: Path) -> None:
    too_much_for_80, enough_for_90 = compile_all([deep_build(80, 7), deep_build(90, 6)], triton_cache)
    assert too_much_for_80.shared <= enough_for_90.shared
    assert_resources([enough_for_90])
    needed = too_much_for_80.shared
    with pytest.raises(ResourceLimit, match=rf"{needed} bytes of shared memory \(allowed 166912\)"):
        assert_resources([too_much_for_80])
    with pytest.raises(ResourceLimit, match=r"sm_90 .* bytes of shared memory \(allowed 49152\)"):
        assert_resources([enough_for_90], shared={90: 48 * 1024})


def test_atomics_are_seen_in_the_compiled_code(triton_cache: Path) -> None:
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}
    builds = [Build(f"{BUGS}:histogram", 90, signature, {"BLOCK": 64, "ATOMIC": atomic}) for atomic in (True, False)]
    counting, plain = compile_all(builds, triton_cache)
    assert counting.atomics
    assert not plain.atomics


def test_a_kernel_that_does_not_compile_is_named_with_the_reason(triton_cache: Path) -> None:
    missing = replace(copy_build(80), constants={})
    failing = Build(f"{BUGS}:never_compiles", 90, {"x_ptr": "*fp32"})
    with pytest.raises(CompilationFailed) as caught:
        compile_all([missing, failing], triton_cache)
    first, second = str(caught.value).split("\n", 1)
    assert "copy sm_80" in first
    assert "arguments ['BLOCK'] are in the kernel or in the build, but not in both" in first
    assert "never_compiles sm_90" in second
    assert "static assertion on purpose" in second


def test_a_crash_of_the_compiler_is_reported_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing_kernels.py").write_text("import os\nos.write(2, b'out of luck')\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(CompilationFailed, match="process ended with 7:\nout of luck"):
        compile_all([Build("crashing_kernels:kernel", 80, {})], tmp_path)


def test_kernels_from_the_cache_report_the_same_resources(tmp_path: Path) -> None:
    fresh, cached = compile_all([copy_build(90), copy_build(90)], tmp_path)
    assert cached == fresh
    (kept,) = tmp_path.glob("*.ptxas")
    kept.unlink()
    assert compile_all([copy_build(90)], tmp_path) == [fresh]
