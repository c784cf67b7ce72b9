# SPDX-License-Identifier: Apache-2.0
"""The drop-in for MONAI's ContrastiveLoss: its values, its errors, and where it stays finite."""

import pytest
import torch
from monai.losses import ContrastiveLoss as MonaiContrastiveLoss

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
    assert ours.dtype == dtype
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


def test_accelerate_keeps_a_loss_without_a_sensible_temperature():
    report = medaccel.accelerate(MonaiContrastiveLoss(temperature=-1.0))
    assert report.kept == [("(model)", "its temperature is -1.0; expected a number above 0")]
