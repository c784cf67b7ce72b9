# SPDX-License-Identifier: Apache-2.0
"""Accelerated models under TorchScript, torch.export and ONNX give the outputs of eager mode, or a sentence."""

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.losses import ContrastiveLoss
from monai.networks.blocks import UnetBasicBlock, UnetResBlock
from monai.networks.layers import GaussianFilter
from monai.networks.nets import BasicUNet, SwinUNETR
from monai.networks.nets.swin_unetr import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

import medaccel
from medaccel.losses import PixelConsistencyLoss, PixelContrastiveLoss

Arguments = tuple[Tensor, ...]


def block(kind: type[nn.Module], channels: int = 2, norm: object = "instance") -> nn.Module:
    return kind(3, channels, 12, kernel_size=3, stride=1, norm_name=norm)  # type: ignore[call-arg]


class Attention(nn.Module):
    """A WindowAttention whose mask is optional: torch.jit.trace takes no None."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = WindowAttention(8, 2, (2, 2, 2), qkv_bias=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, mask)


class OwnMask(nn.Module):
    """A shifted block that is given no mask, and makes its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = SwinTransformerBlock(8, 2, (2, 2, 2), (1, 1, 1), drop_path=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, None)


def pixels() -> Arguments:
    affine = torch.diag(torch.tensor([8.0, 8.0, 8.0, 1.0])).expand(2, 4, 4).contiguous()
    return torch.rand(2, 6, 3, 3, 3), torch.rand(2, 6, 3, 3, 3), affine, affine + 0.5


MODELS: dict[str, Callable[[], tuple[nn.Module, Arguments]]] = {
    "gaussian": lambda: (GaussianFilter(3, 1.5), (torch.rand(1, 2, 9, 10, 11),)),
    "gaussian 2-D, sigma per axis": lambda: (GaussianFilter(2, (0.7, 2.0)), (torch.rand(1, 1, 9, 12),)),
    "gaussian, learnt": lambda: (GaussianFilter(3, 1.5, requires_grad=True), (torch.rand(1, 1, 9, 9, 9),)),
    "gaussian, scalespace": lambda: (GaussianFilter(1, 11.0, approx="scalespace"), (torch.rand(1, 1, 40),)),
    "residual block": lambda: (block(UnetResBlock), (torch.rand(1, 2, 8, 8, 8),)),
    "residual block, affine": lambda: (
        block(UnetResBlock, norm=("instance", {"affine": True})),
        (torch.rand(2, 2, 8, 8, 8),),
    ),
    # Large enough to be brought to channels last.
    "residual block, channels last": lambda: (block(UnetResBlock, 12), (torch.rand(1, 12, 48, 48, 4),)),
    "basic block": lambda: (block(UnetBasicBlock), (torch.rand(1, 2, 8, 8, 8),)),
    "window attention": lambda: (Attention(), (torch.rand(4, 8, 8),)),
    "window attention, masked": lambda: (Attention(), (torch.rand(4, 8, 8), -100.0 * torch.eye(8)[None])),
    "swin block without a mask": lambda: (OwnMask(), (torch.rand(1, 4, 5, 6, 8),)),
    "contrastive loss": lambda: (ContrastiveLoss(0.5), (torch.rand(4, 8), torch.rand(4, 8))),
    "pixel contrast": lambda: (PixelContrastiveLoss(), pixels()),
    "pixel consistency": lambda: (PixelConsistencyLoss(), pixels()),
    "swin unetr": lambda: (
        SwinUNETR(1, 2, feature_size=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8)),
        (torch.rand(1, 1, 64, 32, 32),),
    ),
    "swin unetr v2": lambda: (
        SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), use_v2=True),
        (torch.rand(1, 1, 64, 32, 32),),
    ),
    # A network of MONAI's that holds nothing to accelerate around what does.
    "nested": lambda: (
        nn.Sequential(GaussianFilter(3, 1.0), BasicUNet(3, 1, 2, features=(4, 4, 4, 4, 4, 4))),
        (torch.rand(1, 1, 32, 32, 32),),
    ),
}


@pytest.fixture(params=MODELS)
def accelerated(request: pytest.FixtureRequest) -> tuple[nn.Module, Arguments]:
    torch.manual_seed(0)
    model, arguments = MODELS[request.param]()
    medaccel.accelerate(model)
    return model.eval(), arguments


