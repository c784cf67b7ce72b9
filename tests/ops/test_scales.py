# SPDX-License-Identifier: Apache-2.0
"""Tests every op at every scale: dtype × autocast × inputs from 1e-30 to 1e30, values and gradients against fp64.

A row of features has a direction at 1e-30 as at 1e30; half precision is computed in fp32, whatever autocast surrounds
it; a loss is fp32 (fp64 for fp64). What the fp64 truth has within the result dtype's range must be finite and right,
what lies beyond it must not be a wrong number.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from medaccel import ops, use_reference
from medaccel.losses import ContrastiveLoss
from medaccel.ops.instance_norm import instance_norm_act
from medaccel.ops.window_attention.cases import relative_position_index
from tests.ops.checks import IMPLEMENTATIONS, assert_twice_as_good, implementation

SCALES = (1e-30, 1e-22, 1e-19, 1e-10, 1e-5, 1.0, 1e4, 1e10, 1e19, 1e22, 1e30)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
AUTOCAST = (None, torch.bfloat16, torch.float16)
HERE = tuple(name for name in IMPLEMENTATIONS if not name.startswith("cuda"))
# Rounding errors of the arithmetic, in units of the largest number: of sums over up to 200 terms.
ROUNDING = {torch.float64: 2e-13, torch.float32: 4e-6}


def randn(*shape: int, seed: int = 3) -> Tensor:
    """Numbers that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().double()


@dataclass(frozen=True)
class Op:
    """Holds one op as a function of its scaled inputs.

    Attributes:
        call: the op.
        inputs: those whose scale varies and which have gradients, fp64, at scale 1.
        loss: the result is fp32, or fp64 for fp64, whatever autocast says.
        cast: autocast casts the inputs, and so the result.
        result_cast: autocast casts the result alone.
        scales: factors on the inputs.
    """

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    loss: bool = False
    cast: bool = False
    result_cast: bool = False
    scales: tuple[float, ...] = field(default=SCALES)


AT = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0), torch.arange(4.0))[None].expand(2, -1, -1)
VIEWS = (AT, AT + 0.3)
PIXELS = (randn(2, 64, 12), randn(2, 64, 12).flip(1))
WINDOW = {"window_size": (2, 2, 2), "shift_size": (1, 1, 1)}
INDEX, TABLE = relative_position_index((2, 2, 2)), randn(27, 2)
QKV = randn(1, 3, 4, 4, 24)
QKV_WITHOUT_VALUES = torch.cat([QKV[..., :16], torch.zeros_like(QKV[..., 16:])], dim=-1)
STEP = {"a": 1.1, "b": -0.4, "c": 0.6, "d": 0.3, "e": 0.1, "s": 0.0}

OPS: dict[str, Op] = {
    "gaussian_filter": Op(
        lambda x: ops.gaussian_filter(x, (1.2, 0.7, 1.5)), (randn(1, 2, 6, 7, 5),), result_cast=True
    ),
    # Large scores amplify the rounding of what makes them; see below.
    "shifted_window_attention": Op(
        lambda x: ops.shifted_window_attention(x, TABLE.to(x), INDEX, **WINDOW),
        (QKV,), cast=True, scales=tuple(s for s in SCALES if s <= 1),
    ),
    "shifted_window_attention values": Op(
        lambda v: ops.shifted_window_attention(
            QKV_WITHOUT_VALUES.to(v) + torch.nn.functional.pad(v, (16, 0)), TABLE.to(v), INDEX, **WINDOW
        ),
        (QKV[..., 16:],), cast=True,
    ),
    "diffusion_step": Op(
        lambda x, m: ops.diffusion_step(x, m, **STEP)[0], (randn(2, 1, 4, 5), randn(2, 1, 4, 5, seed=5))
    ),
    "diffusion_step x0": Op(
        lambda x, m: ops.diffusion_step(x, m, clip=(-1.0, 1.0), **STEP)[1], (randn(2, 1, 4, 5), randn(2, 1, 4, 5))
    ),
    "instance_norm_act": Op(lambda x: instance_norm_act(x, negative_slope=0.1), (randn(2, 3, 5, 6, 4),)),
    "instance_norm_act channels last": Op(
        lambda x: instance_norm_act(x.contiguous(memory_format=torch.channels_last_3d)), (randn(2, 3, 5, 6, 4),)
    ),
    "instance_norm_act offset": Op(lambda x: instance_norm_act(x), (randn(1, 2, 5, 6, 4) + 3,)),
    "pixel_contrastive_loss": Op(
        lambda q, k: ops.pixel_contrastive_loss(q, k, *VIEWS, radius=1.2), PIXELS, loss=True
    ),
    "pixel_contrastive_loss rows": Op(
        lambda q, k: ops.pixel_contrastive_loss(q, k, *VIEWS, radius=1.2, reduction="none"), PIXELS, loss=True
    ),
    "pixel_consistency_loss": Op(
        lambda q, k: ops.pixel_consistency_loss(q, k, *VIEWS, radius=1.2), PIXELS, loss=True
    ),
    "pixel_propagation": Op(
        lambda x: ops.pixel_propagation(x, randn(2, 40, 5).to(x)), (randn(2, 40, 12),)
    ),
    "pixel_propagation values": Op(
        lambda v: ops.pixel_propagation(randn(2, 40, 12).to(v), v), (randn(2, 40, 5),)
    ),
    "nt_xent_loss": Op(lambda a, b: ops.nt_xent_loss(a, b), (randn(20, 12), randn(20, 12).flip(0)), loss=True),
    "nt_xent_loss sharp": Op(
        lambda a, b: ops.nt_xent_loss(a, b, temperature=0.05), (randn(20, 12), randn(20, 12).flip(0)), loss=True
    ),
    "info_nce_loss": Op(lambda a, b: ops.info_nce_loss(a, b), (randn(20, 12), randn(20, 12).flip(0)), loss=True),
    "ContrastiveLoss": Op(ContrastiveLoss(), (randn(20, 12), randn(20, 12).flip(0)), loss=True),
}  # fmt: skip


