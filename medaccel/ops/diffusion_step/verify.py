# SPDX-License-Identifier: Apache-2.0
"""Checks and times the diffusion step for `medaccel verify`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops.diffusion_step import diffusion_step, unsupported
from medaccel.ops.diffusion_step.cases import DDPM, named

_CASES = (
    *("ddpm", "ddpm_clipped", "ddim", "multistep", "given_noise", "masked", "one_mask_for_all", "everything"),
    *("per_sample", "several_blocks", "unaligned", "empty_batch"),
    *("ddpm, scalars on the device", "everything, scalars on the device", "per_sample, scalars on the device"),
)


def work(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Work:
    """Returns one step: the new sample, x0, and the gradients to every input tensor."""
    case_name, _, on_device = name.partition(", ")
    case = named(case_name)
    given = case.tensors(dtype)
    mask = given.pop("mask", None)
    names, tensors = list(given), [t.to(device) for t in given.values()]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(case.shape, generator=generator, dtype=dtype).to(device) for _ in range(2)]
    options = case.options()
    others = {} if mask is None else {"mask": mask}
    if on_device:
        levels = case.coefficients.keys()
        others |= {level: torch.as_tensor(options.pop(level), dtype=torch.float64) for level in levels}
        others["seed"] = torch.tensor([options.pop("seed")])

    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return diffusion_step(**dict(zip([*names, *others], tensors, strict=True)), **options)  # type: ignore[arg-type]

    return _checks.Work(
        *("diffusion_step", name, unsupported(tensors[0]), forward, tensors, [1.0] * (2 + len(tensors)), grads),
        others=[t.to(device) for t in others.values()],
        reads_host=any(isinstance(value, Tensor) for value in options.values()),
    )


def time_step(device: torch.device, s: float) -> _checks.Speed:
    """Times a sampler's step with clip, with its noise (s > 0) or without."""
    size = 96 if device.type == "cpu" else 256
    x, m = (torch.rand(1, 1, size, size, size, device=device) for _ in range(2))
    options: dict[str, Any] = {**DDPM, "e": 0.1, "s": s, "clip": (-1.0, 1.0), "seed": 20200619}

    def steps() -> tuple[Tensor, Tensor]:  # as a sampler in PyTorch writes it
        x0 = (1.25 * x - 0.75 * m).clamp(-1, 1)
        y = 0.3 * x0 + 0.65 * x + 0.1 * m
        return (y + s * torch.randn_like(x) if s else y), x0

    with torch.no_grad():
        ours = _checks.median_ms(lambda: diffusion_step(x, m, **options), device)
        plain = _checks.median_ms(steps, device)
        monai = _monai_ddpm(x, m, device) if s else None
        copy = _checks.copy_ms(x)
    case = f"{size}³, {'with' if s else 'without'} noise, fp32"
    # A copy reads one volume and writes one, a step reads two and writes two.
    return _checks.Speed("diffusion_step", str(device), case, ours, plain, monai, "copy", 2 * copy / ours)


def _monai_ddpm(x: Tensor, m: Tensor, device: torch.device) -> float | None:
    """Returns the time of MONAI's DDPM step, or None if MONAI isn't installed."""
    try:
        from monai.networks.schedulers import DDPMScheduler
    except ImportError:
        return None
    scheduler = DDPMScheduler()
    return _checks.median_ms(lambda: scheduler.step(m, 500, x), device)


def speeds(device: torch.device) -> Iterator[_checks.Speed]:
    """Yields the speeds of a step without noise and one with it."""
    return (time_step(device, s) for s in (0.0, 0.4))


VERIFIER = _checks.Verifier(_CASES, work, speeds, "production")
