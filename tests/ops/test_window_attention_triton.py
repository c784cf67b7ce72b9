# SPDX-License-Identifier: Apache-2.0
"""Tests the attention's GPU kernel: executed on the CPU with every access checked, and compiled for each
architecture."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted here")

from medaccel.ops.window_attention import op, reference
from medaccel.ops.window_attention import triton as kernels
from medaccel.ops.window_attention.cases import Case, named
from tests.ops.checks import assert_twice_as_good
from tests.triton_interpretation.aot import ARCHS, Build, assert_resources, compile_all

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from tests.triton_interpretation.interpret import Interpreter

# The interpreter runs about 1,500 programs a second: few windows.
CASES = [
    Case("padded_shifted", (3, 4, 5), (3, 3, 3), (0, 1, 2), 2, 4),
    Case("two_samples", (2, 5, 4), (2, 3, 3), (1, 2, 0), 3, 8, batch=2),
    Case("several_tiles", (2, 5, 6), (2, 5, 5), (1, 2, 0), 1, 16),
    Case("dropout", (2, 4, 5), (2, 3, 3), (1, 2, 2), 2, 8, batch=2, dropout_p=0.3),
    Case("large_scores", (2, 5, 4), (2, 3, 3), (0, 2, 2), 1, 8, spread=12.0),
    Case("no_padding_tensor", (3, 5, 4), (3, 3, 3), (0, 2, 2), 2, 8, pad=False),
    Case("corner_of_the_index", (2, 2, 2), (2, 2, 2), (0, 0, 0), 4, 8, full_window=(3, 3, 3)),
    Case("channels_first", (3, 4, 5), (3, 4, 3), (0, 1, 1), 2, 8, batch=2, view="channels_first"),
    Case("expanded", (3, 4, 3), (3, 4, 3), (0, 0, 0), 2, 8, batch=2, view="expanded"),
    Case("head_dim_32", (2, 4, 5), (2, 3, 3), (1, 2, 2), 1, 32),
    Case("head_dim_64", (2, 4, 4), (2, 4, 4), (0, 0, 0), 1, 64),
    *map(named, ("image", "signal", "size_one_axes", "single_token", "head_dim_1", "window_of_one_token")),
    *map(named, ("empty_batch", "empty_axis")),
]
HALVES = ("padded_shifted", "several_tiles", "dropout")
FLOOR = {torch.float32: 2e-7, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def arguments(case: Case, tensors: tuple) -> tuple:
    """Returns the arguments that the op passes to a kernel."""
    seed = torch.tensor(81985529216486895) if case.dropout_p else None
    return (*tensors, seed, case.window, case.shift, case.head_dim**-0.5, case.dropout_p)


def with_autograd(case: Case, tensors: tuple, grad: Tensor) -> list[Tensor]:
    """The reference's output and gradients, in the precision of the tensors or of an enclosing autocast."""
    qkv, table, index, pad = tensors
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (qkv, table, pad)]
    y = reference.shifted_window_attention(*arguments(case, (leaves[0], leaves[1], index, leaves[2])))
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(y, wanted, grad.to(y.dtype), materialize_grads=True, allow_unused=True)
    return [y.detach(), *gradients]


def with_kernels(case: Case, tensors: tuple, grad: Tensor, interpreter: Interpreter | None = None) -> list[Tensor]:
    args = arguments(case, tensors)
    y, lse = op._forward_cuda(*args)
    needs = (True, True, tensors[3] is not None)
    gradients = op._backward_cuda(grad.to(y.dtype), *args[:5], y, lse, *args[5:], *needs)
    if interpreter and y.numel():
        interpreter.assert_written(y=y, lse=lse, grad_qkv=gradients[0], grad_table=gradients[1])
    return [y, *gradients[: 2 + (tensors[3] is not None)]]


