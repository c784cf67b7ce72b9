# SPDX-License-Identifier: Apache-2.0
"""MONAI's Swin layers on medaccel's attention have the same weights and the same numbers, in training too."""

import copy
import pickle
import socket

import pytest
import torch
from monai.networks.nets import swin_unetr as monai_swin
from torch import Tensor, nn

import medaccel
from medaccel.layers import BasicLayer, SwinTransformerBlock, WindowAttention


def stage(rank: int = 3, window: int = 4, depth: int = 2, **options) -> monai_swin.BasicLayer:
    """Builds MONAI's stage of 12 channels and 3 heads, in fp64, its biases not zero."""
    torch.manual_seed(0)
    options.setdefault("qkv_bias", True)
    layer = monai_swin.BasicLayer(12, depth, 3, (window,) * rank, [0.0] * depth, **options).double()
    for name, parameter in layer.named_parameters():
        if name.endswith(("bias", "table")):
            nn.init.normal_(parameter)
    return layer


def outcome(model: nn.Module, *inputs: Tensor | None) -> list[Tensor]:
    """Returns the output and the gradients to the first input and to every parameter."""
    x = inputs[0].detach().requires_grad_()
    y = model(x, *inputs[1:])
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)]


def assert_same(ours: list[Tensor], monais: list[Tensor], bound: float = 1e-10) -> None:
    for a, b in zip(ours, monais, strict=True):
        if b is None:
            assert a is None
            continue
        largest = max(float(b.abs().max()), 1e-6 * float(monais[1].abs().max()))
        assert float((a - b).abs().max()) <= bound * largest


