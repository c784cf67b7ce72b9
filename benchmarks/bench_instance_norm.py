# SPDX-License-Identifier: Apache-2.0
"""Times instance norm + residual + leaky ReLU against torch's: `python -m benchmarks.bench_instance_norm [--quick]
[--allocator warm]`.

The maps are those of a Swin UNETR's decoder at 96³ with feature size 24, fp32, contiguous and channels last, on
torch's threads. Each row is a ratio within one run: peer's median time / medaccel's. "copy" is the time for reading
and writing the map once: no norm can be faster.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contender, add_allocator, choose_allocator, machine, measure, rows_of, write_table
from medaccel.ops import instance_norm_act
from medaccel.ops.instance_norm.cases import Case

SHAPES = [(1, 24, 96, 96, 96), (1, 24, 48, 48, 48), (1, 48, 24, 24, 24), (1, 96, 12, 12, 12), (1, 384, 6, 6, 6)]


class Work:
    """Holds one map in one memory layout, and the ways to normalise it."""

    def __init__(self, shape: tuple[int, ...], channels_last: bool):
        view = "last" if channels_last else ""
        self.x, _, _, residual, self.grad = Case("", shape, view, view, residual=True).tensors()
        assert residual is not None
        self.residual = residual
        self.compiled = torch.compile(self.torchs)

    def medaccel(self) -> Tensor:
        return instance_norm_act(self.x, residual=self.residual, negative_slope=0.01)

    def torchs(self) -> Tensor:
        return F.leaky_relu_(F.instance_norm(self.x).add_(self.residual), 0.01)

    def check_parity(self) -> None:
        """Stops the benchmark if results differ: no speed is printed for them."""
        with torch.no_grad():
            error = float((self.medaccel() - self.torchs()).abs().max())
        if not error <= 1e-4:
            raise SystemExit(f"torch's norm differs from medaccel by {error:.2g}; nothing is timed")

    def contenders(self, training: bool) -> list[Contender]:
        def call(norm: Callable[[], Tensor]) -> Callable[[], object]:
            if not training:
                return torch.no_grad()(norm)

            def step() -> object:
                self.x.requires_grad_(), self.residual.requires_grad_()
                return torch.autograd.grad(norm(), (self.x, self.residual), self.grad)

            return step

        names = {"medaccel": self.medaccel, "torch eager": self.torchs, "torch.compile": self.compiled}
        rows = [Contender(name, call(norm)) for name, norm in names.items()]
        return rows if training else [*rows, Contender("copy", torch.no_grad()(self.x.clone))]


def main() -> None:
    """Measures, prints, and writes the table if an output is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first map only, one second a row")
    add_allocator(parser)
    parser.add_argument("--output", type=Path, help="write the rows to this CSV file")
    arguments = parser.parse_args()
    choose_allocator(arguments.allocator)
    print(", ".join(f"{k} {v}" for k, v in machine().items()), f"{arguments.allocator} allocator", sep=", ")
    print("time: median; ×: that time over medaccel's; memory: peak above the start, results included")
    rows: list[dict[str, object]] = []
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        for channels_last in (False, True):
            for training in (False, True):
                work = Work(shape, channels_last)
                work.check_parity()
                contenders = work.contenders(training)
                measure(contenders, seconds=1.0 if arguments.quick else 3.0, least=3)
                kind = "forward + backward" if training else "forward"
                layout = "channels last" if channels_last else "contiguous"
                rows += rows_of(f"{shape[2]}³, C = {shape[1]}, {layout}, {kind}", contenders)
    if arguments.output:
        write_table(arguments.output, rows)


if __name__ == "__main__":
    main()
