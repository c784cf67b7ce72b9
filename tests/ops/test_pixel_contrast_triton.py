# SPDX-License-Identifier: Apache-2.0
"""Tests the pixel contrast's GPU kernels, executed on the CPU with every access checked; test_gpu_gates.py compiles
them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted here")

from medaccel import _native
from medaccel.ops.pixel_contrast import op, reference
from medaccel.ops.pixel_contrast import triton as kernels
from medaccel.ops.pixel_contrast.cases import Views, named
from tests.ops.checks import assert_twice_as_good

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from tests.triton_interpretation.interpret import Interpreter

HALF = (torch.bfloat16, torch.float16)
CASES = [
    Views("volume", (4, 5, 3), 64),
    Views("image", (7, 9), 20, radius=1.5),
    Views("finer_view", (3, 4, 3), 24, key_sizes=(5, 4, 6), zoom=0.6),
    Views("half_overlap", (6, 6, 4), 16, shift=3.2),
    Views("all_positive", (3, 4, 3), 16, radius=100.0),
    Views("sharp", (4, 5, 3), 32, temperature=0.01),
    Views("wide", (3, 3, 3), 130),
    *map(named, ("no_overlap", "one_pixel", "one_channel", "empty_batch", "no_queries", "no_keys")),
    Views("sliced", (3, 4, 5), 12, view="sliced"),
    Views("channels_first", (3, 4, 5), 12, view="channels_first"),
]
FLOOR = {torch.float32: 3e-7, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def with_kernels(case: Views, tensors: tuple, grad: Tensor, interpreter: Interpreter | None = None) -> list[Tensor]:
    """The loss and the gradients to query and key."""
    loss, lse, positive_lse = op._forward_cuda(*tensors, case.temperature)
    saved = (grad, *tensors, lse, positive_lse, case.temperature)
    gradients = op._backward_cuda(*saved, True, True)
    if interpreter is not None and loss.numel() and tensors[1].numel():
        interpreter.assert_written(loss=loss, lse=lse, positive_lse=positive_lse)
    return [loss, *gradients, positive_lse != -torch.inf]


def with_autograd(case: Views, tensors: tuple, grad: Tensor) -> list[Tensor]:
    wanted = tuple(t.detach().clone().requires_grad_() for t in tensors[:2])
    loss, valid = reference.pixel_contrastive_loss(*wanted, *tensors[2:], case.temperature)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, grad.to(loss.dtype)), valid]


def in_half(case: Views, tensors: tuple, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Computes in half precision as PyTorch trains: a product of rounded unit vectors, the rest in fp32."""
    wanted = tuple(t.float().requires_grad_() for t in tensors[:2])
    units = [reference.unit(t).to(dtype) for t in wanted]
    scores = (units[0] @ units[1].transpose(1, 2)).float() / case.temperature
    positive = reference.near(*tensors[2:])
    valid = positive.any(dim=-1)
    part = scores.masked_fill(~positive & valid[..., None], -torch.inf).logsumexp(dim=-1)
    loss = torch.where(valid, scores.logsumexp(dim=-1) - part, 0.0)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, grad), valid]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.float32, id=f"{case}-fp32") for case in CASES),
        *(pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}") for case in CASES[:4] for dtype in HALF),
    ],
)
def test_loss_and_gradients_match_the_fp64_reference(interpreter: Interpreter, case: Views, dtype: torch.dtype):
    tensors = case.tensors(dtype)
    shape = (tensors[0].shape[0], tensors[0].shape[1])
    grad = torch.linspace(-0.5, 2.0, shape[0] * shape[1]).reshape(shape)
    ours = with_kernels(case, tensors, grad, interpreter)
    truth = with_autograd(case, (*(t.double() for t in tensors[:2]), *tensors[2:]), grad)
    plain = with_autograd(case, tensors, grad) if dtype == torch.float32 else in_half(case, tensors, grad, dtype)
    assert torch.equal(ours[3], truth[3])
    scale = 1.0 if truth[1].numel() == 0 else float((1 / tensors[0].float().norm(dim=-1)).max()) / case.temperature
    for i, size in ((0, 1 / min(1.0, case.temperature)), (1, scale), (2, scale)):
        assert_twice_as_good(ours[i], plain[i], truth[i], FLOOR[dtype], size)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.bfloat16, 1e25)])
