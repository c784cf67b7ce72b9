# SPDX-License-Identifier: Apache-2.0
"""Stage 6: a whole Swin UNETR with MONAI's code, its flash path and medaccel's layers, each also compiled."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpu_checks.context import NO_GPU, Context, Item, check, fact, speed
from gpu_checks.timing import measure

MONAI, FLASH, OURS = "MONAI", "MONAI, flash", "accelerated"
# Training losses of the same network and data after so many steps may differ by this share: rounding grows.
STEPS, PARITY = 20, {torch.float32: 1e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Job:
    """Describes one network: who makes it, its width, the batch, the precision, the memory's layout."""

    contender: str
    features: int
    batch: int
    dtype: torch.dtype
    size: int = 96
    compiled: bool = False
    channels_last: bool = False

    @property
    def work(self) -> str:
        """What is done, whoever does it."""
        name = str(self.dtype).removeprefix("torch.")
        return f"Swin UNETR, f = {self.features}, {self.size}³, batch {self.batch}, {name}"

    @property
    def way(self) -> str:
        """Who does it, and how."""
        return self.contender + ", compiled" * self.compiled + ", channels-last" * self.channels_last


class Network:
    """Holds a job's network, optimizer and inputs."""

    def __init__(self, job: Job, device: torch.device):
        from monai.networks.nets import SwinUNETR

        import medaccel

        self.job, self.device = job, device
        torch.manual_seed(0)
        model: nn.Module = SwinUNETR(1, 2, feature_size=job.features, use_flash_attention=job.contender == FLASH)
        if job.contender == OURS:
            medaccel.accelerate(model, strict=True)
        layout = torch.channels_last_3d if job.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout)
        self.call: Callable[[Tensor], Tensor] = torch.compile(self.model) if job.compiled else self.model
        shape = (job.batch, 1, *(job.size,) * 3)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.rand(shape, generator=generator).to(device)
        self.y = (torch.rand(shape, generator=generator) > 0.7).to(device).long()[:, 0]
        capturable = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, capturable=capturable, fused=capturable)

    def autocast(self) -> AbstractContextManager[object]:
        """Runs in bf16 where the job says so."""
        if self.job.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.job.dtype)

    def forward(self) -> Tensor:
        """Predicts, without recording."""
        with torch.no_grad(), self.autocast():
            return self.call(self.x)

    def step(self) -> Tensor:
        """Does one training step, and returns the loss without waiting for it."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            prediction = self.call(self.x)
        loss = nn.functional.cross_entropy(prediction.float(), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def _missing() -> str | None:
    try:
        import monai.networks.nets  # noqa: F401
    except ImportError as error:
        return f"not run: MONAI can't be imported ({error})"
    return None


# --- what is measured --------------------------------------------------------------------------------------------
def _times(context: Context, job: Job) -> Iterator[dict[str, Any]]:
    """Times the forward pass, and a training step where the contender's code serves it."""
    device = torch.device(context.device)
    network = Network(job, device)
    network.model.eval()
    more = measure([network.forward], device, graph=False)
    yield speed(f"{job.work}, forward", job.way, more.pop("ms"), **more)
    if job.contender == FLASH:
        return  # MONAI's flash path serves inference alone
    network.model.train()
    more = measure([network.step], device, graph=False)
    yield speed(f"{job.work}, training step", job.way, more.pop("ms"), **more)


def _losses(context: Context, job: Job) -> Iterator[dict[str, Any]]:
    """Trains MONAI's network and the accelerated one on the same data: the losses must stay together."""
    device, steps = torch.device(context.device), 3 if context.dry else STEPS
    losses = {}
    for contender in (MONAI, OURS):
        network = Network(Job(contender, job.features, job.batch, job.dtype, job.size), device)
        losses[contender] = torch.stack([network.step() for _ in range(steps)]).tolist()
        del network
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses[MONAI], losses[OURS], strict=True))
    held = apart <= PARITY[job.dtype]
    note = "" if held else f"losses differ by {apart:.2g}; expected at most {PARITY[job.dtype]}"
    yield check(f"{job.work}, losses of {steps} steps", held, note, losses=losses, apart=apart)


CLASSES = {
    "attention": r"fmha|flash|attention|_forward_kernel|_query|_key_value|_bias_kernel|softmax",
    "convolution": r"conv|cudnn|wgrad|dgrad|fprop|nchw|nhwc",
    "product": r"gemm|cublas|cutlass|matmul|addmm|::mm|bmm",
    "norm": r"norm|welford",
    "optimizer": r"adam|multi_tensor|foreach",
    "copy": r"memcpy|memset|copy|cat|permute|transpose",
    "element by element": r"elementwise|pointwise|vectorized|relu|gelu|add|mul",
}