def autocast(dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def run(op: Op, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor], Callable[[Tensor], list[Tensor]]]:
    """The result, and what gives the inputs' gradients for an incoming one."""
    wanted = [x.detach().clone().requires_grad_() for x in inputs]
    result = op.call(*wanted)
    return result.detach(), lambda grad: list(torch.autograd.grad(result, wanted, grad.to(result.dtype)))


def assert_right(actual: Tensor, truth: Tensor, rounding: float, *through: torch.dtype) -> None:
    """Compares results: within the dtypes' range to their rounding and the arithmetic's; beyond it, roughly infinite.

    through: the dtypes that the numbers are rounded to on their way.
    """
    infos = [torch.finfo(dtype) for dtype in {actual.dtype, *through}]
    most = min(info.max for info in infos)
    a, t = actual.double(), truth.double()
    inside = t.abs() <= most
    assert a[inside].isfinite().all(), "not finite where the truth is within range"
    largest = float(t[inside].abs().max()) if inside.any() else 0.0
    allowed = rounding * largest + torch.zeros_like(t)
    for info in infos:  # half of eps, or of the smallest subnormal number
        allowed += 0.51 * info.eps * (t.abs() + info.smallest_normal)
    excess = ((a - t).abs() - allowed)[inside]
    assert (excess <= 0).all(), f"{float(excess.max()):.3g} beyond {float(allowed.max()):.3g} of {largest:.3g}"
    outside = a[t.abs() > 1.01 * most]
    assert (outside.isnan() | (outside.abs() >= 0.99 * most)).all(), "a wrong number where the truth is out of range"


def representable(dtype: torch.dtype, scale: float) -> bool:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps * 50 < scale < info.max / 50


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("how", "dtype"),
    [*itertools.product((HERE[0], HERE[-1]), DTYPES), *((isa, torch.float32) for isa in HERE[1:-1])],
    ids=str,
)
def test_values_and_gradients_at_every_scale(how: str, dtype: torch.dtype, name: str):
    op = OPS[name]
    for cast, scale in itertools.product(AUTOCAST, op.scales):
        effective = cast if op.cast and cast is not None and dtype != torch.float64 else dtype
        if not representable(dtype, scale) or not representable(effective, scale):
            continue
        inputs = [(x * scale).to(dtype) for x in op.inputs]
        exact = [x.to(effective).double() for x in inputs]
        with implementation(how), autocast(cast):
            result, backward = run(op, inputs)
        incoming = randn(*result.shape, seed=4).to(result.dtype)
        grads = backward(incoming)
        with use_reference():
            truth, true_backward = run(op, exact)
            true_grads = true_backward(incoming.double())
        if op.loss:
            assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        elif (op.cast or op.result_cast) and cast is not None and dtype != torch.float64:
            assert result.dtype == cast
        else:
            assert result.dtype == dtype
        rounding = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
        try:
            assert_right(result, truth, rounding, dtype if op.result_cast else result.dtype)
            # The attention's backward pass takes the result as it is, rounded to half precision.
            rounding += torch.finfo(effective).eps if op.cast and effective.itemsize == 2 else 0
            for grad, true_grad in zip(grads, true_grads, strict=True):
                assert grad.dtype == dtype
                assert_right(grad, true_grad, rounding, effective)
        except AssertionError as error:
            raise AssertionError(f"autocast {cast}, scale {scale:g}: {error}") from error


# --- beyond the table ------------------------------------------------------------------------------------------
ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pixel_contrastive_loss": lambda q, k: ops.pixel_contrastive_loss(q, k, *VIEWS, radius=1.2),
    "pixel_consistency_loss": lambda q, k: ops.pixel_consistency_loss(q, k, *VIEWS, radius=1.2),
    "pixel_propagation": lambda q, k: ops.pixel_propagation(q, torch.ones_like(k)).mean(),
    "nt_xent_loss": lambda q, k: ops.nt_xent_loss(q[0], k[0]),
    "info_nce_loss": lambda q, k: ops.info_nce_loss(q[0], k[0]),
}


