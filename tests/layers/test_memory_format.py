# SPDX-License-Identifier: Apache-2.0
"""Convolution blocks in either memory layout: the rule, the switch, the same numbers, the copies that it takes."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import SwinTransformer as MonaiSwinTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import medaccel
from medaccel.layers import SwinTransformer, UnetResBlock, _memory_format
from medaccel.layers._memory_format import for_convolution, pays_on_cuda
from medaccel.ops.instance_norm import native
from tests.layers.test_unet_blocks import PAIRS, outcome, pair

HALF, LAST = (torch.bfloat16, torch.float16), torch.channels_last_3d


@pytest.mark.parametrize(
    ("dtypes", "channels", "voxels", "pays"),
    [
        (HALF, (48, 48), 48**3, True),
        (HALF, (1, 24), 96**3, True),
        (HALF, (4, 24), 96**3, True),
        (HALF, (12, 24), 96**3, False),
        (HALF, (24, 14), 96**3, False),
        (HALF, (768, 768), 3**3, False),
        ((torch.float32, torch.float64), (48, 48), 48**3, False),
    ],
)
def test_a_gpus_half_precision_is_channels_last_where_channels_fill_vectors(
    dtypes: tuple[torch.dtype, ...], channels: tuple[int, int], voxels: int, pays: bool
):
    for dtype in dtypes:
        assert pays_on_cuda(dtype, *channels, voxels) == pays


def test_the_device_the_dtype_and_the_setting_decide(monkeypatch: pytest.MonkeyPatch):
    made = object()  # fake CUDA tensors can't be copied by a torch without CUDA
    monkeypatch.setattr(_memory_format, "channels_last", lambda x: made)
    volume, half = (1, 48, 16, 16, 16), torch.bfloat16
    with FakeTensorMode():
        for shape, dtype, device, setting, last in (
            (volume, half, "cuda", "auto", True),
            (volume, half, "cuda", False, False),
            (volume, torch.float32, "cuda", "auto", False),
            (volume, torch.float32, "cuda", True, True),
            ((1, 48, 16, 16), half, "cuda", "auto", False),  # 256 voxels
            ((1, 48, 32, 16), half, "cuda", "auto", True),
            ((1, 48, 16), half, "cuda", True, False),  # one axis: there is no such layout
            (volume, half, "cpu", "auto", False),
            ((1, 48, 32, 32, 32), torch.float32, "cpu", "auto", True),
        ):
            y = for_convolution(torch.empty(shape, dtype=dtype, device=device), 48, setting)
            assert (y is made) == last, (shape, dtype, device, setting)


def test_a_map_is_copied_once():
    x = torch.randn(1, 3, 4, 5, 6)
    y = for_convolution(x, 8, True)
    assert y.is_contiguous(memory_format=LAST)
    assert torch.equal(y, x)
    assert for_convolution(y, 8, True) is y


@pytest.mark.parametrize("rank", [2, 3])
def test_one_channel_becomes_channels_last_without_a_copy(rank: int):
    x = torch.randn(2, 1, *(4, 5, 6)[:rank], requires_grad=True)
    y = for_convolution(x, 8, True)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, x)
    assert y.stride() == (x.stride(0), 1, *x.stride()[2:])
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, 2 * x)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("channels", [(1, 8), (8, 8), (3, 4)])
def test_numbers_and_gradients_do_not_depend_on_the_layout(kind: str, rank: int, channels: tuple[int, int]):
    monais, ours = pair(kind, rank, channels)
    x = torch.randn(2, channels[0], *(9, 6, 7)[:rank], dtype=torch.float64)
    truth = outcome(monais, x)
    for setting in (True, False, "auto"):
        medaccel.accelerate(ours, channels_last=setting)
        for a, b in zip(outcome(ours, x), truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, float(b.abs().max())))
        for (name, a), (_, b) in zip(ours.state_dict().items(), monais.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
            assert a.stride() == b.stride(), name


def test_the_switch_stays_with_the_layers_until_it_is_thrown_again_or_reverted():
    _, ours = pair("residual")
    assert ours.channels_last == "auto"
    for choice, expected in ((True, True), (None, True), (False, False), ("auto", "auto")):
        medaccel.accelerate(ours, channels_last=choice)
        assert ours.channels_last == expected
        assert copy.deepcopy(ours).channels_last == expected
        assert pickle.loads(pickle.dumps(ours)).channels_last == expected
    medaccel.accelerate(ours, channels_last=True)
    medaccel.revert(ours)
    assert "channels_last" not in ours.__dict__
    assert medaccel.accelerate(ours)
    assert ours.channels_last == "auto"


@pytest.mark.parametrize(("value", "error"), [("last", ValueError), (1, TypeError), (torch.channels_last, TypeError)])
def test_a_setting_that_makes_no_sense_is_refused_and_nothing_is_changed(value: Any, error: type[Exception]):
    block = PAIRS["residual"][0](3, 2, 4, kernel_size=3, stride=1, norm_name="instance")
    with pytest.raises(error, match=r"accelerate: channels_last is .*; expected 'auto', True or False"):
        medaccel.accelerate(block, channels_last=value)
    assert type(block) is PAIRS["residual"][0]


# --- copies ------------------------------------------------------------------------------------------------------
class _Copies(TorchDispatchMode):
    """Counts the tensors that are copied into other strides."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.found, self.paused = least, [], False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("clone", "_to_copy", "copy_") and not self.paused:
            source = args[1] if name == "copy_" else args[0]
            if result.numel() >= self.least and result.stride() != source.stride():
                self.found.append((name, tuple(source.shape)))
        return result


