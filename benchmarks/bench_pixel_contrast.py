# SPDX-License-Identifier: Apache-2.0
"""Times the pixel-level contrastive loss, forward and backward, against plain PyTorch, and measures the gain of
culling.

Plain PyTorch is the best code with whole matrices: one product, a masked log-sum-exp, positives found once and not
timed. Beyond ``--plain-up-to`` pixels per side it isn't run: its matrices no longer fit.

    python -m benchmarks.bench_pixel_contrast --output results/pixel_contrast.csv --plot results/pixel_contrast.png
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contender, machine, measure, peak_extra_bytes, warm_allocator, write_table
from medaccel.ops import pixel_contrastive_loss
from medaccel.ops.pixel_contrast import native, reference
from medaccel.ops.pixel_contrast.cases import Views

CHANNELS, TEMPERATURE, RADIUS = 64, 0.3, 1.0


class Work:
    """Holds two views of `batch` volumes with size³ pixels each, and the ways to compute their loss and its
    gradients."""

    def __init__(self, size: int, batch: int, plain: bool):
        self.name = f"{batch} × {size}³ pixels, C = {CHANNELS}"
        self.pixels, self.batch = size**3, batch
        case = Views("", (size,) * 3, CHANNELS, batch=batch, shift=0.3)
        query, key, at_query, at_key, _ = case.tensors()
        self.features = (query.requires_grad_(), key.requires_grad_())
        self.coords, self.radius = (at_query, at_key), torch.full((batch,), RADIUS)
        self.positive = reference.near(at_query, at_key, self.radius) if plain else None

    def medaccel(self) -> tuple[Tensor, ...]:
        loss = pixel_contrastive_loss(*self.features, *self.coords, radius=RADIUS, temperature=TEMPERATURE)
        return loss.detach(), *torch.autograd.grad(loss, self.features)

    def plain(self) -> tuple[Tensor, ...]:
        query, key = self.features
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(1, 2) / TEMPERATURE
        assert self.positive is not None
        of_positives = scores.masked_fill(~self.positive, -torch.inf).logsumexp(dim=-1)
        loss = (scores.logsumexp(dim=-1) - of_positives).mean()  # every pixel has a positive here
        return loss.detach(), *torch.autograd.grad(loss, self.features)

    @property
    def operations(self) -> float:
        """Counts the operations of one product forward and three backward."""
        return 4 * 2 * self.batch * self.pixels**2 * CHANNELS

    def contenders(self) -> list[Contender]:
        both = [Contender("medaccel", self.medaccel)]
        if self.positive is not None:
            for ours, plain in zip(self.medaccel(), self.plain(), strict=True):
                error = float((ours - plain).abs().max() / plain.abs().max())
                if not error <= 1e-4:
                    raise SystemExit(f"{self.name}: differs from plain PyTorch by {error:.2g}; nothing is timed")
            both.append(Contender("PyTorch", self.plain))
        return both


def product_rate() -> float:
    """Measures the operations per second of torch's own matrix product, the best of several."""
    a = torch.rand(1536, 1536)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 1536**3 / best


def rows_of(work: Work, contenders: list[Contender]) -> list[dict[str, object]]:
    ours, rows, rate = contenders[0], [], product_rate()
    for c in contenders:
        c.extra_bytes = peak_extra_bytes(c.call)
        share = work.operations / min(c.times) / rate
        rows.append(
            {
                "work": work.name,
                "pixels": work.pixels,
                "batch": work.batch,
                "contender": c.name,
                "best_ms": round(1e3 * min(c.times), 1),
                "median_ms": round(1e3 * c.median, 1),
                "times_medaccel": round(c.median / ours.median, 2),
                "share_of_sgemm": round(share, 3),
                "extra_memory_mib": round(c.extra_bytes / 2**20, 1),
            }
        )
        print(
            f"{work.name:<28}{c.name:<10}{1e3 * c.median:>10.1f} ms (best {1e3 * min(c.times):.1f})"
            f"{c.median / ours.median:>8.2f}×{100 * share:>7.0f}% of sgemm{c.extra_bytes / 2**20:>9.1f} MiB",
            flush=True,
        )
    return rows


def time_positives(size: int) -> None:
    """Measures the seconds that the positives take in a forward and a backward pass, with culling and without."""
    case = Views("", (size,) * 3, CHANNELS, batch=1, shift=0.3)
    query, key, at_query, at_key, _ = case.tensors()
    radius = torch.tensor([RADIUS])

    def forward(cull: bool) -> Callable[[], object]:
        return functools.partial(
            native.pixel_contrast_forward, query, key, at_query, at_key, radius, TEMPERATURE, cull=cull
        )

    both = [Contender("blocks too far apart skipped", forward(True)), Contender("all distances", forward(False))]
    measure(both, seconds=2.0, least=3)
    culled, plain = (min(c.times) for c in both)
    print(f"{size}³ pixels, forward: {1e3 * culled:.1f} ms; {1e3 * plain:.1f} ms without culling")


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Draws time and memory of one sample over its pixels, on logarithmic axes with the slopes 2 and 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, marker in (("medaccel", "o"), ("PyTorch", "s")):
        points = [r for r in rows if r["contender"] == name and r["batch"] == 1]
        pixels = [float(str(r["pixels"])) for r in points]
        left.loglog(pixels, [float(str(r["best_ms"])) / 1e3 for r in points], marker + "-", label=name)
        right.loglog(pixels, [float(str(r["extra_memory_mib"])) for r in points], marker + "-", label=name)
        if name == "medaccel":
            seconds, mib = (float(str(points[-1][k])) for k in ("best_ms", "extra_memory_mib"))
            left.loglog(pixels, [seconds / 1e3 * (n / pixels[-1]) ** 2 for n in pixels], "k:", label="∝ N²")
            right.loglog(pixels, [mib * n / pixels[-1] for n in pixels], "k:", label="∝ N")
    left.set(xlabel="pixels N of a view", ylabel="forward + backward, s")
    right.set(xlabel="pixels N of a view", ylabel="extra memory, MiB")
    left.legend(), right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints, and writes the table and the plot if outputs are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 16³ only")
    parser.add_argument("--allocator", choices=("default", "warm"), default="default", help="see harness.py")
    parser.add_argument("--output", type=Path, help="write the rows to this CSV file")
    parser.add_argument("--plot", type=Path, help="draw the growth from 12³ to 48³ into this file")
    parser.add_argument("--plain-up-to", type=int, default=24, help="largest map for plain PyTorch, pixels a side")
    arguments = parser.parse_args()
    if arguments.allocator == "warm" and not warm_allocator():
        parser.error("--allocator warm needs glibc")
    print(", ".join(f"{k} {v}" for k, v in machine().items()), f"{arguments.allocator} allocator", sep=", ")
    print("forward + backward; ×: median time over medaccel's; memory: peak above the start, results included")
    sizes = [(16, 2)] if arguments.quick else [(16, 2), (24, 2), *((n, 1) for n in (12, 16, 20, 24, 32, 48))]
    rows: list[dict[str, object]] = []
    for size, batch in sizes:
        work = Work(size, batch, plain=size <= arguments.plain_up_to)
        contenders = work.contenders()
        measure(contenders, seconds=2.0, least=3 if size < 24 else 2)
        rows += rows_of(work, contenders)
    time_positives(16)
    if not arguments.quick:
        time_positives(24)
    if arguments.output:
        write_table(arguments.output, rows)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