def row_gradients(name: str, q: Tensor, k: Tensor) -> list[Tensor]:
    q, k = (t.detach().clone().requires_grad_() for t in (q, k))
    loss = ROWS[name](q, k)
    return [loss.detach(), torch.autograd.grad(loss, q)[0]]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [*((torch.float64, s) for s in (1e-305, 1e-200, 1e200, 1e305)), (torch.float32, 1e-37), (torch.float32, 1e37)],
    ids=str,
)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("how", HERE)
def test_rows_at_the_ends_of_a_dtypes_range(how: str, name: str, dtype: torch.dtype, scale: float):
    with implementation(how):
        loss, grad = row_gradients(name, *(x.to(dtype) for x in PIXELS))
        scaled_loss, scaled_grad = row_gradients(name, *(x.to(dtype) * scale for x in PIXELS))
    tight = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(scaled_loss, loss, rtol=tight, atol=0)
    expected = grad / scale
    within = expected.isfinite() & (expected.abs() > torch.finfo(dtype).smallest_normal * 1e4)
    torch.testing.assert_close(
        scaled_grad[within] / expected.abs().max(), expected[within] / expected.abs().max(), rtol=0, atol=2 * tight
    )


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-44, 1e30])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("how", HERE)
def test_zero_rows_have_cosine_0_and_no_gradient_and_subnormal_ones_a_direction(how: str, name: str, scale: float):
    q, k = (x.float() * scale for x in PIXELS)
    q[:, ::5] = 0
    q[:, 1] = 0
    q[:, 1, 3] = 1e-45  # the smallest number: a direction, whose gradient may be infinite
    unit = (PIXELS[0].float() if scale != 1e-44 else q / 1e-44).clone()
    unit[:, ::5] = 0
    unit[:, 1] = 0
    unit[:, 1, 3] = 1
    with implementation(how):
        loss, grad = row_gradients(name, q, k)
        expected, _ = row_gradients(name, unit, k / scale if scale != 1e-44 else k.double().div(1e-44).float())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert not grad[:, ::5].any()
    assert not grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", HERE)
def test_attention_of_large_scores(how: str, dtype: torch.dtype):
    """The softmax is 1 for one key then. Gradients recompute it from its logarithm, which rounds the more digits off
    the larger the scores are."""
    op = OPS["shifted_window_attention"]
    for scale in (1e1, 1e2, 1e4, 1e10, 1e17):
        (x,) = ((x * scale).to(dtype) for x in op.inputs)
        with use_reference():
            truth, true_backward = run(op, [x.double()])
            plain, plain_backward = run(op, [x])
        with implementation(how):
            result, backward = run(op, [x])
        incoming = randn(*result.shape, seed=4).to(dtype)
        floor = 4 * torch.finfo(dtype).eps
        # Scores are as large as the scale's square, and so is their rounding; beyond 1e2 one of them has it all.
        blurred = 1 + scale if scale <= 1e2 else 1
        assert_twice_as_good(result, plain, truth, floor, blurred * float(truth.abs().max()))
        (grad,), (plain_grad,), (true_grad,) = (b(incoming) for b in (backward, plain_backward, true_backward))
        if scale <= 1e2:  # a key's share is wrong by eps; times a value and a key that is in a query's gradient
            assert_twice_as_good(grad, plain_grad, true_grad, floor, (1 + scale**2) * float(true_grad.abs().max()))


@pytest.mark.parametrize("eps", [1e-5, 1e-20, 1e-35])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("how", HERE)
def test_instance_norm_of_small_and_large_deviations(how: str, last: bool, eps: float):
    layout = torch.channels_last_3d if last else torch.contiguous_format
    for scale in (1e-30, 1e-25, 1e-18, 1e-15, 1e-3, 1.0, 1e15, 1e19, 1e25, 1e35):
        x = ((randn(2, 3, 9, 8, 7) + 0.5) * scale).float().contiguous(memory_format=layout)
        with use_reference():
            truth = instance_norm_act(x.double(), eps=eps)
        with implementation(how):
            y = instance_norm_act(x, eps=eps)
        size = float(truth.abs().max())
        assert float((y - truth).abs().max()) <= 2e-6 * size, f"scale {scale:g}"


@pytest.mark.parametrize("how", HERE)
def test_instance_norm_of_what_has_no_deviation_or_no_number(how: str):
    x = randn(1, 5, 9, 8, 7).float()
    x[:, 0] = 3e30
    x[:, 1, 0, 0, 0] = torch.nan
    x[:, 2, 0, 0, 0] = torch.inf
    x[:, 3] = 0
    with implementation(how):
        y = instance_norm_act(x)
        plain = instance_norm_act(x[:, 4:])
    assert not y[:, 3].any()
    assert y[:, 0].abs().max() < 1e-6
    assert y[0, 1:3].flatten(1).isnan().any(dim=1).all()
    assert torch.equal(y[:, 4:], plain)
