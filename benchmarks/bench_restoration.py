# SPDX-License-Identifier: Apache-2.0
"""The restoration's Swin UNETR: a training step with our layers and with MONAI's, and whole-body inference.

`python -m benchmarks.bench_restoration`: a step of `swin_unetr` as it trains (patch of 64³, loss and optimizer
included), accelerated and not, in turn; then one whole body of a clinical scanner's size at feature size 24, time and
memory above the process's start. `--large` adds 440×440×644 voxels. Weights are untrained: they cost the same.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from benchmarks.harness import machine

BODIES = {"128x128x267": (128, 128, 267), "440x440x644": (440, 440, 644)}
SPACINGS = {"128x128x267": (4.6875, 4.6875, 3.27), "440x440x644": (1.65, 1.65, 1.65)}


def training_step(features: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step, by contender."""
    from medaccel.restoration.methods import make_method
    from medaccel.restoration.methods.base import RestorationTask

    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 64, 64, 64)
    truth = torch.rand(shape, generator=generator) + 1
    batch = {
        "input": truth + 0.2 * torch.rand(shape, generator=generator),
        "target": truth + 0.1 * torch.rand(shape, generator=generator),
        "noise_free": truth,
        "denoised": truth,
        "mask": torch.ones(shape),
        "ct": torch.full(shape, torch.nan),
        "spacing": torch.full((1, 3), 4.0, dtype=torch.float64),
        "seconds": torch.tensor([60]),
        "errors": torch.ones(1, 3),
        "has_noise_free": torch.tensor([True]),
    }
    contenders = {}
    for name, accelerate in (("medaccel", True), ("MONAI", False)):
        method = make_method("swin_unetr", RestorationTask(), {"feature_size": features, "accelerate": accelerate})
        contenders[name] = (method.module(), torch.optim.AdamW(method.network.parameters(), lr=1e-4))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, (module, optimizer) in contenders.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            module.losses(batch, 0)["loss"].backward()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def whole_body(name: str, features: int, base: str) -> None:
    """Restores an ellipsoid of a patient's size; prints seconds and GiB."""
    from medaccel.restoration.methods import make_method
    from medaccel.restoration.methods.base import RestorationRequest, RestorationTask

    shape, spacing = BODIES[name], SPACINGS[name]
    axes = [(np.arange(n, dtype=np.float32) - n / 2) * s for n, s in zip(shape, spacing, strict=True)]
    body = (axes[0] / 190)[:, None, None] ** 2 + (axes[1] / 130)[None, :, None] ** 2 <= 1
    rng = np.random.default_rng(0)
    volume = np.broadcast_to(body, shape) * (1 + 0.3 * rng.random(shape, dtype=np.float32))
    method = make_method("swin_unetr", RestorationTask(), {"feature_size": features, "base": base})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    restored = method.restore(RestorationRequest(volume, spacing)).volume
    took = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert restored.shape == shape
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}, f = {features}, base {base}: {took:.0f} s, {peak:.2f} GiB above {total - peak:.2f} GiB before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="440×440×644 voxels as well")
    parser.add_argument("--body", choices=list(BODIES), help="only this body, in this process")
    parser.add_argument("--base", default="nlm")
    arguments = parser.parse_args()
    if arguments.body:
        whole_body(arguments.body, 24, arguments.base)
        return
    print(machine())
    for features in (12, 24):
        found = training_step(features, arguments.repeats)
        ratio = found["MONAI"] / found["medaccel"]
        print(f"training step, 64³, f = {features}: " + ", ".join(f"{k} {v:.2f} s" for k, v in found.items()), end="")
        print(f"; MONAI / medaccel {ratio:.2f}")
    for name in list(BODIES)[: 1 + arguments.large]:  # in a process of its own, whose peak is its own
        command = [sys.executable, "-m", "benchmarks.bench_restoration", "--body", name, "--base", arguments.base]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