def kernel_class(name: str) -> str:
    """Returns the class of a kernel by its name."""
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _profile(context: Context, job: Job) -> Iterator[dict[str, Any]]:
    """Counts the kernels of a training step, and their time by class."""
    device = torch.device(context.device)
    network = Network(job, device)
    network.step()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] if context.dry else [activity.CUDA, activity.CPU]) as found:
        network.step()
        if not context.dry:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CPU if context.dry else torch.autograd.DeviceType.CUDA
    count, times, totals = 0, collections.Counter[str](), collections.Counter[str]()
    for event in found.key_averages():
        if event.device_type != wanted:
            continue
        ms = (event.self_cpu_time_total if context.dry else event.self_device_time_total) / 1e3
        count += event.count
        times[kernel_class(event.key)] += ms
        totals[event.key] += ms
    what = "operations of torch" if context.dry else "kernels"
    yield fact(f"{what} a training step, {job.work}, {job.way}", count)
    milliseconds = {kind: round(ms, 2) for kind, ms in times.most_common()}
    yield fact(f"ms by class, {job.work}, {job.way}", milliseconds)
    yield fact(f"longest, {job.work}, {job.way}", {name[:80]: round(ms, 2) for name, ms in totals.most_common(8)})


def _graph(context: Context, job: Job) -> Iterator[dict[str, Any]]:
    """Captures a whole training step; its losses must be those of eager steps."""
    name = f"{job.work}, a training step as a CUDA graph, {job.way}"
    if context.dry:
        yield check(name, None, NO_GPU)
        return
    device = torch.device(context.device)
    eager = Network(job, device)
    expected = torch.stack([eager.step() for _ in range(6)]).tolist()
    del eager
    network = Network(job, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            network.step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    network.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = network.step()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(float(loss))
    apart = max(abs(a - b) / abs(b) for a, b in zip(seen, expected[3:], strict=True))
    yield check(name, apart <= PARITY[job.dtype], f"losses {seen}, eager {expected[3:]}", apart=apart)
    more = measure([graph.replay], device, graph=False)
    yield speed(f"{job.work}, training step", f"{job.way}, as a CUDA graph", more.pop("ms"), **more)


def jobs(dry: bool) -> Iterator[tuple[str, Callable[[Context, Job], Iterator[dict[str, Any]]], Job]]:
    """Yields what is measured of which network, what decides first."""
    if dry:
        small = {"features": 12, "batch": 1, "dtype": torch.float32, "size": 64}
        for way in (MONAI, FLASH, OURS):
            yield "time", _times, Job(way, **small)  # type: ignore[arg-type]
        yield "losses", _losses, Job(OURS, **small)  # type: ignore[arg-type]
        yield "profile", _profile, Job(OURS, **small)  # type: ignore[arg-type]
        yield "graph", _graph, Job(OURS, **small)  # type: ignore[arg-type]
        return
    bf16, fp32 = torch.bfloat16, torch.float32
    for way in (OURS, MONAI, FLASH):
        yield "time", _times, Job(way, 48, 1, bf16)
    yield "losses", _losses, Job(OURS, 48, 1, bf16)
    yield "graph", _graph, Job(OURS, 48, 1, bf16)
    for way in (OURS, MONAI):
        yield "time", _times, Job(way, 48, 1, bf16, channels_last=True)
        yield "profile", _profile, Job(way, 48, 1, bf16)
        yield "time", _times, Job(way, 48, 1, bf16, compiled=True)
    yield "losses", _losses, Job(OURS, 24, 1, fp32)
    for (features, batch, dtype), way in itertools.product(
        itertools.product((48, 24), (1, 2), (bf16, fp32)), (OURS, MONAI, FLASH)
    ):
        if (features, batch, dtype) != (48, 1, bf16):
            yield "time", _times, Job(way, features, batch, dtype)
    for features, way in itertools.product((24,), (OURS, MONAI, FLASH)):
        yield "time", _times, Job(way, features, 1, bf16, compiled=True)
    for way in (OURS, MONAI):
        yield "time", _times, Job(way, 48, 1, bf16, compiled=True, channels_last=True)
        yield "graph", _graph, Job(way, 24, 1, fp32)


def items(context: Context) -> list[Item]:
    """Returns the measurements; where MONAI is missing, one that says so."""
    reason = _missing()
    if reason is not None:
        return [Item("MONAI", lambda: iter([check("Swin UNETR", None, reason)]))]
    return [
        Item(f"{what}: {job.work}, {job.way}", lambda run=run, job=job: run(context, job))  # type: ignore[misc]
        for what, run, job in jobs(context.dry)
    ]
