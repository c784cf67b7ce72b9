# SPDX-License-Identifier: Apache-2.0
"""Tests the attention's GPU kernels, executed on the CPU with every access checked; test_gpu_gates.py compiles
them."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted here")

from medaccel.ops.window_attention import op, reference
from medaccel.ops.window_attention import triton as kernels
from medaccel.ops.window_attention.cases import Case, named
from tests.ops.checks import assert_twice_as_good
from tests.triton_interpretation.aot import ARCHS

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
SMALL = Case("small", (2, 3, 4), (2, 2, 3), (0, 1, 2), 2, 8)
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


def results(case: Case, tensors: tuple, grad: Tensor, scale: float, interpreter: Interpreter) -> list[Tensor]:
    """The kernels' output and gradients at a scale of the caller's."""
    args = (*arguments(case, tensors)[:7], scale, case.dropout_p)
    y, lse = op._forward_cuda(*args)
    gradients = op._backward_cuda(grad.to(y.dtype), *args[:5], y, lse, *args[5:], True, True, True)
    interpreter.assert_written(y=y, lse=lse, grad_qkv=gradients[0], grad_table=gradients[1], grad_pad=gradients[2])
    return [y, *gradients]


@pytest.mark.interpreted
@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-4, 700.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_scale_is_served(interpreter: Interpreter, scale: float, dtype: torch.dtype):
    """Ordinary scales are left to the exponential's multiplication; the mask and the bias are divided by them."""
    case = SMALL
    (qkv, table, index, pad), grad = inputs(case, dtype)
    if abs(scale) > 1:
        qkv = qkv / scale**0.5
    ours = results(case, (qkv, table, index, pad), grad, scale, interpreter)

    def plain(precision: torch.dtype) -> list[Tensor]:
        leaves = [t.to(precision).requires_grad_() for t in (qkv, table, pad)]
        settings = (case.window, case.shift, scale, 0.0)
        y = reference.shifted_window_attention(leaves[0], leaves[1], index, leaves[2], None, *settings)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(precision))]

    half = torch.autocast("cpu", dtype) if dtype in op.HALF else contextlib.nullcontext()
    with half:
        same_precision = plain(torch.float32)
    terms = float(grad.abs().max() * qkv.abs().max()) * max(1.0, abs(scale))
    for actual, same, exact in zip(ours, same_precision, plain(torch.float64), strict=True):
        assert_twice_as_good(actual, same, exact, FLOOR[dtype], max(float(exact.abs().max()), terms))


@pytest.mark.interpreted
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-6), ("high", 4e-6), ("medium", 2e-3)])
def test_fp32_products_follow_torchs_precision(
    interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch, precision: str, tolerance: float
):
    case = SMALL
    tensors, grad = inputs(case, torch.float32)
    truth = with_autograd(case, precisely(tensors, torch.float64), grad.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = with_kernels(case, tensors, grad, interpreter)
    finally:
        torch.set_float32_matmul_precision(before)
    worst = max(float((a - t).abs().max() / t.abs().max()) for a, t in zip(ours, truth, strict=True))
    assert worst <= tolerance
    if precision == "medium":
        assert worst > 2e-5  # it does round to TF32


@pytest.mark.interpreted
def test_an_index_of_any_kind_dtype_and_stride_gives_the_tables_gradient(interpreter: Interpreter):
    """The pairs that read an entry follow from its number only where the index is the standard one."""
    case = SMALL
    (qkv, table, index, pad), grad = inputs(case, torch.float32)
    generator = torch.Generator().manual_seed(3)
    edited = index.clone()
    edited[5, 7] = edited[0, 3]
    shuffled = torch.randint(0, len(table), index.shape, generator=generator)
    strided = torch.full((2 * len(index), len(index)), -1)[::2].copy_(index.t()).t()
    for other in (edited, shuffled, index.to(torch.int16), index.to(torch.uint8), strided):
        tensors = (qkv, table, other, pad)
        truth = with_autograd(case, (qkv.double(), table.double(), other.long(), pad.double()), grad.double())
        for actual, exact in zip(with_kernels(case, tensors, grad, interpreter), truth, strict=True):
            torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreted
def test_an_index_edited_between_forward_passes_counts_at_once(interpreter: Interpreter):
    """Nothing that depends on the index is kept: hidden edits, which no version counts, are seen too."""
    case = SMALL
    (qkv, table, index, pad), grad = inputs(case, torch.float32)
    with_kernels(case, (qkv, table, index, pad), grad)
    index.data.copy_(index.flip(0))
    ours = with_kernels(case, (qkv, table, index, pad), grad)
    fresh = with_kernels(case, (qkv, table, index.clone(), pad), grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, fresh, strict=True))


@pytest.mark.interpreted
def test_heads_in_groups_give_the_same_bits(interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch):
    case = CASES[1]
    tensors, grad = inputs(case, torch.float32)
    whole = with_kernels(case, tensors, grad)
    monkeypatch.setattr(kernels, "_BIAS_BYTES", 2 * 4 * 64**2)  # two heads forward, one backward
    launches = len(interpreter.launches)
    parts = with_kernels(case, tensors, grad, interpreter)
    assert interpreter.launches[launches:].count("layout_kernel") == 2 + 3
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    ("window", "made_for"),
    [
        ((7, 7, 7), (7, 7, 7)),
        ((1, 7, 7), (1, 7, 7)),
        ((6, 6, 6), (7, 7, 7)),  # a corner
        ((3, 7, 7), (7, 7, 7)),
        ((1, 1, 343), (7, 7, 7)),  # its tokens in a row
        ((1, 1, 49), (1, 7, 7)),
        ((1, 5, 7), (1, 5, 7)),
        ((1, 1, 8), (1, 1, 8)),
        ((2, 4, 4), (2, 4, 5)),
    ],
)
def test_the_window_that_a_table_was_made_for_is_guessed(window: tuple[int, ...], made_for: tuple[int, ...]):
    rows = math.prod(2 * size - 1 for size in made_for)
    assert kernels.standard_window(window, rows) == made_for  # type: ignore[arg-type]


def test_no_window_is_guessed_for_a_table_of_another_kind():
    assert kernels.standard_window((3, 3, 3), 11) == (0, 0, 0)


def test_the_query_pass_covers_the_rows_that_the_others_read():
    """It writes the statistics of its tiles' queries; the others read those of theirs, without a mask."""
    for precisions in kernels.TILES.values():
        for dims in precisions.values():
            for tiles in dims.values():
                assert all(tiles["query"].block_m % tiles[use].block_m == 0 for use in ("key", "bias"))
                assert all(kernels.ROW_TILE % size == 0 for t in tiles.values() for size in (t.block_m, t.block_n))


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
            finite = other.isfinite()  # lse is ∞ for padding
            assert torch.equal(finite, ours.isfinite())
            difference = (ours.float() - other.float())[finite].abs().max()
            assert float(difference) <= 0.01 * float(other[finite].abs().max())


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
