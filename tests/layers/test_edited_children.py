# SPDX-License-Identifier: Apache-2.0
"""Every child of every layer, edited before or after `accelerate`, counts as it does in MONAI's layer.

Each child is replaced, hooked, patched and parametrized in turn. The edit is done to MONAI's layer and to the
accelerated copy alike; outputs, gradients and what hooks saw must be the same.
"""

import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from monai.networks.blocks import dynunet_block as monai_blocks
from monai.networks.nets import swin_unetr as monai_swin
from torch import Tensor, nn

import medaccel
from medaccel.layers import swin
from tests.layers.edits import (
    EDITS,
    LAYERS,
    NEED_WEIGHT,
    Build,
    Seen,
    assert_same,
    attention,
    basic_block,
    outcome,
    residual_block,
    shifted_block,
    stage,
)


def _cases() -> Iterator[Any]:
    for name, (build, _) in LAYERS.items():
        layer, _ = build()
        for path, child in layer.named_modules():
            if path and type(child) is not nn.ModuleList:
                yield pytest.param(name, path, id=f"{name}-{path}")


@pytest.mark.filterwarnings("ignore:medaccel. a .* runs MONAI's own forward")
@pytest.mark.parametrize(("name", "path"), _cases())
def test_an_edited_child_counts_before_and_after_accelerate(name: str, path: str):
    torch.manual_seed(0)
    plain, inputs = LAYERS[name][0]()
    applied = 0
    for kind, edit in EDITS.items():
        child = plain.get_submodule(path)
        if kind in NEED_WEIGHT and not isinstance(getattr(child, "weight", None), Tensor):
            continue
        monais, before, after = (copy.deepcopy(plain) for _ in range(3))
        seen: tuple[Seen, Seen, Seen] = ([], [], [])
        edit(monais, path, seen[0])
        expected = outcome(monais, inputs)
        edit(before, path, seen[1])
        medaccel.accelerate(before)
        medaccel.accelerate(after)
        assert type(after) is LAYERS[name][1]
        edit(after, path, seen[2])
        for layer, when, log in ((before, "before", seen[1]), (after, "after", seen[2])):
            assert_same(outcome(layer, inputs), expected, f"{kind} {when}")
            assert len(log) == len(seen[0]), f"{kind} {when}"
            assert all(_close(a, b) for a, b in zip(log, seen[0], strict=True)), f"{kind} {when}"
        applied += 1
    assert applied >= 11


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    return a == pytest.approx(b, rel=1e-9, abs=1e-9) if isinstance(a, float) else a == b


@pytest.mark.parametrize("name", LAYERS)
def test_each_bypassed_child_is_reported_and_warned_of_once(name: str, recwarn: pytest.WarningsRecorder):
    """The table of bypassed children makes the check, the report and this test."""
    build, ours = LAYERS[name]
    for child in getattr(ours, "BYPASSED", ()):
        plain, inputs = build()
        if child.optional and not hasattr(plain, child.path):
            continue
        medaccel.accelerate(plain)
        assert plain.unserved() is None
        handle = plain.get_submodule(child.path).register_forward_hook(lambda *_: None)
        recwarn.clear()
        for _ in range(3):
            plain(*inputs)
        told = [str(w.message) for w in recwarn if "runs MONAI's own forward" in str(w.message)]
        assert sum(f"its {child.path} has hooks" in text for text in told) == 1, told
        medaccel.revert(plain)
        report = medaccel.accelerate(plain)
        assert f"its {child.path} has hooks, which would not be called" in dict(report.kept)["(model)"]
        handle.remove()
        assert medaccel.accelerate(plain).changed


def _served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = swin.shifted_window_attention
    monkeypatch.setattr(swin, "shifted_window_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def test_a_layer_is_fast_again_once_the_edit_is_undone(monkeypatch: pytest.MonkeyPatch):
    layer, inputs = stage()
    medaccel.accelerate(layer)
    calls = _served(monkeypatch)
    handle = layer.blocks[1].attn.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="its attn has hooks"):
        layer(*inputs)
    assert len(calls) == 1  # the other block's; the hooked one's windows go with a mask
    handle.remove()
    layer(*inputs)
    assert len(calls) == 3


def test_a_watched_block_keeps_the_kernel_and_sees_monais_mask(monkeypatch: pytest.MonkeyPatch):
    layer, inputs = stage()
    medaccel.accelerate(layer)
    calls = _served(monkeypatch)
    masks: list[Any] = []
    layer.blocks[1].register_forward_pre_hook(lambda module, args: masks.append(args[1]))
    layer(*inputs)
    assert len(calls) == 2
    assert masks[0].shape == (8, 8, 8)


def _note_class(seen: list[str], module: nn.Module, args: Any, output: Any) -> None:
    seen.append(type(module).__name__)


def test_hooks_on_all_modules_see_everyexchange():
    layer, inputs = stage()
    counts = []
    for accelerated in (False, True):
        if accelerated:
            medaccel.accelerate(layer)
        seen: list[str] = []
        note = functools.partial(_note_class, seen)
        handle = nn.modules.module.register_module_forward_hook(note)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer(*inputs)
        finally:
            handle.remove()
        counts.append(sorted(seen))
    assert counts[0] == counts[1]
    assert "Softmax" in counts[0]


@pytest.mark.parametrize("mask", [None, "own"])
def test_a_shifted_block_takes_the_mask_that_it_is_given(mask: str | None):
    layer, (x, standard) = shifted_block()
    given = None if mask is None else standard + torch.randn(standard.shape).double()
    expected = outcome(layer, (x, given))
    medaccel.accelerate(layer)
    assert_same(outcome(layer, (x, given)), expected, "mask")


@pytest.mark.parametrize(
    ("owner", "method", "build"),
    [
        (monai_swin.WindowAttention, "forward", attention),
        (monai_swin.WindowAttention, "forward", stage),
        (monai_swin.SwinTransformerBlock, "forward_part1", stage),
        (monai_swin.SwinTransformerBlock, "forward", stage),
        (monai_swin.BasicLayer, "forward", stage),
        (monai_blocks.UnetResBlock, "forward", residual_block),
        (monai_blocks.UnetBasicBlock, "forward", basic_block),
        (nn.Softmax, "forward", attention),
        (nn.LeakyReLU, "forward", residual_block),
    ],
)
@pytest.mark.filterwarnings("ignore:medaccel. a .* runs MONAI's own forward")
def test_a_class_patched_for_everyone_counts(
    owner: type[nn.Module], method: str, build: Build, monkeypatch: pytest.MonkeyPatch
):
    layer, inputs = build()
    ours = copy.deepcopy(layer)
    medaccel.accelerate(ours)
    original = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda self, *a, **k: 0.5 * original(self, *a, **k))
    assert_same(outcome(ours, inputs), outcome(layer, inputs), method)
