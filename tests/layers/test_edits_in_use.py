# SPDX-License-Identifier: Apache-2.0
"""Edits count however the accelerated model is called: compiled, copied, pickled, sharded, with other parameters."""

import copy
import pickle
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.nets import swin_unetr as monai_swin
from torch import nn

import medaccel
from medaccel.layers import swin
from tests.layers.edits import (
    Build,
    Scaled,
    attention,
    basic_block,
    exchange,
    forward_hook,
    forward_pre_hook,
    other_class,
    outcome,
    residual_block,
    running,
    setting,
    stage,
    unshifted_block,
    without_third_norm,
)


def gelu(layer: Any) -> None:
    layer.lrelu = nn.GELU()


@pytest.mark.filterwarnings("ignore:medaccel. a .* runs MONAI's own forward")
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "functional_call", "compile", "data_parallel"])
@pytest.mark.parametrize(
    ("build", "edit"),
    [
        (residual_block, gelu),
        (residual_block, running("norm2")),
        (basic_block, gelu),
        (stage, exchange("blocks.0.attn.attn_drop", nn.Identity)),
        (stage, exchange("blocks.1.attn.qkv", lambda: Scaled(nn.Linear(6, 18).double()))),
        (attention, exchange("softmax", lambda: nn.Softmax(dim=-2))),
    ],
)
@pytest.mark.slow
def test_edits_count_however_the_model_is_called(build: Build, edit: Callable[[nn.Module], None], way: str):
    torch.manual_seed(0)
    monais, inputs = build()
    ours = copy.deepcopy(monais)
    medaccel.accelerate(ours)
    call: Any = ours
    if way == "compile":  # compiled before the edit, and called: the edit must be seen
        torch._dynamo.reset()
        call = torch.compile(ours, backend="aot_eager", fullgraph=True)
        call(*inputs)
    for layer in (monais, ours):
        torch.manual_seed(1)
        edit(layer)
    expected = monais(*inputs)
    if way == "deepcopy":
        call = copy.deepcopy(ours)
    elif way == "pickle":
        call = pickle.loads(pickle.dumps(ours))
    elif way == "functional_call":
        state = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
        torch.testing.assert_close(torch.func.functional_call(ours, state, inputs), expected, rtol=1e-10, atol=1e-10)
        return
    elif way == "data_parallel":
        call = nn.DataParallel(ours)
    torch.testing.assert_close(call(*inputs), expected, rtol=1e-10, atol=1e-10)


def _own_forward(layer: nn.Module) -> None:
    norm = layer.norm2
    norm.forward = lambda x: 3.0 * type(norm).forward(norm, x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:medaccel. a .* runs MONAI's own forward")
@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: forward_hook(layer, "norm2", []),
        lambda layer: forward_pre_hook(layer, "norm2", []),
        _own_forward,
        setting("norm2", "eps", 0.5),
        setting("lrelu", "negative_slope", 0.5),
        lambda layer: other_class(layer, "lrelu", []),
        without_third_norm,
    ],
)
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
def test_an_edit_after_compiling_counts_where_torch_guards_it(edit: Callable[[nn.Module], None]):
    """torch.compile looks at hooks again only where it is told to; MONAI's own blocks behave the same."""
    torch._dynamo.reset()
    layer, inputs = residual_block()
    medaccel.accelerate(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    before = compiled(*inputs)
    edit(layer)
    torch.testing.assert_close(compiled(*inputs), layer(*inputs), rtol=1e-10, atol=1e-10)
    assert not torch.equal(layer(*inputs), before)


@pytest.mark.parametrize(
    ("build", "ops"), [(attention, 1), (unshifted_block, 1), (stage, 2), (residual_block, 3), (basic_block, 2)]
)
def test_a_stock_layer_compiles_to_one_graph_with_the_kernels(build: Build, ops: int):
    torch._dynamo.reset()
    layer, inputs = build()
    medaccel.accelerate(layer)
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if "medaccel" in str(node.target))
        return graph.forward

    torch.compile(layer, backend=backend, fullgraph=True)(*inputs)
    assert len(called) == ops, called


def test_a_compiled_layer_warns_too():
    torch._dynamo.reset()
    layer, inputs = residual_block()
    medaccel.accelerate(layer)
    layer.lrelu = nn.Softsign()
    with pytest.warns(UserWarning, match="a UnetResBlock runs MONAI's own forward: its lrelu is a Softsign"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)


def _shard(port: int, queue: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    layer, inputs = stage()
    x = inputs[0]
    expected = outcome(copy.deepcopy(layer), inputs)
    medaccel.accelerate(layer)
    for block in layer.blocks:
        fully_shard(block)
    fully_shard(layer)
    calls: list[int] = []
    original = swin.shifted_window_attention
    swin.shifted_window_attention = lambda *a, **k: calls.append(1) or original(*a, **k)
    y = layer(x)
    y.square().sum().backward()
    same = torch.allclose(y, expected[0], rtol=1e-10, atol=1e-10) and all(
        torch.allclose(p.grad.full_tensor(), g, rtol=1e-9, atol=1e-10)
        for p, g in zip(layer.parameters(), expected[2:], strict=True)
    )
    queue.put((same, len(calls), str(medaccel.revert(layer))))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_blocks_keep_the_kernel_and_monais_numbers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_shard, args=(port, queue))
    process.start()
    same, calls, reverted = queue.get(timeout=100)
    process.join(timeout=100)
    assert process.exitcode == 0
    assert same
    assert calls == 2
    assert "its class FSDPSwinTransformerBlock was made from medaccel's" in reverted


@pytest.mark.filterwarnings("ignore:medaccel. a .* runs MONAI's own forward")
def test_an_edited_swin_unetr_is_reported_when_asked_again():
    torch.manual_seed(0)
    net = monai_swin.SwinUNETR(1, 2, feature_size=12, depths=(1, 2, 1, 1), spatial_dims=2).double()
    ours = copy.deepcopy(net)
    medaccel.accelerate(ours, strict=True)
    for model in (net, ours):
        model.swinViT.layers2[0].blocks[1].attn.proj.register_forward_hook(lambda m, a, y: 2 * y)
        model.decoder1.conv_block.lrelu = nn.SiLU()
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), net(x), rtol=1e-9, atol=1e-9)
    report = medaccel.accelerate(ours)
    assert not report.changed
    assert dict(report.kept) == {
        "swinViT.layers2.0.blocks.1": "it runs MONAI's own forward, since it was edited: its attn.proj has hooks, "
        "which would not be called",
        "decoder1.conv_block": "it runs MONAI's own forward, since it was edited: its lrelu is a SiLU; expected "
        "torch's LeakyReLU or ReLU",
    }


def test_functional_call_uses_the_parameters_that_it_is_given():
    for build in (stage, residual_block, attention):
        monais, inputs = build()
        ours = copy.deepcopy(monais)
        medaccel.accelerate(ours)
        state = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
        expected = torch.func.functional_call(monais, state, inputs)
        found = torch.func.functional_call(ours, state, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
