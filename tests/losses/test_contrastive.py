# SPDX-License-Identifier: Apache-2.0
"""The drop-in for MONAI's ContrastiveLoss: its values, its errors, and where it stays finite."""

import contextlib
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import ContrastiveLoss as MonaiContrastiveLoss
from torch import Tensor, nn

import medaccel
from medaccel.losses import ContrastiveLoss

PAIR = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
# The values that MONAI's own tests publish.
PUBLISHED = [
    (PAIR, PAIR, 1.0986),
    ([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]], 0.8719),
]


@pytest.mark.parametrize(("input", "target", "value"), PUBLISHED)
def test_monais_published_values(input: list, target: list, value: float):
    loss = ContrastiveLoss(temperature=0.5)(torch.tensor(input), torch.tensor(target))
    assert float(loss) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (16, 128), (65, 30)])
def test_values_and_gradients_are_monais(shape: tuple[int, int], temperature: float):
    a, b = torch.randn(2, *shape)
    results = []
    for kind in (ContrastiveLoss, MonaiContrastiveLoss):
        wanted = (a.clone().requires_grad_(), b.clone().requires_grad_())
        loss = kind(temperature=temperature)(*wanted)
        results.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 0.01), (torch.float16, 0.05)], ids=str)
def test_it_is_finite_where_monais_is_not(dtype: torch.dtype, temperature: float):
    x = torch.randn(8, 16).to(dtype)
    assert not MonaiContrastiveLoss(temperature=temperature)(x, x).isfinite()
    ours = ContrastiveLoss(temperature=temperature)(x, x)
    assert ours.dtype == torch.float32
    exact = MonaiContrastiveLoss(temperature=temperature)(x.double(), x.double())
    assert float(ours) == pytest.approx(float(exact), rel=1e-3, abs=1e-5)


def test_errors_are_monais():
    for arguments in ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), (torch.zeros(2, 3), torch.zeros(3, 3))):
        with pytest.raises(ValueError) as theirs:
            MonaiContrastiveLoss()(*arguments)
        with pytest.raises(ValueError) as ours:
            ContrastiveLoss()(*arguments)
        assert str(ours.value) == str(theirs.value)


def test_accelerate_maps_monais_loss_and_revert_gives_it_back():
    model = torch.nn.ModuleDict({"loss": MonaiContrastiveLoss(temperature=0.2)})
    x, y = torch.randn(2, 6, 5)
    before = model["loss"](x, y)
    report = medaccel.accelerate(model, strict=True)
    assert report.changed == [("loss", "medaccel.losses.contrastive.ContrastiveLoss")]
    assert type(model["loss"]) is ContrastiveLoss
    torch.testing.assert_close(model["loss"](x, y), before, rtol=1e-6, atol=1e-6)
    medaccel.revert(model)
    assert type(model["loss"]) is MonaiContrastiveLoss


@pytest.mark.parametrize("temperature", [-1.0, 0.0, float("nan"), float("inf")])
def test_accelerate_keeps_a_loss_without_a_sensible_temperature(temperature: float):
    report = medaccel.accelerate(MonaiContrastiveLoss(temperature=temperature))
    assert report.kept == [("(model)", f"its temperature is {temperature}; expected a finite number above 0")]


