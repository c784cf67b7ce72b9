# SPDX-License-Identifier: Apache-2.0
"""Tests `accelerate`, `revert` and the drop-in layers: MONAI's numbers, parameters and state_dict."""

import copy
import io
import pickle
import subprocess
import sys

import lightning
import pytest
import torch
from monai.networks.layers import GaussianFilter as MonaiGaussianFilter
from torch import nn

import medaccel
from medaccel.layers import GaussianFilter


class Net(nn.Module):
    """Is a user's own network with MONAI layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.blur = MonaiGaussianFilter(3, (1.0, 2.0, 1.5), requires_grad=True)
        self.more = nn.ModuleList([MonaiGaussianFilter(3, 0.8)])

    def forward(self, x):
        return self.more[0](self.blur(self.conv(x)))


class OwnFilter(MonaiGaussianFilter):
    """A user's subclass: its forward may do anything."""


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(2, 1, 9, 10, 11, generator=torch.Generator().manual_seed(1))


def outcome(model: nn.Module) -> list[torch.Tensor]:
    y = model(X)
    return [y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])]


def test_output_and_every_parameters_gradient_stay_monais(net: Net):
    before = outcome(net)
    assert medaccel.accelerate(net)
    assert type(net.blur) is GaussianFilter
    for ours, monais in zip(outcome(net), before, strict=True):
        assert float((ours - monais).abs().max()) <= 2e-6 * float(monais.abs().max())


def test_revert_gives_monais_bits_again(net: Net):
    before = outcome(net)
    medaccel.accelerate(net)
    assert len(medaccel.revert(net).changed) == 2
    assert type(net.blur) is MonaiGaussianFilter
    for again, monais in zip(outcome(net), before, strict=True):
        assert torch.equal(again, monais)


def test_parameters_hooks_and_state_dict_are_the_same_objects(net: Net):
    calls = []
    net.blur.register_forward_hook(lambda *args: calls.append(1))
    parameters = dict(net.named_parameters())
    keys = list(net.state_dict())
    medaccel.accelerate(net)
    assert list(net.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    net(X)
    assert calls == [1]


def test_another_model_is_untouched_and_a_second_call_changes_nothing(net: Net):
    other = Net()
    medaccel.accelerate(net)
    assert type(other.blur) is MonaiGaussianFilter
    assert not medaccel.accelerate(net).changed


def test_report_names_what_changed_and_why_the_rest_is_kept():
    model = nn.Sequential(MonaiGaussianFilter(3, 1.0), OwnFilter(3, 1.0), MonaiGaussianFilter(3, 1.0, approx="box"))
    replaced = MonaiGaussianFilter(3, 1.0)
    replaced.forward = lambda x: x
    model.append(replaced)
    report = medaccel.accelerate(model)
    assert report.changed == [("0", "medaccel.layers.gaussian.GaussianFilter")]
    assert dict(report.kept) == {
        "1": "OwnFilter is a subclass of MONAI's GaussianFilter",
        "2": "its approx is 'box', which medaccel does not know",
        "3": "its forward has been replaced on the instance",
    }
    assert "OwnFilter is a subclass" in str(report)
    assert type(model[1]) is OwnFilter


def test_strict_raises_and_leaves_the_model_as_it_was():
    model = nn.Sequential(MonaiGaussianFilter(3, 1.0), OwnFilter(3, 1.0))
    with pytest.raises(RuntimeError, match="OwnFilter is a subclass"):
        medaccel.accelerate(model, strict=True)
    assert type(model[0]) is MonaiGaussianFilter


def test_a_model_that_is_the_layer_itself_is_named_so():
    layer = MonaiGaussianFilter(2, 1.0)
    assert medaccel.accelerate(layer).changed[0][0] == "(model)"
    assert type(layer) is GaussianFilter


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential])
def test_wrapped_models_are_served(net: Net, wrap):
    assert len(medaccel.accelerate(wrap(net)).changed) == 2


def test_lightning_modules_are_served(net: Net):
    class Module(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

    assert len(medaccel.accelerate(Module(net)).changed) == 2


def test_accelerated_models_pickle_deepcopy_and_load(net: Net):
    medaccel.accelerate(net)
    expected = net(X)
    assert torch.equal(copy.deepcopy(net)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(X), expected)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    plain = Net()
    plain.load_state_dict(torch.load(file, weights_only=True))
    medaccel.accelerate(plain)
    assert torch.equal(plain(X), expected)


def test_training_steps_follow_monais(net: Net):
    ours = copy.deepcopy(net)
    medaccel.accelerate(ours)
    losses = []
    for model in (net, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        record = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(X) - X).square().mean()
            loss.backward()
            optimizer.step()
            record.append(float(loss))
        losses.append(record)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_layer_takes_monais_constructor_and_state_dict(dims: int):
    ours, monais = GaussianFilter(dims, 1.3, approx="sampled"), MonaiGaussianFilter(dims, 1.3, approx="sampled")
    assert ours.state_dict().keys() == monais.state_dict().keys()
    monais.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, *(7, 8, 9)[:dims])
    torch.testing.assert_close(ours(x), monais(x), rtol=1e-6, atol=1e-6)
    assert isinstance(ours, MonaiGaussianFilter)


def test_wrong_number_of_axes_is_a_sentence():
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\); expected a scalar or \(2,\)"):
        GaussianFilter(3, 1.0)(torch.randn(1, 1, 5, 5))


@pytest.mark.parametrize("function", [medaccel.accelerate, medaccel.revert])
def test_something_else_than_a_module_is_refused(function):
    with pytest.raises(TypeError, match="model is a dict; expected a torch"):
        function({})


def test_import_is_light_and_finds_nothing_where_monai_is_not_loaded():
    code = """
import sys, torch, medaccel
assert not medaccel.accelerate(torch.nn.Linear(1, 1))
heavy = {"monai", "lightning", "scipy", "matplotlib", "nibabel", "pydicom"} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
