# SPDX-License-Identifier: Apache-2.0
"""Swin UNETR on medaccel's layers has MONAI's weights, numbers and gradients, and the order of merging of 2022."""

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets.swin_unetr import PatchMerging, PatchMergingV2
from monai.networks.nets.swin_unetr import SwinTransformerBlock as MonaiSwinTransformerBlock
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from torch import Tensor, nn

import medaccel
from medaccel.layers import SwinTransformerBlock
from medaccel.nets import PatchMergingV090, SSLHead, SwinUNETR

SMALL = {"feature_size": 12, "depths": (2, 1, 1, 1)}
FLAT = {"feature_size": 12, "depths": (2, 1, 1, 1), "spatial_dims": 2}


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[SwinUNETR, MonaiSwinUNETR]:
    """Ours and MONAI's with the same weights, the attention's biases not zero."""
    torch.manual_seed(0)
    monais = MonaiSwinUNETR(1, 2, **options).to(dtype)
    for name, parameter in monais.named_parameters():
        if name.endswith(("qkv.bias", "table")):
            nn.init.normal_(parameter)
    ours = SwinUNETR(1, 2, **options).to(dtype)
    ours.load_state_dict(monais.state_dict())
    return ours, monais


def outcome(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the output and the gradient to every parameter."""
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), list(net.parameters()))]


def worst_error(ours: list[Tensor], monais: list[Tensor]) -> float:
    """Returns the largest error, each relative to its tensor's maximum.

    A gradient that is zero but for rounding (a bias before a norm) is measured against the largest gradient instead.
    """
    overall = max(float(b.abs().max()) for b in monais[1:])
    scales = [float(b.abs().max()) for b in monais]
    scales = [scale if scale > 1e-9 * overall else overall for scale in scales]
    return max(float((a - b).abs().max()) / scale for a, b, scale in zip(ours, monais, scales, strict=True))


# One token is left of 32³ on the last map, which an instance norm refuses, in MONAI too.
GROUPS = ("group", {"num_groups": 4})
CASES = [
    pytest.param((1, 64, 32, 32), SMALL, id="64x32x32"),
    pytest.param((2, 32, 32, 32), {**SMALL, "norm_name": GROUPS, "window_size": 4}, id="32x32x32, batch 2, window 4"),
    pytest.param((1, 64, 32, 32), {**SMALL, "use_v2": True, "depths": (1, 1, 1, 1)}, id="64x32x32, v2"),
    pytest.param((2, 64, 64), {**FLAT, "depths": (2, 2, 2, 2)}, id="2-D 64x64, batch 2"),
    pytest.param((1, 96, 64), {**FLAT, "use_v2": True}, id="2-D 96x64, v2"),
    pytest.param((1, 64, 64), {**FLAT, "qkv_bias": False, "patch_norm": True}, id="2-D, no qkv bias, patch norm"),
    pytest.param((1, 64, 64), {**FLAT, "downsample": "mergingv2", "window_size": 4}, id="2-D, mergingv2, window 4"),
]


@pytest.mark.parametrize(("shape", "options"), CASES)
@pytest.mark.slow
def test_output_and_every_parameters_gradient_are_monais(shape: tuple[int, ...], options: dict[str, Any]):
    ours, monais = pair(**options)
    x = torch.randn(shape[0], 1, *shape[1:], dtype=torch.float64)
    assert worst_error(outcome(ours, x), outcome(monais, x)) <= 1e-10


def test_every_block_and_stage_is_ours_and_revert_gives_monais_bits():
    ours, monais = pair(**FLAT)
    blocks = [module for module in ours.modules() if isinstance(module, MonaiSwinTransformerBlock)]
    assert len(blocks) == 5
    assert all(type(block) is SwinTransformerBlock for block in blocks)
    assert not medaccel.accelerate(ours)
    assert not any(isinstance(module, SwinTransformerBlock) for module in monais.modules())
    medaccel.revert(ours)
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    for a, b in zip(outcome(ours, x), outcome(monais, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("use_v2", "tensors"), [(False, 159), (True, 167)])
def test_state_dicts_go_both_ways(use_v2: bool, tensors: int):
    options = {"feature_size": 12, "window_size": 2, "use_v2": use_v2}
    torch.manual_seed(1)
    ours = SwinUNETR(1, 2, **options)
    torch.manual_seed(1)
    monais = MonaiSwinUNETR(1, 2, **options)
    assert len(ours.state_dict()) == tensors
    assert list(ours.state_dict()) == list(monais.state_dict())
    for a, b in zip(ours.state_dict().values(), monais.state_dict().values(), strict=True):
        assert torch.equal(a, b)  # the same seed gives the same start
    monais.load_state_dict(ours.state_dict())
    ours.load_state_dict(monais.state_dict())


def test_checkpointing_changes_no_number_with_dropout_and_drop_path():
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    rates = {"drop_rate": 0.1, "attn_drop_rate": 0.2, "dropout_path_rate": 0.1}
    outcomes = []
    for use_checkpoint in (False, True):
        ours, _ = pair(**FLAT, **rates, use_checkpoint=use_checkpoint)
        torch.manual_seed(3)
        outcomes.append(outcome(ours, x))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_dropout_is_random_in_training_and_monais_in_evaluation():
    ours, monais = pair(**FLAT, drop_rate=0.1, attn_drop_rate=0.2, dropout_path_rate=0.1)
    x = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    monais.eval()
    torch.testing.assert_close(ours(x), monais(x), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_fifty_training_steps_follow_monais_loss():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(50, 2, 1, 64, 64, generator=generator)
    target = torch.randint(0, 2, (50, 2, 64, 64), generator=generator)
    target[x[:, :, 0] > 0.5] = 1  # half of it can be learnt
    curves = []
    for net in pair(torch.float32, feature_size=12, depths=(2, 2, 1, 1), spatial_dims=2):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        losses = []
        for step in range(50):
            loss = nn.functional.cross_entropy(net(x[step]), target[step])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    ours, monais = curves
    assert monais[-5:].mean() < 0.8 * monais[0]
    torch.testing.assert_close(ours, monais, rtol=1e-3, atol=0)


def test_it_copies_pickles_and_casts():
    ours, _ = pair(**FLAT)
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    expected = ours(x)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(clone) is SwinUNETR
        assert torch.equal(clone(x), expected)
    torch.testing.assert_close(ours.float()(x.float()), expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_whole_net_compiles_as_one_graph():
    ours, _ = pair(torch.float32, feature_size=12, depths=(1, 1, 1, 1), spatial_dims=2)
    x = torch.randn(1, 1, 64, 64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = outcome(ours, x)
    assert worst_error(outcome(compiled, x), expected) <= 1e-3


# --- arguments ------------------------------------------------------------------------------------------------------


def test_the_signature_is_monais_and_img_size():
    ours = list(inspect.signature(SwinUNETR).parameters.values())
    monais = list(inspect.signature(MonaiSwinUNETR).parameters.values())
    assert ours[:-1] == monais
    assert ours[-1].name == "img_size"


def test_img_size_is_ignored_with_a_deprecation_warning():
    with pytest.warns(DeprecationWarning, match=r"img_size=\(64, 64\) is ignored"):
        net = SwinUNETR(img_size=(64, 64), in_channels=1, out_channels=2, **FLAT)
    assert net(torch.zeros(1, 1, 96, 64)).shape == (1, 2, 96, 64)


@pytest.mark.parametrize(
    "rest", [((1, 2), {}), ((), {"in_channels": 1, "out_channels": 2})], ids=["positional", "named"]
)
def test_img_size_as_first_argument_says_how_to_write_it(rest: tuple[tuple[int, ...], dict[str, int]]):
    with pytest.raises(TypeError, match=r"first argument is \(96, 96, 96\).*SwinUNETR\(in_channels="):
        SwinUNETR((96, 96, 96), *rest[0], **rest[1])


def test_numpys_integers_are_channels():
    assert SwinUNETR(np.int64(1), 2, **FLAT).out.conv.conv.out_channels == 2


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match="widow_size"):
        SwinUNETR(1, 2, widow_size=7)
    with pytest.raises(ValueError, match="merging_v090"):
        SwinUNETR(1, 2, downsample="merging_v09")
    with pytest.raises(ValueError, match="divisible by 12"):
        SwinUNETR(1, 2, feature_size=16)


def test_a_size_that_the_net_cannot_halve_is_refused():
    with pytest.raises(ValueError, match=r"spatial dimensions \[3\].*must be divisible by 2\*\*5"):
        SwinUNETR(1, 2, **FLAT)(torch.zeros(1, 1, 64, 65))


# --- merging --------------------------------------------------------------------------------------------------------


def merged_voxel_by_voxel(x: Tensor, merging: nn.Module, offsets: list[str]) -> Tensor:
    """Patch merging of (1, D, H, W, C), one cell after the other."""
    _, *sizes, c = x.shape
    cells = [(size + 1) // 2 for size in sizes]
    out = torch.empty(1, *cells, 2 * c, dtype=x.dtype)
    for i in range(cells[0]):
        for j in range(cells[1]):
            for k in range(cells[2]):
                features = []
                for offset in offsets:
                    at = [2 * cell + int(o) for cell, o in zip((i, j, k), offset, strict=True)]
                    inside = all(a < size for a, size in zip(at, sizes, strict=True))
                    features.append(x[0, at[0], at[1], at[2]] if inside else torch.zeros(c, dtype=x.dtype))
                out[0, i, j, k] = merging.reduction.weight @ merging.norm(torch.cat(features))
    return out


@pytest.mark.parametrize("sizes", [(4, 6, 2), (5, 3, 4)], ids=str)
def test_the_old_merging_takes_two_of_the_neighbours_twice(sizes: tuple[int, ...]):
    merging = PatchMergingV090(3).double()
    nn.init.normal_(merging.norm.weight)
    x = torch.randn(1, *sizes, 3, dtype=torch.float64)
    expected = merged_voxel_by_voxel(x, merging, ["000", "100", "010", "001", "101", "010", "001", "111"])
    torch.testing.assert_close(merging(x), expected, rtol=1e-12, atol=1e-12)
    todays = PatchMerging(3).double()
    todays.load_state_dict(merging.state_dict())
    assert not torch.allclose(todays(x), expected)


def test_the_old_merging_in_two_dimensions_is_todays():
    merging, todays = PatchMergingV090(3, spatial_dims=2), PatchMerging(3, spatial_dims=2)
    todays.load_state_dict(merging.state_dict())
    x = torch.randn(2, 5, 4, 3)
    assert torch.equal(merging(x), todays(x))
    with pytest.raises(ValueError, match=r"shape \(2, 5, 3\); expected \(B, D, H, W, C\)"):
        merging(torch.randn(2, 5, 3))


def test_downsample_merging_v090_builds_it_in_each_stage():
    net = SwinUNETR(1, 2, feature_size=12, window_size=2, downsample="merging_v090")
    mergings = [module for module in net.modules() if isinstance(module, PatchMergingV2)]
    assert [type(module) for module in mergings] == [PatchMergingV090] * 4
    MonaiSwinUNETR(1, 2, feature_size=12, window_size=2).load_state_dict(net.state_dict())
    head = SSLHead(feature_size=12, window_size=2, downsample="merging_v090")
    assert sum(type(module) is PatchMergingV090 for module in head.modules()) == 4


# --- the pretraining model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upsample", ["vae", "deconv", "large_kernel_deconv"])
def test_the_pretraining_model_gives_rotation_embedding_and_reconstruction(upsample: str):
    head = SSLHead(2, 12, upsample, spatial_dims=2)
    rotation, contrastive, reconstruction = head(torch.randn(3, 2, 64, 96))
    assert (rotation.shape, contrastive.shape) == ((3, 4), (3, 512))
    assert reconstruction.shape == (3, 2, 64, 96)
    (rotation.sum() + contrastive.sum() + reconstruction.sum()).backward()
    unused = [name for name, parameter in head.named_parameters() if parameter.grad is None]
    assert unused == []


def test_the_pretraining_models_heads_read_the_first_and_the_second_token():
    head = SSLHead(feature_size=12, window_size=2, depths=(1, 1, 1, 1)).eval()
    x = torch.randn(1, 1, 64, 32, 32)
    rotation, contrastive, reconstruction = head(x)
    last = head.swinViT(x)[4]  # (1, 192, 2, 1, 1)
    torch.testing.assert_close(rotation, head.rotation_head(last[:, :, 0, 0, 0]))
    torch.testing.assert_close(contrastive, head.contrastive_head(last[:, :, 1, 0, 0]))
    torch.testing.assert_close(reconstruction, head.conv(last))
    medaccel.revert(head)
    torch.testing.assert_close(head(x)[2], reconstruction, rtol=1e-3, atol=1e-4)


def test_the_pretraining_models_tensors_have_the_published_names():
    state = SSLHead(feature_size=48, window_size=2).state_dict()
    assert state["rotation_head.weight"].shape == (4, 768)
    assert state["contrastive_head.weight"].shape == (512, 768)
    shapes = {
        key: tuple(value.shape[:2]) for key, value in state.items() if key.startswith("conv") and "weight" in key
    }
    assert shapes == {
        "conv.0.weight": (384, 768),
        "conv.4.weight": (192, 384),
        "conv.8.weight": (96, 192),
        "conv.12.weight": (48, 96),
        "conv.16.weight": (48, 48),
        "conv.20.weight": (1, 48),
    }
    assert sum(key.startswith("swinViT.") for key in state) == 126


def published(upsample: str) -> list[nn.Module]:
    """Builds ssl_head.py's layers from 192 channels to 1."""
    if upsample == "large_kernel_deconv":
        return [nn.ConvTranspose3d(192, 1, 32, stride=32)]
    if upsample == "deconv":
        widths = ((192, 96), (96, 48), (48, 24), (24, 12), (12, 1))
        return [nn.ConvTranspose3d(before, after, 2, stride=2) for before, after in widths]
    layers: list[nn.Module] = []
    for before, after in ((192, 96), (96, 48), (48, 24), (24, 12), (12, 12)):
        layers += [nn.Conv3d(before, after, 3, padding=1), nn.InstanceNorm3d(after), nn.LeakyReLU()]
        layers.append(nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False))
    return [*layers, nn.Conv3d(12, 1, 1)]


