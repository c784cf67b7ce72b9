# SPDX-License-Identifier: Apache-2.0
"""A layer's settings, edited before or after `accelerate`, count as they do in MONAI's layer."""

import copy
from collections.abc import Callable

import pytest
import torch
from monai.networks.nets import swin_unetr as monai_swin
from torch import nn

import medaccel
from tests.layers.edits import (
    LAYERS,
    assert_same,
    exchange,
    outcome,
    randomised,
    running,
    setting,
    shadow,
    without_third_norm,
)

SETTINGS: list[tuple[str, str, Callable[[nn.Module], None]]] = [
    ("residual_block", "gelu", exchange("lrelu", nn.GELU)),
    ("residual_block", "prelu", exchange("lrelu", lambda: nn.PReLU(dtype=torch.float64))),
    ("residual_block", "relu", exchange("lrelu", nn.ReLU)),
    ("residual_block", "another slope", setting("lrelu", "negative_slope", 0.3)),
    ("residual_block", "a learnable slope", setting("lrelu", "negative_slope", torch.tensor(0.3))),
    ("residual_block", "batch norm 1", exchange("norm1", lambda: nn.BatchNorm3d(4).double())),
    ("residual_block", "batch norm 2", exchange("norm2", lambda: nn.BatchNorm3d(4).double())),
    ("residual_block", "batch norm 3", exchange("norm3", lambda: nn.BatchNorm3d(4).double())),
    ("residual_block", "group norm", exchange("norm2", lambda: nn.GroupNorm(2, 4).double())),
    ("residual_block", "no norm", exchange("norm2", nn.Identity)),
    ("residual_block", "running 1", running("norm1")),
    ("residual_block", "running 2", running("norm2")),
    ("residual_block", "running 3", running("norm3")),
    ("residual_block", "eps", setting("norm2", "eps", 0.5)),
    ("residual_block", "norm3 removed", without_third_norm),
    ("residual_block", "shadowed norm", shadow("norm2")),
    ("plain_residual_block", "a projection added", exchange("conv3", lambda: nn.Conv2d(3, 3, 1).double())),
    ("basic_block", "gelu", exchange("lrelu", nn.GELU)),
    ("basic_block", "batch norm 1", exchange("norm1", lambda: nn.BatchNorm3d(4).double())),
    ("basic_block", "running 2", running("norm2")),
    ("attention", "softmax over queries", setting("softmax", "dim", -2)),
    ("attention", "another scale", setting("", "scale", 0.11)),
    ("attention", "scale per head", setting("", "scale", torch.tensor([0.2, 0.9]).reshape(2, 1, 1))),
    ("attention", "everything dropped", setting("attn_drop", "p", 1.0)),
    ("attention", "shadowed softmax", shadow("softmax")),
    ("masked_attention", "softmax over queries", setting("softmax", "dim", -2)),
    ("shifted_block", "softmax over queries", setting("attn.softmax", "dim", -2)),
    ("shifted_block", "another scale", setting("attn", "scale", 0.11)),
    ("shifted_block", "scale per head", setting("attn", "scale", torch.tensor([0.2, 0.9]).reshape(2, 1, 1))),
    ("shifted_block", "everything dropped", setting("attn.attn_drop", "p", 1.0)),
    ("shifted_block", "another shift", setting("", "shift_size", (0, 1, 1))),
    ("shifted_block", "shadowed projection", shadow("attn.proj")),
    ("shifted_block", "no bias", exchange("attn.qkv", lambda: nn.Linear(6, 18, bias=False).double())),
    ("stage", "another shift in a block", setting("blocks.1", "shift_size", (1, 0, 1))),
    ("stage", "another window in a block", setting("blocks.1", "window_size", (2, 2, 3))),
    ("gaussian", "other taps", setting("", "approx", "SAMPLED")),
    ("gaussian", "shorter", setting("", "truncated", 1.0)),
    ("gaussian", "a tensor truncated", setting("", "truncated", torch.tensor(1.0))),
    ("gaussian", "unknown taps", setting("", "approx", "box")),
    ("gaussian", "a sigma below 0", lambda layer: layer.kernel_sigma_1.data.fill_(-0.7)),
    ("gaussian", "a fixed sigma", lambda layer: layer.sigma.__setitem__(0, torch.tensor(2.0))),
    ("stage", "softmax over queries", setting("blocks.1.attn.softmax", "dim", -2)),
]


@pytest.mark.filterwarnings("ignore:medaccel. a .* runs MONAI's own forward")
@pytest.mark.parametrize(
    ("name", "words", "edit"), SETTINGS, ids=[f"{n}-{w}".replace(" ", "_") for n, w, _ in SETTINGS]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_edited_setting_counts(name: str, words: str, edit: Callable[[nn.Module], None], when: str):
    torch.manual_seed(0)
    plain, inputs = LAYERS[name][0]()
    monais, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    unedited = outcome(plain, inputs)
    torch.manual_seed(1)
    edit(monais)
    torch.manual_seed(1)
    if when == "before":
        edit(ours)
        medaccel.accelerate(ours)
    else:
        medaccel.accelerate(ours)
        edit(ours)
    expected = outcome(monais, inputs)
    assert isinstance(expected, type) or not torch.equal(expected[0], unedited[0])  # the edit does something
    # MONAI makes a Gaussian's taps in fp32, whatever the input.
    assert_same(outcome(ours, inputs), expected, words, 1e-5 if name == "gaussian" else 1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_the_scale_or_slope_that_learns_gets_its_gradient(name: str):
    plain, inputs = LAYERS[name][0]()
    medaccel.accelerate(plain)
    learnt = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    owners = [m for m in plain.modules() if hasattr(m, "scale")]
    if not owners:
        pytest.skip("has no scale")
    for owner in owners:
        del owner.scale
        owner.scale = learnt
    with pytest.warns(UserWarning, match="its scale is a Parameter; expected a number"):
        y = plain(*inputs)
    assert float(torch.autograd.grad(y.square().sum(), learnt)[0].abs()) > 0


def test_dropout_in_the_flash_path_is_monais_none():
    layer = randomised(monai_swin.WindowAttention(6, 2, (2, 2, 2), attn_drop=0.5, use_flash_attention=True))
    x = torch.randn(4, 8, 6, dtype=torch.float64)
    mask = torch.randn(2, 8, 8, dtype=torch.float64)
    for m in (None, mask):
        with torch.no_grad():
            expected = layer(x, m)
            medaccel.accelerate(layer)
            torch.testing.assert_close(layer(x, m), expected, rtol=1e-10, atol=1e-10)
            medaccel.revert(layer)
