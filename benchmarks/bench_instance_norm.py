# SPDX-License-Identifier: Apache-2.0
"""Times instance norm + residual + leaky ReLU against torch's: `python -m benchmarks.bench_instance_norm [--quick]
[--allocator warm]`.

The maps are those of a Swin UNETR's decoder at 96³ with feature size 24, fp32, contiguous and channels last, on
torch's threads. Each row is a ratio within one run: peer's median time / medaccel's. "copy" is the time for reading
and writing the map once: no norm can be faster.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contender, command
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


def checked(shape: tuple[int, ...], channels_last: bool, training: bool) -> list[Contender]:
    """Makes a map and its contenders, which must agree."""
    work = Work(shape, channels_last)
    work.check_parity()
    return work.contenders(training)


def main() -> None:
    """Measures, prints, and writes the table if an output is given."""
    works = {
        f"{shape[2]}³, C = {shape[1]}, {'channels last' if last else 'contiguous'}, "
        f"{'forward + backward' if training else 'forward'}": functools.partial(checked, shape, last, training)
        for shape in SHAPES
        for last in (False, True)
        for training in (False, True)
    }
    command(__doc__, works, quick=4)  # the first map in both layouts


if __name__ == "__main__":
    main()