def inputs(case: Case, dtype: torch.dtype) -> tuple[tuple, Tensor]:
    qkv, table, index, pad = case.tensors()
    grad = torch.randn((*qkv.shape[:-1], qkv.shape[-1] // 3), generator=torch.Generator().manual_seed(1)).to(dtype)
    return (qkv.to(dtype), table, index, None if pad is None else pad.to(dtype)), grad


def precisely(tensors: tuple, dtype: torch.dtype) -> tuple:
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.float32, id=f"{case}-fp32") for case in CASES),
        *(
            pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}")
            for case in CASES
            if case.name in HALVES
            for dtype in op.HALF
        ),
    ],
)
def test_output_and_gradients_match_the_fp64_reference(interpreter: Interpreter, case: Case, dtype: torch.dtype):
    tensors, grad = inputs(case, dtype)
    ours = with_kernels(case, tensors, grad, interpreter)
    truth = with_autograd(case, precisely(tensors, torch.float64), grad.double())
    # Half precision as PyTorch trains in it: products of the rounded numbers, softmax in fp32.
    half = torch.autocast("cpu", dtype) if dtype in op.HALF else contextlib.nullcontext()
    with half:
        plain = with_autograd(case, precisely(tensors, torch.float32), grad.float())
    terms = float(grad.abs().max() * tensors[0].abs().max()) if grad.numel() else 0.0
    for actual, same_precision, exact in zip(ours, plain, truth, strict=True):
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        assert_twice_as_good(actual, same_precision, exact, FLOOR[dtype], max(largest, terms))
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous()


@pytest.mark.interpreted
def test_the_tiles_of_every_architecture_agree(interpreter: Interpreter):
    case = CASES[0]
    tensors, grad = inputs(case, torch.bfloat16)
    args = arguments(case, tensors)
    for arch in ARCHS:
        y, lse = kernels.forward(*args, arch=arch)
        grads = kernels.backward(grad, *args[:5], y, lse, *args[5:], True, True, True, arch=arch)
        if arch == ARCHS[0]:
            first = (y, lse, *grads)
        for ours, other in zip((y, lse, *grads), first, strict=True):
            assert float((ours.float() - other.float()).abs().max()) <= 0.01 * float(other.abs().max())


@pytest.mark.interpreted
def test_repeated_gradients_have_the_same_bits_and_only_wanted_ones_are_made(interpreter: Interpreter):
    case = CASES[1]
    tensors, grad = inputs(case, torch.float32)
    everything = with_kernels(case, tensors, grad)
    args = arguments(case, tensors)
    y, lse = kernels.forward(*args)
    saved = (grad, *args[:5], y, lse, *args[5:])
    again = kernels.backward(*saved, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip((y, *again), everything, strict=True))
    for wanted in range(3):
        needs = [number == wanted for number in range(3)]
        grads = kernels.backward(*saved, *needs)
        assert torch.equal(grads[wanted], again[wanted])
        assert [g.numel() > 0 for g in grads] == needs


@pytest.mark.interpreted
def test_a_nan_stays_within_its_window(interpreter: Interpreter):
    case = Case("nan", (4, 8), (4, 4), (0, 0), 1, 8)
    tensors, grad = inputs(case, torch.float32)
    tensors[0][0, 1, 6, 3] = float("nan")
    y, grad_qkv, *_ = with_kernels(case, tensors, grad)
    for result in (y, grad_qkv):
        assert result[:, :, :4].isfinite().all()
        assert result[:, :, 4:].isnan().any()