def traced(model: nn.Module, arguments: Arguments) -> Tensor:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, arguments), file)
    file.seek(0)
    return torch.jit.load(file)(*arguments)


def exported(model: nn.Module, arguments: Arguments) -> Tensor:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, arguments), file)
    file.seek(0)
    return torch.export.load(file).module()(*arguments)


def check(model: nn.Module, arguments: Arguments, record: Callable[[nn.Module, Arguments], Tensor]) -> None:
    expected = model(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's comparisons of sizes, and torch's deprecation of TorchScript
        torch.testing.assert_close(record(model, arguments), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("record", [traced, exported])
def test_recorded_model_gives_what_eager_gives(
    accelerated: tuple[nn.Module, Arguments], record: Callable[[nn.Module, Arguments], Tensor]
):
    check(*accelerated, record)


@pytest.mark.parametrize("record", [traced, exported])
@pytest.mark.parametrize("name", ["gaussian, learnt", "residual block", "window attention, masked"])
def test_recorded_model_in_training_gives_what_eager_gives(
    name: str, record: Callable[[nn.Module, Arguments], Tensor]
):
    model, arguments = MODELS[name]()
    medaccel.accelerate(model)
    check(model.train(), arguments, record)


# By what torch.onnx.export calls them.
@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "swin unetr v2"])
def test_onnx_gives_what_eager_gives(name: str, dynamo: bool, tmp_path: Path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    model, arguments = MODELS[name]()
    medaccel.accelerate(model)
    expected = model.eval()(*arguments)
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, arguments, path, dynamo=dynamo, opset_version=18)
    session = runtime.InferenceSession(path)
    feeds = {wanted.name: given.numpy() for wanted, given in zip(session.get_inputs(), arguments, strict=True)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feeds)[0]), expected, rtol=1e-4, atol=1e-5)


LAYERS = [
    "gaussian",
    "residual block",
    "residual block, channels last",
    "basic block",
    "window attention",
    "swin unetr",
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.slow
def test_a_traced_network_runs_where_medaccel_is_not(name: str, tmp_path: Path):
    model, arguments = MODELS[name]()
    assert medaccel.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = torch.jit.trace(model.eval(), arguments)
    assert "medaccel::" not in str(trace.inlined_graph)
    if name == "gaussian":
        trace.save(tmp_path / "trace.pt")
        code = "import sys, torch; torch.jit.load(sys.argv[1])(torch.rand(1, 2, 9, 9, 9))"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "trace.pt")], check=True, timeout=120)


def test_an_exported_model_takes_gradients():
    model, arguments = MODELS["residual block"]()
    medaccel.accelerate(model)
    program = torch.export.export(model, arguments).module()
    program(*arguments).square().sum().backward()
    found = [p.grad for p in program.parameters()]
    assert found
    assert all(g is not None for g in found)
    model(*arguments).square().sum().backward()
    for ours, theirs in zip(found, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_strict_export_keeps_the_kernels():
    model, arguments = MODELS["residual block"]()
    medaccel.accelerate(model)
    program = torch.export.export(model, arguments, strict=True)
    assert "medaccel.instance_norm_act" in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), model(*arguments))


def test_scripting_is_refused_in_a_sentence_and_leaves_the_model_as_it_was(accelerated: tuple[nn.Module, Arguments]):
    model, _ = accelerated
    before = [type(m) for m in model.modules()]
    with pytest.raises(
        RuntimeError, match=r"torch\.jit\.script can't compile medaccel's \w+; .*use torch\.jit\.trace"
    ):
        torch.jit.script(model)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("kind", [UnetResBlock, UnetBasicBlock])
def test_scripting_works_after_revert(kind: type[nn.Module]):
    model, x = block(kind), torch.rand(1, 2, 8, 8, 8)
    medaccel.accelerate(model)
    with pytest.raises(RuntimeError, match=r"call medaccel\.revert\(model\) first"):
        torch.jit.script(model)
    medaccel.revert(model)
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_eager_calls_after_an_export_are_the_kernels_again():
    model, arguments = MODELS["residual block"]()
    medaccel.accelerate(model)
    for record in (traced, exported):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record(model, arguments)
        with torch.profiler.profile() as profile:
            model(*arguments)
        assert "medaccel::instance_norm_act" in {event.name for event in profile.events()}
