# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of the pixel contrast in a pretraining step: forward, backward, and its share of the whole.

A step passes both views of one volume through the backbone up to stride 4, and computes instance and pixel contrast
and all gradients; at ROI 96³ the pixel contrast sees 24³ pixels per view, in both directions. Its part is timed
alone, from the projected features of both views and their geometry to the gradients of these. The optimizer is left
out; it would make the share smaller.

    python -m benchmarks.bench_pretraining --output results/pretraining.csv
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Contender, machine, measure, peak_extra_bytes, warm_allocator, write_table
from medaccel.pretraining.fit import PretrainingFit, settings_of
from medaccel.pretraining.levels import STRIDES
from medaccel.pretraining.network import PretrainingNet
from medaccel.pretraining.tasks import make_tasks
from medaccel.pretraining.tasks.pixels import PixelContrast

TARGET = 0.15
WEIGHTS = {"instance": 1.0, "pixel": 1.0}


class Work:
    """Holds a pretraining step of `batch` pairs of views, and the pixel contrast in it."""

    def __init__(self, feature_size: int, size: int, dimensions: int, batch: int = 1) -> None:
        torch.manual_seed(0)
        roi = (size, size, size)
        tasks = make_tasks(list(WEIGHTS), {"pixel": {"dimensions": dimensions}}, roi)
        self.net = PretrainingNet(tasks, feature_size=feature_size)
        self.fit = PretrainingFit(self.net, tasks, WEIGHTS, settings_of({}))
        task = next(task for task in tasks if isinstance(task, PixelContrast))
        self.loss, pixels = task.loss, size // STRIDES[task.level]
        self.name = f"f = {feature_size}, ROI {size}³, {pixels}³ pixels, C = {dimensions}, {batch} pair(s)"
        affine = torch.diag(torch.tensor([1.5, 1.5, 2.0, 1.0], dtype=torch.float64)).repeat(batch, 1, 1)
        moved = affine.clone()
        moved[:, :3, 3] = torch.tensor([10.0, -7.0, 5.0], dtype=torch.float64)  # mm
        self.batch = {
            "view1": torch.rand(batch, 1, *roi),
            "view2": torch.rand(batch, 1, *roi),
            "affine1": affine,
            "affine2": moved,
        }
        shape = (batch, dimensions, pixels, pixels, pixels)
        self.features = [torch.randn(shape).requires_grad_() for _ in range(2)]
        self.affines = task.affines(self.batch, self.features[0])

    def step(self) -> Tensor:
        """Computes losses and all gradients."""
        self.net.zero_grad(set_to_none=True)
        loss = self.fit.losses(self.batch, 0)["loss"]
        loss.backward()
        return loss.detach()

    def pixel_contrast(self) -> tuple[Tensor, ...]:
        """Computes the loss of both directions, and the features' gradients."""
        loss = self.loss(*self.features, *self.affines)
        return loss.detach(), *torch.autograd.grad(loss, self.features)


def rows_of(work: Work, contenders: list[Contender]) -> list[dict[str, object]]:
    step, rows = contenders[0], []
    for c in contenders:
        share = c.median / step.median
        c.extra_bytes = peak_extra_bytes(c.call)
        rows.append(
            {
                "work": work.name,
                "part": c.name,
                "p20_ms": round(1e3 * c.quantile(0.2), 1),
                "median_ms": round(1e3 * c.median, 1),
                "p80_ms": round(1e3 * c.quantile(0.8), 1),
                "share_of_step": round(share, 4),
                "extra_memory_mib": round(c.extra_bytes / 2**20, 1),
            }
        )
        print(
            f"{work.name:<52}{c.name:<16}{1e3 * c.median:>10.1f} ms{100 * share:>7.1f} %"
            f"{c.extra_bytes / 2**20:>9.1f} MiB",
            flush=True,
        )
    verdict = "within" if contenders[1].median <= TARGET * step.median else "above"
    print(f"{work.name}: the pixel contrast is {verdict} {TARGET:.0%} of the step", flush=True)
    return rows


def main() -> None:
    """Measures, prints, and writes the table if an output is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ROI 64³, f = 12 only")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[32, 64], help="channels that are compared")
    parser.add_argument("--rounds", type=int, default=3, help="least number of steps that are timed")
    parser.add_argument("--allocator", choices=("default", "warm"), default="default", help="see harness.py")
    parser.add_argument("--output", type=Path, help="write the rows to this CSV file")
    arguments = parser.parse_args()
    if arguments.allocator == "warm" and not warm_allocator():
        parser.error("--allocator warm needs glibc")
    print(", ".join(f"{k} {v}" for k, v in machine().items()), f"{arguments.allocator} allocator", sep=", ")
    print("forward + backward; %: of the whole step; memory: peak above the start")
    rows: list[dict[str, object]] = []
    for feature_size, size in [(12, 64)] if arguments.quick else [(24, 96), (48, 96)]:
        for dimensions in arguments.dimensions:
            work = Work(feature_size, size, dimensions)
            contenders = [
                Contender("whole step", work.step),
                Contender("pixel contrast", work.pixel_contrast),
            ]
            measure(contenders, seconds=1.0, least=arguments.rounds)
            rows += rows_of(work, contenders)
    if arguments.output:
        write_table(arguments.output, rows)


if __name__ == "__main__":
    main()