@pytest.mark.interpreted
def test_an_index_outside_the_table_is_clamped(interpreter: Interpreter):
    case = CASES[1]
    (qkv, table, index, pad), grad = inputs(case, torch.float32)
    wild = index.clone()
    wild[0, 0], wild[1, 0], wild[2, 1] = -5, 2**31 - 1, table.shape[0]
    clamped = wild.clamp(0, table.shape[0] - 1)
    results = [with_kernels(case, (qkv, table, i, pad), grad, interpreter) for i in (wild, clamped)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.interpreted
def test_a_row_whose_first_scores_overflow_is_finite(interpreter: Interpreter):
    case = Case("overflow", (1, 64), (1, 64), (0, 0), 1, 8)
    (qkv, table, index, pad), grad = inputs(case, torch.float32)
    q, k = qkv[..., :8], qkv[..., 8:16]
    q[0, 0, 0], k[0, 0, :40] = 1e30, -1e30  # −∞ for the first query and every key of the first tile
    q[0, 0, 0, 1:], k[0, 0, 40:] = 0, 0
    y = with_kernels(case, (qkv, table, index, pad), grad)[0]
    truth = reference.shifted_window_attention(*arguments(case, (qkv, table, index, pad)))
    assert y.isfinite().all()
    assert torch.allclose(y[0, 0, 0], truth[0, 0, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "words"),
    [(torch.float64, 8, "computes in fp32"), (torch.float32, 70, "head dimensions up to 64, not 70")],
)
def test_what_the_kernel_does_not_serve_is_said(dtype: torch.dtype, head_dim: int, words: str):
    assert words in str(op.triton_problem(0, dtype, head_dim))


# --- compiled --------------------------------------------------------------------------------------------------
USES = {"forward_kernel": "forward", "query_kernel": "query", "key_kernel": "key", "bias_kernel": "bias"}
TYPES = {"fp32": "fp32", "half": "bf16"}


def build(kernel: str, arch: int, precision: str, head_dim: int, *, dropout: bool = False) -> Build:
    """A pass as Swin UNETR launches it: windows of 7³ tokens, shifted, on a map that needs padding."""
    element = TYPES[precision]
    tensors = {
        "forward_kernel": {"out_ptr": element, "lse_ptr": "fp32"},
        "query_kernel": {
            "lse_ptr": "fp32",
            "out_ptr": element,
            "grad_ptr": element,
            "delta_ptr": "fp32",
            "grad_qkv_ptr": element,
        },
        "key_kernel": {
            "lse_ptr": "fp32",
            "grad_ptr": element,
            "delta_ptr": "fp32",
            "grad_qkv_ptr": element,
            "grad_pad_ptr": "fp32",
        },
        "bias_kernel": {"lse_ptr": "fp32", "grad_ptr": element, "delta_ptr": "fp32", "partial_ptr": "fp32"},
    }[kernel]
    shared = {"qkv_ptr": element, "pad_ptr": element, "bias_ptr": "fp32", "index_ptr": "i16", "seed_ptr": "i64"}
    numbers = ["windows", "heads", "D0", "D1", "D2", "SHIFT0", "SHIFT1", "SHIFT2"]
    numbers += ["all_windows", "group"] if kernel == "bias_kernel" else []
    signature = {name: f"*{t}" for name, t in (shared | tensors).items()} | dict.fromkeys(numbers, "i32")
    signature |= {"scale": "fp32", "threshold": "i64", "kept_scale": "fp32"}
    tile = kernels.TILES[arch][precision][head_dim][USES[kernel]]
    constants = {
        "W0": 7,
        "W1": 7,
        "W2": 7,
        "T": 13**3,
        "HEAD_DIM": head_dim,
        "BLOCK_D": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SHIFTED": True,
        "PAD": True,
        "DROPOUT": dropout,
        **({"GRAD_PAD": True} if kernel == "key_kernel" else {}),
    }
    name = f"medaccel.ops.window_attention.triton:{kernel}"
    return Build(name, arch, signature, constants, tile.num_warps, tile.num_stages)


def narrow(whole: Build) -> Build:
    """Narrows the build to head_dim 8 on an image of one window and head: sizes of 1 are constants to Triton."""
    ones = dict.fromkeys({"windows", "heads", "D0", "all_windows", "group"} & set(whole.signature), 1)
    signature = {name: t for name, t in whole.signature.items() if name not in ones}
    return replace(whole, signature=signature, constants={**whole.constants, **ones, "W0": 1, "HEAD_DIM": 8})


def test_every_tile_fits_every_architecture_without_spills(triton_cache: Path):
    builds = [
        build(kernel, arch, precision, head_dim)
        for kernel in USES
        for arch, precisions in kernels.TILES.items()
        for precision, dims in precisions.items()
        for head_dim in dims
    ]
    # Dropout needs registers of its own; on one architecture: a build takes seconds.
    builds += [
        build(kernel, 90, precision, d, dropout=True) for kernel in USES for precision in TYPES for d in (16, 64)
    ]
    builds += [narrow(build(kernel, 80, "half", 16)) for kernel in USES]
    table = {"partial_ptr": "*fp32", "order_ptr": "*i32", "start_ptr": "*i32", "grad_table_ptr": "*fp32"}
    constants = {"PAIRS": 343**2, "BLOCK": kernels.TABLE_BLOCK, "BLOCK_HEADS": 32}
    sizes = {"groups": "i32", "heads": "i32"}
    name = "medaccel.ops.window_attention.triton:table_kernel"
    builds += [Build(name, arch, table | sizes, constants) for arch in ARCHS]
    results = compile_all(builds, triton_cache)
    # sm_86 and consumer GPUs run sm_80's tiles in 99 KiB.
    assert_resources(results, shared=dict.fromkeys(ARCHS, 99 * 1024))
    for result in results:
        assert not result.atomics
        on_matrix_units = result.build.signature.get("qkv_ptr") == "*bf16"
        assert bool(result.matrix_instructions) == on_matrix_units