def test_the_scale_of_the_features_changes_nothing(interpreter: Interpreter, dtype: torch.dtype, scale: float):
    case = CASES[2]
    query, key, *geometry = case.tensors(torch.float64)
    query[0, 1] = 0
    grad = torch.ones(query.shape[:2])
    loss, by_query, by_key, _ = with_kernels(case, (query.to(dtype), key.to(dtype), *geometry), grad)
    scaled = ((query * scale).to(dtype), (key * scale).to(dtype), *geometry)
    loss_of_scaled, *by_scaled, _ = with_kernels(case, scaled, grad)
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss_of_scaled, loss, rtol=eps, atol=eps)
    for found, plain in zip(by_scaled, (by_query, by_key), strict=True):
        largest = float(plain.abs().max())
        torch.testing.assert_close(found.double() * scale, plain.double(), rtol=eps, atol=eps * largest)
    assert not by_scaled[0][0, 1].any()


@pytest.mark.interpreted
def test_repeated_gradients_have_the_same_bits_and_only_wanted_ones_are_made(interpreter: Interpreter):
    case = CASES[2]
    tensors = case.tensors()
    loss, lse, positive_lse = kernels.forward(*tensors, case.temperature)
    saved = (torch.ones_like(loss), *tensors, lse, positive_lse, case.temperature)
    everything = kernels.backward(*saved, True, True)
    for needs in ((True, False), (False, True), (True, True)):
        gradients = kernels.backward(*saved, *needs)
        for gradient, all_of_them, need in zip(gradients, everything, needs, strict=True):
            assert torch.equal(gradient, all_of_them) if need else gradient.numel() == 0


@pytest.mark.interpreted
def test_zero_vectors_nan_coordinates_and_fp64_ones(interpreter: Interpreter):
    case = CASES[0]
    query, key, at_query, at_key, radius = case.tensors(coords=torch.float64)
    at_query = at_query.clone()
    query[0, 5], key[1, 7], at_query[0, 9, 1] = 0, 0, torch.nan
    tensors = (query, key, at_query, at_key, radius)
    grad = torch.ones(query.shape[:2])
    ours, truth = with_kernels(case, tensors, grad), with_autograd(case, tensors, grad)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not ours[1][0, 5].any()
    assert not ours[2][1, 7].any()
    assert not ours[3][0, 9]


@pytest.mark.interpreted
def test_a_nan_reaches_the_loss_of_the_pixels_that_meet_it(interpreter: Interpreter):
    case = CASES[3]
    query, key, *others = case.tensors()
    key[1, 3] = torch.nan
    loss, _, positive_lse = kernels.forward(query, key, *others, case.temperature)
    assert not loss[0].isnan().any()
    assert torch.equal(loss[1].isnan(), positive_lse[1] != -torch.inf)


@pytest.mark.interpreted
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-6), ("high", 4e-6), ("medium", 2e-3)])
def test_fp32_products_follow_torchs_precision(interpreter: Interpreter, precision: str, tolerance: float):
    case = CASES[0]
    tensors = case.tensors()
    grad = torch.ones(tensors[0].shape[:2])
    truth = with_autograd(case, (*(t.double() for t in tensors[:2]), *tensors[2:]), grad)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = with_kernels(case, tensors, grad, interpreter)
    finally:
        torch.set_float32_matmul_precision(before)
    worst = max(float((a - t).abs().max() / t.abs().max()) for a, t in zip(ours[:3], truth[:3], strict=True))
    assert worst <= tolerance
    if precision == "medium":
        assert worst > 2e-5  # it does round to TF32


@pytest.mark.parametrize(
    ("dtype", "channels", "sentence"),
    [
        (torch.float64, 64, "the Triton kernel computes in fp32 and has none for torch.float64"),
        (torch.float32, 300, "the Triton kernel has up to 256 channels, not 300"),
        (torch.float32, 64, "cuda:0 is sm_75; the Triton kernel needs sm_80 or newer"),
    ],
)
def test_what_the_kernel_does_not_serve_is_said(
    dtype: torch.dtype, channels: int, sentence: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(_native, "_probe_triton", _native._probe_triton.__wrapped__)
    assert op.triton_problem(0, dtype, channels).startswith(sentence)