# --- half precision --------------------------------------------------------------------------------------------
def autocast(dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_is_monais(dtype: torch.dtype, cast: torch.dtype | None):
    a, b = torch.randn(2, 8, 16).to(dtype)
    with autocast(cast):
        loss = ContrastiveLoss()(a, b)
        try:
            theirs = MonaiContrastiveLoss()(a, b)
        except RuntimeError:  # MONAI joins two tensors, which autocast to the other half precision refuses
            assert {dtype, cast} == {torch.bfloat16, torch.float16}
            return
    assert loss.dtype == theirs.dtype
    assert float(loss) == pytest.approx(float(theirs), rel=0.02)


def test_two_dtypes_are_joined_as_monais():
    x = torch.randn(8, 16, dtype=torch.float64)
    for a, b in itertools.product((torch.float64, torch.float32, torch.float16), repeat=2):
        loss, theirs = (kind()(x.to(a), x.flip(0).to(b)) for kind in (ContrastiveLoss, MonaiContrastiveLoss))
        assert loss.dtype == theirs.dtype
        assert float(loss) == pytest.approx(float(theirs), rel=1e-3)


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_under_gradscalers_first_scale(dtype: torch.dtype, cast: torch.dtype | None):
    """65536 is infinite in fp16: no incoming gradient may be rounded to it."""
    scale = 65536.0
    exact = [x.to(dtype).double().requires_grad_() for x in torch.randn(2, 16, 32).double()]
    true = torch.autograd.grad(MonaiContrastiveLoss()(*exact), exact)
    a, b = (x.detach().to(dtype).requires_grad_() for x in exact)
    with autocast(cast):
        loss = ContrastiveLoss()(a, b)
    for grad, expected in zip(torch.autograd.grad(loss * scale, (a, b)), true, strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(
            grad.double() / scale, expected, rtol=torch.finfo(dtype).eps, atol=1e-6 * float(expected.abs().max())
        )


# --- a temperature that is learnt ------------------------------------------------------------------------------
def gradients(loss: Any, a: Tensor, b: Tensor) -> list[Tensor]:
    wanted = (a.clone().requires_grad_(), b.clone().requires_grad_(), loss.temperature)
    value = loss(*wanted[:2])
    return [value.detach(), *torch.autograd.grad(value, wanted)]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_temperature_that_is_learnt_gets_its_gradient(shape: tuple[int, ...]):
    """The temperature may have become learnt in the constructor, before accelerate or after it."""

    def parameter(**options: bool) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, 0.4), **options)

    a, b = torch.randn(2, 6, 5)
    theirs = MonaiContrastiveLoss(parameter())
    expected = gradients(theirs, a, b)
    assert medaccel.accelerate(theirs).changed
    late = MonaiContrastiveLoss()
    assert medaccel.accelerate(late)
    late.temperature = parameter()
    frozen = MonaiContrastiveLoss(parameter(requires_grad=False))
    assert medaccel.accelerate(frozen)
    frozen.temperature.requires_grad_(True)
    for loss in (theirs, late, frozen, ContrastiveLoss(parameter())):
        assert isinstance(loss, ContrastiveLoss)
        assert [name for name, _ in loss.named_parameters()] == ["temperature"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for mine, plain in zip(gradients(loss, a, b), expected, strict=True):
                torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                torch.testing.assert_close(loss(a, b), expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_learnt_temperature_in_half_precision(cast: torch.dtype | None):
    a, b = torch.randn(2, 6, 5)
    expected = gradients(MonaiContrastiveLoss(nn.Parameter(torch.tensor(0.4))), a, b)
    with autocast(cast):
        got = gradients(ContrastiveLoss(nn.Parameter(torch.tensor(0.4))), a, b)
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


def test_a_learnt_temperature_that_fell_below_0_is_monais():
    a, b = torch.randn(2, 6, 5)
    loss = ContrastiveLoss(nn.Parameter(torch.tensor(-0.4)))
    with pytest.warns(UserWarning, match="runs MONAI's own code, because its temperature is -0.4"):
        got = gradients(loss, a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        gradients(loss, a, b)
    expected = gradients(MonaiContrastiveLoss(nn.Parameter(torch.tensor(-0.4))), a, b)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def test_a_temperature_under_a_transform_gets_its_derivative():
    a, b = torch.randn(2, 6, 5)

    def monais(temperature: Tensor) -> Tensor:
        return MonaiContrastiveLoss(temperature)(a, b)

    def ours(temperature: Tensor) -> Tensor:
        return ContrastiveLoss(temperature)(a, b)

    at = torch.tensor(0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.func.grad(ours)(at), torch.func.grad(monais)(at))
        assert torch.equal(torch.func.jvp(ours, (at,), (at,))[1], torch.func.jvp(monais, (at,), (at,))[1])
        several = torch.tensor([0.3, 0.4])
        assert torch.equal(torch.vmap(ours)(several), torch.vmap(monais)(several))


@pytest.mark.parametrize(
    "temperature",
    [0.4, np.float32(0.4), np.float64(0.4), torch.tensor(0.4), torch.tensor([0.4]), nn.Parameter(torch.tensor(0.4))],
    ids=lambda t: type(t).__name__,
)
def test_temperatures_of_all_kinds(temperature: Any):
    if isinstance(temperature, nn.Parameter):
        temperature = nn.Parameter(temperature.detach(), requires_grad=False)
    a, b = torch.randn(2, 6, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            ContrastiveLoss(temperature)(a, b), MonaiContrastiveLoss(0.4)(a, b), rtol=1e-6, atol=1e-6
        )
        compiled = torch.compile(ContrastiveLoss(temperature), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(a, b), MonaiContrastiveLoss(0.4)(a, b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [-0.5, float("inf"), torch.full((12,), 0.5)], ids=str)
def test_what_the_kernel_does_not_take_is_monais(temperature: Any):
    a, b = torch.randn(2, 6, 5)
    loss = MonaiContrastiveLoss()
    medaccel.accelerate(loss)
    loss.temperature = temperature
    with pytest.warns(UserWarning, match="runs MONAI's own code, because its temperature"):
        value = loss(a, b)
    assert torch.equal(value.nan_to_num(), MonaiContrastiveLoss(temperature)(a, b).nan_to_num())