SIZES = [(8, 8, 8), (9, 10, 11), (3, 9, 5), (2, 3, 3), (4, 16, 4), (8, 8), (9, 13), (3, 7)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_stage_keeps_monais_output_and_every_gradient(sizes: tuple[int, ...], qkv_bias: bool):
    layer = stage(len(sizes), qkv_bias=qkv_bias)
    x = torch.randn(2, 12, *sizes, dtype=torch.float64)
    before = outcome(layer, x)
    medaccel.accelerate(layer, strict=True)
    assert type(layer) is BasicLayer
    assert_same(outcome(layer, x), before)
    medaccel.revert(layer)
    for again, monais in zip(outcome(layer, x), before, strict=True):
        assert torch.equal(again, monais)


@pytest.mark.parametrize("downsample", [monai_swin.PatchMerging, monai_swin.PatchMergingV2])
def test_downsampling_stages_agree(downsample: type[nn.Module]):
    layer = stage(downsample=downsample)
    x = torch.randn(1, 12, 6, 7, 9, dtype=torch.float64)
    before = outcome(layer, x)
    medaccel.accelerate(layer)
    assert_same(outcome(layer, x), before)


@pytest.mark.parametrize("masked", [False, True])
def test_an_attention_on_its_own_takes_windows(masked: bool):
    attention = monai_swin.WindowAttention(12, 3, (4, 4, 4), qkv_bias=True).double()
    x = torch.randn(6, 48, 12, dtype=torch.float64)
    mask = -100.0 * torch.randint(0, 2, (3, 48, 48)).double() if masked else None
    before = outcome(attention, x, mask)
    medaccel.accelerate(attention)
    assert type(attention) is WindowAttention
    assert_same(outcome(attention, x, mask), before)


def test_no_mask_is_built_where_nobody_reads_it(monkeypatch: pytest.MonkeyPatch):
    layer = stage()
    medaccel.accelerate(layer)
    monkeypatch.setattr(monai_swin, "compute_mask", None)
    layer(torch.randn(1, 12, 9, 9, 9, dtype=torch.float64))


class OwnAttention(monai_swin.WindowAttention):
    """Is a user's subclass."""


def test_a_block_that_cant_be_served_stays_with_its_mask_and_says_why():
    layer = stage()
    x = torch.randn(1, 12, 9, 8, 8, dtype=torch.float64)
    before = outcome(layer, x)
    calls = []
    layer.blocks[1].attn.register_forward_hook(lambda *args: calls.append(1))
    report = medaccel.accelerate(layer)
    assert ("blocks.1", "its attn has hooks, which would not be called") in report.kept
    assert_same(outcome(layer, x), before)
    assert calls == [1]
    with pytest.raises(RuntimeError, match="its attn has hooks"):
        medaccel.accelerate(stage_with_own_attention(hook=True), strict=True)
    report = medaccel.accelerate(stage_with_own_attention(hook=False))
    reasons = dict(report.kept)
    assert reasons["blocks.0"] == "its attn is a OwnAttention; expected MONAI's WindowAttention"
    assert reasons["blocks.0.attn"] == "OwnAttention is a subclass of MONAI's WindowAttention"


def stage_with_own_attention(hook: bool) -> nn.Module:
    layer = stage()
    if hook:
        layer.blocks[0].attn.register_forward_pre_hook(lambda *args: None)
    else:
        layer.blocks[0].attn.__class__ = OwnAttention
    return layer


def test_an_adapter_around_a_projection_keeps_its_block_on_monais_windows():
    class Adapter(nn.Module):
        """Wraps the projection in a low-rank adapter, which hides the projection's bias."""

        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.base = linear
            self.down, self.up = nn.Linear(12, 2, bias=False).double(), nn.Linear(2, 36, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    layer = stage()
    for block in layer.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    x = torch.randn(1, 12, 9, 7, 6, dtype=torch.float64)
    before = outcome(layer, x)
    report = medaccel.accelerate(layer)
    assert dict(report.kept)["blocks.0"] == "its attn.qkv is a Adapter; expected torch's Linear"
    assert type(layer.blocks[0].attn) is WindowAttention  # the windows themselves are still served
    assert_same(outcome(layer, x), before)


def test_attention_dropout_follows_torchs_generator_and_stops_in_evaluation():
    layer = stage(attn_drop=0.3)
    medaccel.accelerate(layer)
    x = torch.randn(1, 12, 8, 8, 8, dtype=torch.float64)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(layer(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_checkpointed_blocks_with_dropout_give_the_same_gradients():
    x = torch.randn(1, 12, 8, 8, 8, dtype=torch.float64)
    outcomes = []
    for use_checkpoint in (False, True):
        layer = stage(attn_drop=0.3, use_checkpoint=use_checkpoint)
        medaccel.accelerate(layer)
        torch.manual_seed(3)
        outcomes.append(outcome(layer, x))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_it_pickles_copies_casts_and_leaves_other_models_alone():
    layer, other = stage(), stage()
    x = torch.randn(1, 12, 9, 8, 8, dtype=torch.float64)
    medaccel.accelerate(layer)
    assert type(other.blocks[0]) is monai_swin.SwinTransformerBlock
    expected = layer(x)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(x), expected)
    torch.testing.assert_close(layer.float()(x.float()), expected.float(), rtol=1e-4, atol=1e-4)
    wrapped = nn.DataParallel(stage())
    assert medaccel.accelerate(wrapped)
    assert torch.equal(wrapped(x), expected)


def test_a_block_compiles_as_one_graph():
    layer = stage().float()
    medaccel.accelerate(layer)
    block = layer.blocks[1]
    x = torch.randn(1, 9, 8, 8, 12, requires_grad=True)
    compiled = torch.compile(lambda x: block(x, None), fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad(block(x, None).square().sum(), x), rtol=1e-4, atol=1e-4)


def test_autocast_trains_in_bf16_with_fp32_parameters():
    layer = stage().float()
    x = torch.randn(1, 12, 9, 8, 8)
    exact = layer(x)
    medaccel.accelerate(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert float((y - exact).detach().abs().max()) <= 0.05 * float(exact.detach().abs().max())


def _train(rank: int, world: int, port: int, queue) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    layer = stage()
    medaccel.accelerate(layer)
    parallel = nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(2, 12, 9, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    parallel(x[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        queue.put([p.grad.numpy() for p in layer.parameters()])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ddp_processes_give_one_processs_gradients():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_train, args=(rank, 2, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    gradients = queue.get(timeout=100)
    for process in processes:
        process.join(timeout=100)
        assert process.exitcode == 0
    layer = stage()
    x = torch.randn(2, 12, 9, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    layer(x).square().mean().backward()
    for ours, parameter in zip(gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), parameter.grad, rtol=1e-9, atol=1e-12)


def test_our_blocks_are_monais_with_its_state_dict():
    ours = SwinTransformerBlock(12, 3, (4, 4, 4), (2, 2, 2))
    monais = monai_swin.SwinTransformerBlock(12, 3, (4, 4, 4), (2, 2, 2))
    assert isinstance(ours, monai_swin.SwinTransformerBlock)
    monais.load_state_dict(ours.state_dict())
    ours.load_state_dict(monais.state_dict())
