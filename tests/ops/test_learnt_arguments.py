# SPDX-License-Identifier: Apache-2.0
"""Arguments of the ops that may be learnt: their gradients, or a refusal."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from medaccel import ops, use_reference
from tests.ops.test_arguments import COEFFICIENTS, NUMBERS, OPS, call, outputs, rand, refused

# Those with a gradient; the others are refused where they require one.
WITH_GRADIENT = {"sigma", "temperature", "power", "scale"} | COEFFICIENTS


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(("op", "argument"), NUMBERS)
def test_a_learnt_number_gets_its_gradient_or_is_refused(op: str, argument: str, shape: tuple[int, ...], path: None):
    value = torch.full(shape, OPS[op][1][argument], dtype=torch.float64, requires_grad=True)
    if argument not in WITH_GRADIENT:
        refused(op, argument, value)
        with torch.no_grad():
            call(op, **{argument: value})
        return
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in OPS[op][0].items()}
    weights = [rand(*y.shape).double() for y in outputs(call(op, **tensors))]

    def total(v: Any) -> Tensor:
        pairs = zip(outputs(call(op, **tensors, **{argument: v})), weights, strict=True)
        return sum((y * w).sum() for y, w in pairs)  # type: ignore[return-value]

    (gradient,) = torch.autograd.grad(total(value), value)
    step = 1e-6
    numeric = (total(value.item() + step) - total(value.item() - step)) / (2 * step)
    assert gradient.shape == shape
    torch.testing.assert_close(gradient.sum(), numeric, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(total(value).detach(), total(value.item()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 30.0])
@pytest.mark.parametrize("op", ["nt_xent_loss", "info_nce_loss", "pixel_contrastive_loss"])
def test_a_learnt_temperature_has_the_references_numbers(op: str, temperature: float, dtype: torch.dtype):
    results = []
    for forced, precision in ((True, torch.float64), (False, dtype)):
        tensors = {n: t.to(dtype).to(precision).requires_grad_("coords" not in n) for n, t in OPS[op][0].items()}
        tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        with use_reference() if forced else contextlib.nullcontext():
            loss = call(op, **tensors, temperature=tau)
        wanted = [tau, *(t for t in tensors.values() if t.requires_grad)]
        results.append([loss, *torch.autograd.grad(loss, wanted)])
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for truth, mine in zip(*results, strict=True):
        scale = float(truth.abs().max())
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=tolerance * max(scale, 1e-3))


def test_sigmas_in_a_list_keep_their_gradients(path: None):
    sigmas = [torch.tensor(1.0, requires_grad=True), 0.5, torch.nn.Parameter(torch.tensor([2.0]))]
    call("gaussian_filter", sigma=sigmas).square().sum().backward()
    together = torch.tensor([1.0, 0.5, 2.0], requires_grad=True)
    call("gaussian_filter", sigma=together).square().sum().backward()
    assert together.grad is not None
    torch.testing.assert_close(sigmas[0].grad, together.grad[0])
    torch.testing.assert_close(sigmas[2].grad, together.grad[2:])


def test_a_learnt_temperature_compiles_as_one_graph():
    tau = torch.tensor(0.3, requires_grad=True)

    def loss(z1: Tensor, z2: Tensor, tau: Tensor) -> Tensor:
        return ops.nt_xent_loss(z1, z2, temperature=tau)

    tensors = OPS["nt_xent_loss"][0].values()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*tensors, tau)
    torch.testing.assert_close(*(torch.autograd.grad(y, tau)[0] for y in (compiled, loss(*tensors, tau))))
