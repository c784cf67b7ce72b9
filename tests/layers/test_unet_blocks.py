# SPDX-License-Identifier: Apache-2.0
"""MONAI's convolution blocks with norm, residual and activation in one pass have the same weights and numbers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from monai.networks.blocks import dynunet_block as monai_blocks
from monai.networks.nets import DynUNet
from torch import Tensor, nn

import medaccel
from medaccel.layers import UnetBasicBlock, UnetResBlock

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
PAIRS = {
    "residual": (monai_blocks.UnetResBlock, UnetResBlock),
    "basic": (monai_blocks.UnetBasicBlock, UnetBasicBlock),
}


def pair(kind: str, rank: int = 3, channels: tuple[int, int] = (3, 4), **options: Any) -> tuple[Any, Any]:
    """Returns MONAI's block and the same one, accelerated, in fp64."""
    torch.manual_seed(0)
    options = {"kernel_size": 3, "stride": 1, "norm_name": ("instance", {"affine": True})} | options
    monais = PAIRS[kind][0](rank, *channels, **options).double()
    for name, parameter in monais.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    ours = copy.deepcopy(monais)
    assert medaccel.accelerate(ours)
    assert type(ours) is PAIRS[kind][1]
    return monais, ours


def outcome(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the output and the gradients to the input and every parameter."""
    x = x.detach().requires_grad_()
    y = block(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (3, {}),
        (3, {"channels": (4, 4)}),
        (3, {"stride": 2}),
        (3, {"norm_name": "instance"}),
        (3, {"act_name": "relu"}),
        (3, {"act_name": ("leakyrelu", {"negative_slope": -0.2})}),
        (2, {"kernel_size": (3, 1)}),
    ],
    ids=str,
)
def test_output_and_every_gradient_are_monais(kind: str, rank: int, options: dict[str, Any]):
    monais, ours = pair(kind, rank, **options)
    x = torch.randn(2, options.get("channels", (3, 4))[0], *(9, 6, 7)[:rank], dtype=torch.float64)
    truth = outcome(monais, x)
    for layout in (torch.contiguous_format, LAYOUTS[rank]):
        for a, b in zip(outcome(ours, x.to(memory_format=layout)), truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("kind", PAIRS)
def test_large_maps_are_worked_on_channels_last_and_gradients_are_given_back_contiguous(kind: str):
    monais, ours = (block.float() for block in pair(kind, channels=(24, 24)))
    x = torch.randn(1, 24, 32, 32, 32)
    assert ours.conv1(x.to(memory_format=torch.channels_last_3d)).stride(1) == 1  # what this test rests on
    before = nn.Parameter(torch.randn(24, 1, 1, 1))
    grads: list[Tensor] = []
    scaled = before * x
    scaled.register_hook(grads.append)
    y = ours(scaled)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    y.square().mean().backward()
    assert grads[0].is_contiguous()
    plain, same = outcome(monais, x), outcome(ours, x)
    # In norm: rounding flips the sign before the activation here and there, in both.
    for a, b, truth in zip(same, plain, outcome(monais.double(), x.double()), strict=True):
        assert float((a - truth).norm()) <= 2 * float((b - truth).norm()) + 1e-6 * float(truth.norm())


@pytest.mark.parametrize("kind", PAIRS)
def test_small_and_double_maps_keep_their_layout(kind: str):
    _, ours = pair(kind, channels=(24, 24))
    assert ours(torch.randn(1, 24, 32, 32, 32, dtype=torch.float64)).is_contiguous()
    assert ours.float()(torch.randn(1, 24, 8, 8, 8)).is_contiguous()


@pytest.mark.parametrize("kind", PAIRS)
def test_revert_gives_monais_bits_and_copies_and_pickles_stay_ours(kind: str):
    monais, ours = pair(kind)
    x = torch.randn(1, 3, 6, 6, 6, dtype=torch.float64)
    expected = ours(x)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is PAIRS[kind][1]
        assert torch.equal(copied(x), expected)
    medaccel.revert(ours)
    assert type(ours) is PAIRS[kind][0]
    assert torch.equal(ours(x), monais(x))


@pytest.mark.parametrize("kind", PAIRS)
def test_an_input_without_batch_is_monais(kind: str):
    monais, ours = pair(kind)
    x = torch.randn(3, 6, 6, 6, dtype=torch.float64)
    assert torch.equal(ours(x), monais(x))


@pytest.mark.parametrize("kind", PAIRS)
def test_under_autocast_the_dtype_is_monais(kind: str):
    monais, ours = (block.float() for block in pair(kind))
    x = torch.randn(1, 3, 6, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), monais(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_single_voxel_raises_torchs_error(kind: str):
    _, ours = pair(kind)
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        ours(torch.randn(1, 3, 1, 1, 1, dtype=torch.float64))


def hooked(block: Any) -> None:
    block.norm2.register_forward_hook(lambda *_: None)


def replaced(block: Any) -> None:
    block.lrelu.forward = torch.tanh


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({"norm_name": "batch"}, None, "its norm1 is a BatchNorm3d; expected an instance norm of torch's"),
        ({"norm_name": ("instance", {"track_running_stats": True})}, None, "its norm1 keeps running statistics"),
        ({"act_name": "gelu"}, None, "its lrelu is a GELU; expected torch's LeakyReLU or ReLU"),
        ({}, hooked, "its norm2 has hooks"),
        ({}, replaced, "its lrelu's forward has been replaced"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_stays_monais_with_the_reason(options: dict[str, Any], change: Any, words: str):
    block = monai_blocks.UnetResBlock(3, 2, 4, **{"kernel_size": 3, "stride": 1, "norm_name": "instance", **options})
    if change:
        change(block)
    report = medaccel.accelerate(block)
    assert not report
    assert words in str(report)
    assert type(block) is monai_blocks.UnetResBlock


def test_a_dynunet_is_accelerated_and_keeps_its_numbers():
    torch.manual_seed(0)
    net = DynUNet(
        3,
        1,
        2,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[4, 8, 8],
        res_block=True,
    ).double()
    x = torch.randn(2, 1, 16, 8, 8, dtype=torch.float64)
    expected = outcome(net, x)
    assert len(medaccel.accelerate(net).changed) >= 5
    for a, b in zip(outcome(net, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(1.0, float(b.abs().max())))


def test_bf16_weight_gradients_are_right_where_a_map_is_two_slices_deep():
    """torch 2.13's own are whatever lay in the memory, on a CPU with AVX-512 BF16."""
    torch.manual_seed(0)
    block = UnetResBlock(3, 48, 48, 3, 1, "instance")
    x, grad = torch.randn(1, 48, 2, 4, 4), torch.randn(1, 48, 2, 4, 4)
    expected = torch.autograd.grad(block(x), list(block.parameters()), grad)
    for _ in range(3):
        poison = [torch.full((48 * 48 * 27,), 1e30) for _ in range(4)]
        del poison
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
        found = torch.autograd.grad(y, list(block.parameters()), grad.to(y.dtype))
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).abs().max()) < 0.1 * float(b.abs().max())
