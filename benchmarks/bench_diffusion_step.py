# SPDX-License-Identifier: Apache-2.0
"""Times the diffusion step against its peers: `python -m benchmarks.bench_diffusion_step [--quick] [--allocator
warm]`.

Volumes are fp32, one at a time, on torch's threads. Each row is a ratio within one run: peer's median time /
medaccel's. diffusers is a peer if it is installed. A step returns the new sample and the predicted x0; "in place"
writes them over the sample and the network's output, as a sampling loop may.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from torch import Tensor

from benchmarks.harness import Contender, add_allocator, choose_allocator, machine, measure, rows_of, write_table
from medaccel.diffusion import VESDE, VPSDE, DDIMScheduler, DDPMScheduler, noised
from medaccel.diffusion import coefficients as c
from medaccel.ops import diffusion_step
from medaccel.ops.diffusion_step.cases import DDPM, Case

STEPS = 50


def check_parity(ours: Tensor, peer: Tensor, name: str) -> None:
    """Stops the benchmark if results differ: no speed is printed for them."""
    error = float((ours - peer).abs().max() / peer.abs().max())
    if not error <= 1e-5:
        raise SystemExit(f"{name}: differs from medaccel by {error:.2g} (expected at most 1e-5); nothing is timed")


def diffusers_scheduler(name: str) -> Any:
    """Returns diffusers' scheduler with MONAI's settings, or None if it isn't installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    import diffusers

    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, clip_sample=True)
    scheduler.set_timesteps(STEPS if name == "DDIMScheduler" else 1000)
    return scheduler


def ddpm(x: Tensor, m: Tensor) -> list[Contender]:
    ours, monai, peer, t = DDPMScheduler(), MonaiDDPM(), diffusers_scheduler("DDPMScheduler"), 500
    monai_noise = DDPMScheduler(skipped_steps="training", kernel_noise=False)
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    expected = monai.step(m, t, x, seeded())[0]
    check_parity(monai_noise.step(m, t, x, seeded())[0], expected, "MONAI")
    y, n = x.clone(), m.clone()
    contenders = [
        Contender("medaccel", lambda: ours.step(m, t, x)),
        Contender("medaccel, in place", lambda: ours.step(n, t, y, out=(y, n))),
        Contender("medaccel, torch's noise", lambda: monai_noise.step(m, t, x)),
        Contender("MONAI", lambda: monai.step(m, t, x)),
    ]
    if peer is not None:
        check_parity(peer.step(m, t, x, generator=seeded()).prev_sample, expected, "diffusers")
        contenders.append(Contender("diffusers", lambda: peer.step(m, t, x)))
    return [*contenders, Contender("torch.randn alone", lambda: torch.randn(x.shape))]


def ddim(x: Tensor, m: Tensor, eta: float) -> list[Contender]:
    ours, monai, peer = DDIMScheduler(), MonaiDDIM(), diffusers_scheduler("DDIMScheduler")
    ours.set_timesteps(STEPS)
    monai.set_timesteps(STEPS)
    t = int(ours.timesteps[20])
    faithful = DDIMScheduler(skipped_steps="training", kernel_noise=False)
    faithful.set_timesteps(STEPS)
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    expected = monai.step(m, t, x, eta=eta, generator=seeded())[0]
    check_parity(faithful.step(m, t, x, eta, seeded())[0], expected, "MONAI")
    y, n = x.clone(), m.clone()
    contenders = [
        Contender("medaccel", lambda: ours.step(m, t, x, eta)),
        Contender("medaccel, in place", lambda: ours.step(n, t, y, eta, out=(y, n))),
        Contender("MONAI", lambda: monai.step(m, t, x, eta=eta)),
    ]
    if peer is not None:
        check_parity(peer.step(m, t, x, eta=eta, generator=seeded()).prev_sample, expected, "diffusers")
        contenders.append(Contender("diffusers", lambda: peer.step(m, t, x, eta=eta)))
    source, target = torch.cat([x, m]), torch.cat([x, m])
    return [*contenders, Contender("copy_ of two volumes", lambda: target.copy_(source))]


def sde_step(x: Tensor, m: Tensor, kind: str) -> list[Contender]:
    """Takes Euler–Maruyama's step, as one writes it in PyTorch."""
    sde = VPSDE() if kind == "VP" else VESDE()
    level, to = sde.level(500), sde.level(499)
    step = c.euler_maruyama("score", level, to)
    ratio = level.alpha / to.alpha
    variance = level.sigma**2 - (ratio * to.sigma) ** 2

    def plain(z: Tensor | None = None) -> Tensor:
        z = torch.randn_like(x) if z is None else z
        return (2 - ratio) * x + variance * m + math.sqrt(variance) * z

    z, y = torch.randn_like(x), x.clone()
    check_parity(diffusion_step(x, m, noise=z, out=(y, None), **step)[0], plain(z), "PyTorch")
    y = x.clone()
    return [
        Contender("medaccel, in place", lambda: diffusion_step(y, m, out=(y, None), **step)),
        Contender("medaccel", lambda: diffusion_step(x, m, **step)),
        Contender("PyTorch", plain),
    ]


def add_noise(x: Tensor, m: Tensor) -> list[Contender]:
    monai, ours, t = MonaiDDPM(), DDPMScheduler(), torch.tensor([500])
    check_parity(ours.add_noise(x, m, t), monai.add_noise(x, m, t), "MONAI")
    return [
        Contender("medaccel", lambda: ours.add_noise(x, None, t)),
        Contender("medaccel, op alone", lambda: noised(x, 0.6, 0.8)),
        Contender("MONAI", lambda: monai.add_noise(x, torch.randn_like(x), t)),
    ]


def main() -> None:
    """Measures, prints, and writes the table if an output is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one second a row")
    parser.add_argument("--size", type=int, default=128, help="of the volume's edge")
    parser.add_argument("--output", type=Path, help="write the rows to this CSV file")
    add_allocator(parser)
    arguments = parser.parse_args()
    choose_allocator(arguments.allocator)
    print(", ".join(f"{k} {v}" for k, v in machine().items()), f"{arguments.allocator} allocator", sep=", ")
    print("time: median; ×: that over medaccel's; memory: peak above the start, outputs included")
    x, m = Case("", (1, 1, *[arguments.size] * 3), DDPM).tensors().values()
    works: dict[str, Callable[[], list[Contender]]] = {
        "DDPM step": lambda: ddpm(x, m),
        "DDIM step, η = 0": lambda: ddim(x, m, 0.0),
        "DDIM step, η = 1": lambda: ddim(x, m, 1.0),
        "VP step": lambda: sde_step(x, m, "VP"),
        "VE step": lambda: sde_step(x, m, "VE"),
        "add_noise": lambda: add_noise(x, m),
    }
    rows: list[dict[str, object]] = []
    for work, make in works.items():
        contenders = make()
        measure(contenders, seconds=1.0 if arguments.quick else 4.0)
        rows += rows_of(f"{work}, {arguments.size}³", contenders)
    if arguments.output:
        write_table(arguments.output, rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