@contextmanager
def counted(least: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Yields the list of copies of maps; convolutions give their result the layout of their input, as cuDNN does."""
    copies = _Copies(least)
    dense = native._dense

    def counted_dense(tensor: Tensor, last: bool) -> Tensor:
        result = dense(tensor, last)
        if result.data_ptr() != tensor.data_ptr() and result.numel() >= least:
            copies.found.append(("dense", tuple(tensor.shape)))
        return result

    def as_cudnn(forward: Any) -> Any:
        def call(module: nn.Module, x: Tensor, *args: Any) -> Tensor:
            copies.paused = True
            last = x.stride(1) == 1 and x.dim() == 5
            y = forward(module, x, *args)
            y = y.contiguous(memory_format=LAST) if last else y.contiguous()
            copies.paused = False
            return y

        return call

    monkeypatch.setattr(native, "_dense", counted_dense)
    for kind in (nn.Conv3d, nn.ConvTranspose3d):
        monkeypatch.setattr(kind, "forward", as_cudnn(kind.forward))
    with copies:
        yield copies.found


def swin_unetr() -> nn.Module:
    torch.manual_seed(0)
    return SwinUNETR(in_channels=1, out_channels=2, feature_size=24, depths=(1, 1, 1, 1)).eval()


@pytest.mark.slow
@torch.no_grad()
def test_a_swin_unetr_runs_channels_last_without_copying_a_map(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(1, 1, 64, 64, 64)
    nets = {"MONAI": swin_unetr(), True: swin_unetr(), False: swin_unetr()}
    found, outputs = {}, {}
    for setting, net in nets.items():
        if setting != "MONAI":
            medaccel.accelerate(net, channels_last=setting)
        with counted(24 * 8, monkeypatch) as copies:
            outputs[setting] = net(x)
        found[setting] = list(copies)
        monkeypatch.undo()
    assert found[True] == []
    assert len(found["MONAI"]) > len(found[False]) > 0
    for setting in (True, False):
        torch.testing.assert_close(outputs[setting], outputs["MONAI"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_v2", [False, True])
def test_the_stages_of_a_swin_transformer_give_monais_bits(use_v2: bool):
    torch.manual_seed(0)
    monais = MonaiSwinTransformer(
        in_chans=2, embed_dim=12, window_size=(2, 2, 2), patch_size=(2, 2, 2), depths=(2, 1, 1, 1),
        num_heads=(1, 2, 3, 4), spatial_dims=3, use_v2=use_v2,
    ).double()  # fmt: skip
    ours = copy.deepcopy(monais)
    assert medaccel.accelerate(ours)
    assert type(ours) is SwinTransformer
    x = torch.randn(1, 2, 64, 32, 32, dtype=torch.float64)
    for normalize in (True, False):
        for a, b in zip(ours(x, normalize), monais(x, normalize), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
            assert a.stride() == b.stride()


def test_the_block_is_compiled_as_one_graph_in_either_layout():
    block = UnetResBlock(3, 8, 8, 3, 1, "instance")
    x = torch.randn(1, 8, 6, 6, 6)
    for setting in (True, False):
        block.channels_last = setting
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x))
