# SPDX-License-Identifier: Apache-2.0
"""Times the Gaussian filter against its peers: `python -m benchmarks.bench_gaussian [--quick] [--allocator warm]`.

Volumes are fp32, one at a time, on torch's threads. Each row is a ratio within one run: peer's median time /
medaccel's.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.ndimage
import SimpleITK
import torch
from monai.networks.layers import GaussianFilter as MonaiGaussianFilter
from torch import Tensor

from benchmarks.harness import (
    Contender,
    add_allocator,
    choose_allocator,
    machine,
    measure,
    peak_extra_bytes,
    write_table,
)
from medaccel.layers import GaussianFilter
from medaccel.ops import gaussian_filter
from medaccel.ops.gaussian.cases import Case


def check_parity(ours: Tensor, peer: np.ndarray, name: str, bound: float) -> None:
    """Stops the benchmark if results differ: no speed is printed for them."""
    interior = (slice(24, -24),) * 3
    a, b = ours[0, 0].numpy()[interior], np.asarray(peer)[interior]
    error = float(np.abs(a - b).max() / np.abs(b).max())
    if not error <= bound:
        raise SystemExit(f"{name}: differs from medaccel by {error:.2g} (expected at most {bound}); nothing is timed")


def volume(size: int, seed: int = 0) -> Tensor:
    """Uniform numbers from 0 to 1: an image's are not negative."""
    return torch.special.ndtr(Case("", (1, 1, size, size, size), ()).input(seed=seed))


def forward_contenders(size: int, sigma: float) -> list[Contender]:
    x = volume(size)
    array = x[0, 0].numpy()
    image = SimpleITK.GetImageFromArray(array)
    monai = MonaiGaussianFilter(3, sigma)
    recursive = SimpleITK.SmoothingRecursiveGaussianImageFilter()
    recursive.SetSigma(sigma)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())
    ours = gaussian_filter(x, sigma)
    check_parity(ours, monai(x)[0, 0].numpy(), "MONAI", 1e-5)
    scipys = gaussian_filter(x, sigma, approx="sampled", normalize=True, mode="reflect")
    check_parity(scipys, scipy.ndimage.gaussian_filter(array, sigma), "scipy", 1e-5)
    # A recursive filter only approximates a Gaussian, and white noise shows that the most.
    check_parity(ours, SimpleITK.GetArrayFromImage(recursive.Execute(image)), "SimpleITK", 0.1)
    return [
        Contender("medaccel", lambda: gaussian_filter(x, sigma)),
        Contender("MONAI", lambda: monai(x)),
        Contender("scipy.ndimage", lambda: scipy.ndimage.gaussian_filter(array, sigma)),
        Contender("SimpleITK recursive", lambda: recursive.Execute(image)),
        Contender("x.clone()", x.clone),
    ]


def training_contenders(size: int, sigma: float) -> list[Contender]:
    x, grad = volume(size).requires_grad_(), volume(size, seed=1)

    def step(layer: torch.nn.Module) -> Callable[[], object]:
        def run() -> object:
            return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

        return run

    layers = [cls(3, sigma, requires_grad=True) for cls in (GaussianFilter, MonaiGaussianFilter)]
    for ours, peer in zip(step(layers[0])(), step(layers[1])(), strict=True):
        if not torch.allclose(ours, peer, rtol=1e-3, atol=1e-4 * float(peer.abs().max())):
            raise SystemExit("the gradients differ from MONAI's; nothing is timed")
    return [Contender("medaccel", step(layers[0])), Contender("MONAI", step(layers[1]))]


def overhead() -> Contender:
    x = torch.rand(1, 1, 8, 8, 8)
    calls = 200

    def many() -> None:
        for _ in range(calls):
            gaussian_filter(x, 2.0)

    contender = Contender("medaccel", many)
    measure([contender], seconds=2.0)
    contender.times = [t / calls for t in contender.times]
    return contender


def rows_of(work: str, contenders: list[Contender], output_bytes: int) -> list[dict[str, object]]:
    ours = contenders[0].median
    rows = []
    for c in contenders:
        c.extra_bytes = peak_extra_bytes(c.call)
        rows.append(
            {
                "work": work,
                "contender": c.name,
                "p20_ms": round(1e3 * c.quantile(0.2), 3),
                "median_ms": round(1e3 * c.median, 3),
                "p80_ms": round(1e3 * c.quantile(0.8), 3),
                "times_medaccel": round(c.median / ours, 2),
                "extra_memory_outputs": round(c.extra_bytes / output_bytes, 2),
            }
        )
        print(
            f"{work:<34}{c.name:<22}{1e3 * c.median:>10.2f} ms{c.median / ours:>9.2f}×"
            f"{c.extra_bytes / output_bytes:>8.2f} outputs"
        )
    return rows


def main() -> None:
    """Measures, prints, and writes the table if an output is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="128³ only, one second a row")
    parser.add_argument("--output", type=Path, help="write the rows to this CSV file")
    add_allocator(parser)
    arguments = parser.parse_args()
    seconds = 1.0 if arguments.quick else 4.0
    choose_allocator(arguments.allocator)
    print(", ".join(f"{k} {v}" for k, v in machine().items()), f"{arguments.allocator} allocator", sep=", ")
    print("time: median; ×: that time over medaccel's; memory: peak above the start, in outputs, the output included")
    rows: list[dict[str, object]] = []
    for size in (128,) if arguments.quick else (128, 256):
        for sigma in (1.0, 2.0, 4.0):
            contenders = forward_contenders(size, sigma)
            measure(contenders, seconds=seconds)
            rows += rows_of(f"forward, {size}³, σ = {sigma:g}", contenders, 4 * size**3)
    contenders = training_contenders(128, 2.0)
    measure(contenders, seconds=seconds)
    rows += rows_of("forward + backward to x and σ, 128³", contenders, 4 * 128**3)
    call = overhead()
    print(f"one call on 8³, no gradient: {1e6 * call.median:.1f} µs")
    if arguments.output:
        write_table(arguments.output, rows)


if __name__ == "__main__":
    main()
