# SPDX-License-Identifier: Apache-2.0
"""On a GPU no layer, loss, scheduler, sampler or network makes the host wait, forward or backward."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medaccel import _accelerate, diffusion, layers, losses, nets
from tests.fake_cuda.device import CUDA, Watch, fake_gpu, module_on_gpu, on_gpu

pytestmark = [pytest.mark.fake_cuda, pytest.mark.slow]

MAP, FEATURES = torch.ones(2, 4, 8, 9, 10), torch.ones(2, 8, 4, 4, 4)
AFFINE = torch.eye(4).expand(2, 4, 4)
_BLOCK: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "stride": 1, "norm_name": "instance"}
_SWIN: dict[str, Any] = {"window_size": (4, 4, 4), "num_heads": 2}


def _loss(module: nn.Module, **options: Any) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    return lambda: (module, (FEATURES, FEATURES, AFFINE, AFFINE))


# Each class of layers and losses, with its arguments.
MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "GaussianFilter": lambda: (layers.GaussianFilter(3, 1.5), (MAP,)),
    "GaussianFilter, learnt": lambda: (layers.GaussianFilter(3, [1.5, 1.0, 0.5], requires_grad=True), (MAP,)),
    "UnetResBlock": lambda: (layers.UnetResBlock(in_channels=4, out_channels=6, **_BLOCK), (MAP,)),
    "UnetBasicBlock": lambda: (layers.UnetBasicBlock(in_channels=4, out_channels=6, **_BLOCK), (MAP,)),
    "WindowAttention": lambda: (
        layers.WindowAttention(dim=16, num_heads=2, window_size=(4, 4, 4), qkv_bias=True, attn_drop=0.2),
        (torch.ones(3, 64, 16), None),
    ),
    "WindowAttention, mask": lambda: (
        layers.WindowAttention(dim=16, num_heads=2, window_size=(4, 4, 4), qkv_bias=True),
        (torch.ones(4, 64, 16), torch.zeros(2, 64, 64)),
    ),
    "SwinTransformerBlock": lambda: (
        layers.SwinTransformerBlock(dim=16, shift_size=(2, 2, 2), attn_drop=0.2, drop_path=0.1, **_SWIN),
        (torch.ones(1, 6, 7, 9, 16), None),
    ),
    "BasicLayer": lambda: (
        layers.BasicLayer(dim=16, depth=2, drop_path=[0.0, 0.1], qkv_bias=True, **_SWIN),
        (torch.ones(1, 16, 6, 7, 9),),
    ),
    "SwinTransformer": lambda: (
        layers.SwinTransformer(1, 12, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24)),
        (torch.ones(1, 1, 32, 32, 64),),
    ),
    "ContrastiveLoss": lambda: (losses.ContrastiveLoss(), (torch.ones(5, 8), torch.ones(5, 8))),
    "ContrastiveLoss, temperature on the GPU": lambda: (
        losses.ContrastiveLoss(on_gpu(torch.tensor(0.5))), (torch.ones(5, 8), torch.ones(5, 8))
    ),
    "PixelConsistencyLoss": _loss(losses.PixelConsistencyLoss()),
    "PixelConsistencyLoss, radius": _loss(losses.PixelConsistencyLoss(radius=2.0)),
    "PixelContrastiveLoss": _loss(losses.PixelContrastiveLoss()),
    "PixelContrastiveLoss, radius": _loss(losses.PixelContrastiveLoss(radius=2.0)),
}  # fmt: skip

NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "SwinUNETR": lambda: (
        nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, attn_drop_rate=0.1),
        (torch.ones(1, 1, 64, 64, 64),),
    ),
    "SwinUNETR, v2, checkpointed": lambda: (
        nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, use_v2=True, use_checkpoint=True),
        (torch.ones(1, 1, 32, 64, 64),),
    ),
    "SSLHead": lambda: (nets.SSLHead(feature_size=12), (torch.ones(1, 1, 32, 64, 64),)),
    "TimeConditionedSwinUNETR": lambda: (
        diffusion.TimeConditionedSwinUNETR(feature_size=12), (torch.ones(1, 1, 32, 32, 64), torch.tensor([7.0]))
    ),
}  # fmt: skip


def tensors_in(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, tuple | list) else [output]


def trained(
    made: Callable[[], tuple[nn.Module, tuple[Any, ...]]], patch: pytest.MonkeyPatch, cast: torch.dtype | None
) -> Watch:
    """Runs a module forward and backward: the result lies on the GPU, every parameter gets a gradient there."""
    with fake_gpu(patch) as watch:
        module, arguments = made()
        module = module_on_gpu(module).train()
        inputs = [
            a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in on_gpu(arguments)
        ]
        with contextlib.nullcontext() if cast is None else torch.autocast("cuda", dtype=cast):
            outputs = tensors_in(module(*inputs))
        assert {t.device for t in outputs} == {CUDA}
        torch.autograd.backward([t.sum() for t in outputs])
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                assert parameter.grad.device == CUDA, name
                assert parameter.grad.dtype == parameter.dtype, name
    assert watch.waits == []
    return watch


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_no_layer_or_loss_waits(name: str, cast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch):
    trained(MODULES[name], monkeypatch, cast)


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_waits_in_a_training_step(name: str, cast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch):
    watch = trained(NETWORKS[name], monkeypatch, cast)
    assert watch.ops.count("shifted_window_attention_backward") >= 8
    assert "shifted_window_attention" in watch.ops


def test_every_class_that_medaccel_offers_is_called():
    offered = {*layers.__all__, *(n for n in losses.__all__ if n[0].isupper()), "SwinUNETR", "SSLHead"}
    assert offered <= {name.split(",")[0] for name in (*MODULES, *NETWORKS)}
    replaced = {entry.ours.split(":")[1] for entry in _accelerate._REGISTRY}
    assert replaced <= {name.split(",")[0] for name in (*MODULES, *SCHEDULERS)}


# --- schedulers and samplers -------------------------------------------------------------------------------------
SCHEDULERS = {"DDPMScheduler": diffusion.DDPMScheduler, "DDIMScheduler": diffusion.DDIMScheduler}
MONAIS: dict[str, Any] = {"skipped_steps": "training", "kernel_noise": False}
X = torch.ones(2, 1, 4, 5, 6)


@pytest.mark.parametrize("options", [{}, MONAIS, {"prediction_type": "v_prediction"}], ids=str)
@pytest.mark.parametrize("listed_on", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_scheduler_waits_in_a_step(
    name: str, listed_on: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    scheduler = SCHEDULERS[name](num_train_timesteps=50, **options)
    scheduler.set_timesteps(10)
    with fake_gpu(monkeypatch) as watch:
        x = on_gpu(X)
        if listed_on == "cuda":  # as set_timesteps(10, "cuda") leaves them, whose numbers a fake has not
            steps = scheduler.timesteps
            walk = scheduler._walk_now()
            scheduler.timesteps = walk.timesteps = on_gpu(steps)
            walk.content, walk.version = None, scheduler.timesteps._version
        for t in list(scheduler.timesteps)[:3]:
            x, x0 = scheduler.step(0.1 * x, t, x)
            assert x.device == x0.device == CUDA
        scheduler.step(x, 10, x, seed=3, mask=torch.ones_like(x), guide=x)
    assert watch.waits == []


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_noising_copies_the_schedulers_table_once_and_a_step_reads_nothing_back(
    name: str, accelerated: bool, monkeypatch: pytest.MonkeyPatch
):
    scheduler = SCHEDULERS[name](num_train_timesteps=50)
    scheduler._mended = not accelerated
    scheduler.set_timesteps(10)
    with fake_gpu(monkeypatch) as watch:
        x, at = on_gpu(X), on_gpu(torch.tensor([3, 4]))
        scheduler.add_noise(x, x, at)
        assert watch.waits == ["aten._to_copy.default cpu to cuda:0"]
        watch.waits.clear()
        scheduler.add_noise(x, x, at)
        scheduler.get_velocity(x, x, at)
        scheduler.add_noise(x, x, torch.tensor([3, 4]))
        scheduler.training_target(x, None, at, seed=3)
        scheduler.step(x, 10, x)
    assert watch.waits == []


def test_noising_at_time_steps_of_the_host_copies_nothing(monkeypatch: pytest.MonkeyPatch):
    scheduler = diffusion.DDPMScheduler(num_train_timesteps=50)
    with fake_gpu(monkeypatch) as watch:
        assert scheduler.add_noise(on_gpu(X), None, torch.tensor([3, 4]), seed=3).device == CUDA
    assert watch.waits == []


def test_a_generator_of_the_gpu_gives_a_seed_that_stays_there(monkeypatch: pytest.MonkeyPatch):
    scheduler, randint = diffusion.DDPMScheduler(num_train_timesteps=50), torch.randint
    scheduler.set_timesteps(10)
    monkeypatch.setattr(torch, "randint", lambda *args, generator=None, **options: randint(*args, **options))
    with fake_gpu(monkeypatch) as watch:
        x = on_gpu(X)
        scheduler.step(x, 49, x, SimpleNamespace(device=CUDA))
    assert watch.waits == []


@pytest.mark.parametrize("sde", [diffusion.VPSDE(steps=50), diffusion.VESDE(steps=50)], ids=["VP", "VE"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "ancestral"},
        {"method": "ddim", "eta": 0.5},
        {"method": "euler_maruyama"},
        {"method": "dpm_solver_2m", "clip": (-1.0, 1.0)},
        {"method": "ancestral", "corrector_steps": 2, "prediction": "score"},
    ],
    ids=str,
)
def test_no_sampler_waits(sde: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    sampler = diffusion.Sampler(sde, **options)
    with fake_gpu(monkeypatch) as watch:
        x = sampler.start((2, 1, 4, 5, 6), seed=3, like=on_gpu(X))
        assert sampler.sample(lambda x, time: 0.1 * x, x, seed=3, steps=4).device == CUDA
    assert watch.waits == []


def test_a_rectified_flow_and_sdedit_do_not_wait(monkeypatch: pytest.MonkeyPatch):
    edit = diffusion.SDEdit(lambda x, time: 0.1 * x, diffusion.VPSDE(steps=50), 0.5, 4)
    with fake_gpu(monkeypatch) as watch:
        x = on_gpu(X)
        diffusion.sample_rectified_flow(lambda x, time: 0.1 * x, x, steps=3)
        edit(x, torch.ones_like(x), seeds=2, progress=False)
        diffusion.noised(x, on_gpu(torch.ones(2)), on_gpu(torch.ones(2)), seed=3)
        diffusion.noised(x, torch.ones(2), torch.ones(2), seed=3)
    assert watch.waits == []