@pytest.mark.parametrize("upsample", ["vae", "deconv", "large_kernel_deconv"])
def test_the_pretraining_models_reconstruction_is_the_published_one(upsample: str):
    conv = SSLHead(feature_size=12, window_size=2, upsample=upsample).conv
    theirs = nn.Sequential(*published(upsample)) if upsample != "large_kernel_deconv" else published(upsample)[0]
    theirs.load_state_dict(conv.state_dict())
    last = torch.randn(1, 192, 2, 1, 1)
    torch.testing.assert_close(conv(last), theirs(last), rtol=1e-5, atol=1e-6)


def test_the_pretraining_model_refuses_what_it_cannot_do():
    with pytest.raises(
        ValueError, match="upsample is 'bicubic'; expected one of 'vae', 'deconv', 'large_kernel_deconv'"
    ):
        SSLHead(upsample="bicubic")
    with pytest.raises(ValueError, match="spatial_dims is 4; expected 2 or 3"):
        SSLHead(spatial_dims=4)
    with pytest.raises(ValueError, match=r"depths=\(2, 2\).*four stages"):
        SSLHead(depths=(2, 2))
    with pytest.raises(ValueError, match=r"num_heads\[1\]=5 does not divide the stage's 24 channels"):
        SSLHead(feature_size=12, num_heads=(3, 5, 12, 24))
    head = SSLHead(feature_size=12, spatial_dims=2)
    for size in ((32, 32), (64, 48)):
        with pytest.raises(ValueError, match=r"expected multiples of 32, one of them at least 64"):
            head(torch.zeros(1, 1, *size))
