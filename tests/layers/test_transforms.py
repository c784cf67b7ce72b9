# SPDX-License-Identifier: Apache-2.0
"""Accelerated layers have MONAI's own derivatives under torch.func, forward mode and vmap."""

import copy
from typing import Any

import pytest
import torch
from monai.losses import ContrastiveLoss as MonaiContrastiveLoss
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock
from monai.networks.layers import GaussianFilter
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import BasicLayer
from torch import Tensor, nn
from torch.autograd import forward_ad

import medaccel

# The blocks' maps are so large, with so many channels, that they are brought to channels last.
LAYERS: dict[str, tuple[Any, tuple[int, ...], torch.dtype]] = {
    "UnetResBlock": (lambda: UnetResBlock(3, 12, 16, 3, 1, "instance"), (1, 12, 14, 12, 130), torch.float32),
    "UnetBasicBlock": (lambda: UnetBasicBlock(3, 12, 12, 3, 1, "instance"), (2, 12, 3, 4, 5), torch.float32),
    "BasicLayer": (lambda: BasicLayer(12, 2, 3, (2, 2, 2), [0.0, 0.0]), (1, 12, 3, 4, 5), torch.float64),
    "GaussianFilter": (
        lambda: GaussianFilter(3, [1.0, 0.5, 2.0], requires_grad=True),
        (1, 2, 5, 6, 7),
        torch.float64,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_a_layer_are_those_of_monais(name: str):
    make, shape, dtype = LAYERS[name]
    torch.manual_seed(0)
    monais = make().to(dtype)
    ours = copy.deepcopy(monais)
    assert medaccel.accelerate(ours).changed
    x, d = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    if name == "GaussianFilter":
        tolerance = 1e-6  # MONAI makes its taps in float32

    def outcome(layer: nn.Module) -> tuple[Any, ...]:
        parameters = {k: p.detach() for k, p in layer.named_parameters()}

        def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(layer, parameters, (x,))

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return call(parameters, x).square().mean()

        derivative = torch.func.jvp(call, (parameters, x), (parameters, d))[1]
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, d))).tangent.detach().clone()
        gradient = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
        mapped = torch.vmap(layer)(torch.stack([x, d])).detach()
        per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.stack([x, d]))
        return derivative, dual, gradient, mapped, per_sample

    torch.testing.assert_close(outcome(ours), outcome(monais), rtol=tolerance, atol=tolerance)


def test_transforms_of_a_network():
    torch.manual_seed(0)
    monais = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), spatial_dims=2).eval()
    ours = copy.deepcopy(monais)
    assert medaccel.accelerate(ours).changed
    x, d = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 64, 64)
    close = {"rtol": 1e-3, "atol": 1e-4}
    with torch.no_grad():
        theirs = torch.func.jvp(monais, (x,), (d,))
        torch.testing.assert_close(torch.func.jvp(ours, (x,), (d,)), theirs, **close)
    parameters = {k: p.detach() for k, p in ours.named_parameters()}

    def loss(parameters: dict[str, Tensor], net: nn.Module) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().mean()

    gradients = [torch.func.grad(loss)(parameters, net) for net in (ours, monais)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-4)


def test_transforms_of_the_contrastive_loss():
    a, b, d = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
    ours, monais = medaccel.losses.ContrastiveLoss(0.5), MonaiContrastiveLoss(0.5)
    for f in (
        lambda loss: torch.func.jvp(loss, (a, b), (d, d)),
        lambda loss: torch.func.grad(loss, argnums=(0, 1))(a, b),
        lambda loss: torch.func.jvp(torch.func.grad(loss), (a, b), (d, d)),
    ):
        torch.testing.assert_close(f(ours), f(monais), rtol=1e-5, atol=1e-6)  # MONAI keeps τ in float32
