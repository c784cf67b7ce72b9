# SPDX-License-Identifier: Apache-2.0
"""Tests `accelerate`, `revert` and the drop-in layers: MONAI's numbers, parameters and state_dict."""

import copy
import io
import pickle
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import lightning
import pytest
import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock
from monai.networks.layers import GaussianFilter as MonaiGaussianFilter
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import WindowAttention
from torch import nn

import medaccel
from medaccel import _native
from medaccel._accelerate import _REGISTRY
from medaccel.layers import GaussianFilter
from medaccel.ops._registry import OPS, NoKernel


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


# --- what serves, by device --------------------------------------------------------------------------------------
def served(model: nn.Module) -> dict[tuple[str, str], str]:
    return {(name, device): what for name, device, what in medaccel.accelerate(model).kernels}


def test_the_report_says_of_every_layer_what_serves_it_on_each_device():
    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    report = medaccel.accelerate(model)
    assert {name for name, _, _ in report.kernels} == {name for name, _ in report.changed}
    assert len(report.kernels) == 2 * len(report.changed)
    for entry in _REGISTRY:
        assert entry.op is None or entry.op in OPS
    for name, device, what in report.kernels:
        kind = dict(report.changed)[name].rpartition(".")[2]
        entry = next(e for e in _REGISTRY if e.ours.endswith(f":{kind}"))
        if entry.op is None:
            assert "no kernel of its own" in what
        elif isinstance(kernel := OPS[entry.op].kernels[device], NoKernel):
            assert what == f"{entry.otherwise} ({entry.op}: {kernel.reason})"
        else:
            assert what == f"{entry.op}, {kernel}"
        assert f"on {device:<5} {what}" in str(report)
    assert sorted(medaccel.accelerate(model).kernels) == sorted(report.kernels)  # they are accelerated already


def test_a_device_without_an_ops_kernel_runs_monais_blocks_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch):
    row = OPS["instance_norm_act"]
    monkeypatch.setitem(OPS, row.name, replace(row, kernels={**row.kernels, "cuda": NoKernel("nobody wrote one")}))
    block = UnetBasicBlock(3, 2, 2, kernel_size=3, stride=1, norm_name="instance")
    assert served(nn.Sequential(block))["0", "cuda"] == "MONAI's own code (instance_norm_act: nobody wrote one)"


def test_an_attention_too_wide_for_a_gpus_kernel_is_told():
    wide, narrow = (WindowAttention(2 * d, 2, (2, 2, 2)) for d in (96, 64))
    answers = served(nn.ModuleList([wide, narrow]))
    assert answers["0", "cuda"].startswith("plain PyTorch (shifted_window_attention: ")
    assert "not 96" in answers["0", "cuda"]
    assert answers["1", "cuda"].startswith("shifted_window_attention, Triton")
    assert answers["0", "cpu"] == "shifted_window_attention, C++"


def test_a_machine_whose_kernels_are_missing_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_native, "cpu_problem", "_cpu_avx2 can't be loaded")
    monkeypatch.setattr(_native, "cuda", None)
    monkeypatch.setattr(_native, "cuda_problem", "no such file")
    answers = served(nn.Sequential(MonaiGaussianFilter(3, 1.0)))
    assert answers["0", "cpu"] == "plain PyTorch (gaussian_filter: _cpu_avx2 can't be loaded)"
    assert answers["0", "cuda"] == "plain PyTorch (gaussian_filter: the CUDA kernels are not built: no such file)"


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_a_gpu_that_is_here_is_asked(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(_native, "cuda", SimpleNamespace(architectures="80", running_architecture=lambda index: 80))
    monkeypatch.setattr(_native, "_probe_gpu", _native._probe_gpu.__wrapped__)
    monkeypatch.setattr(_native, "_probe_triton", _native._probe_triton.__wrapped__)
    answers = served(nn.ModuleList([MonaiGaussianFilter(3, 1.0), WindowAttention(8, 2, (2, 2, 2))]))
    old = capability == (7, 5)
    assert ("cuda:0 is sm_75" in answers["0", "cuda"]) == ("cuda:0 is sm_75" in answers["1", "cuda"]) == old
