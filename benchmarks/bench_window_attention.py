# SPDX-License-Identifier: Apache-2.0
"""Times shifted-window attention against its peers: `python -m benchmarks.bench_window_attention [--quick]
[--allocator warm]`.

The maps are those of each stage of a Swin UNETR at 96³, fp32, on torch's threads. Only the core is timed: from qkv to
the input of the output projection. MONAI's and SDPA's start from windows that are cut already, which leaves their
rolling, padding and partition out; medaccel's works on the map. Each row is a ratio within one run: peer's median
time / medaccel's.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import compute_mask
from torch import Tensor

from benchmarks.harness import Contender, add_allocator, choose_allocator, machine, measure, rows_of, write_table
from medaccel.ops import shifted_window_attention
from medaccel.ops.window_attention import reference
from medaccel.ops.window_attention.cases import Case


@dataclass(frozen=True)
class Stage:
    """Describes one stage's map: its size, channels and heads."""

    size: int
    channels: int
    heads: int
    shifted: bool = True

    @property
    def case(self) -> Case:
        window = min(7, self.size)
        shift = 3 if self.shifted and self.size > 7 else 0
        head_dim = self.channels // self.heads
        return Case("", (self.size,) * 3, (window,) * 3, (shift,) * 3, self.heads, head_dim, full_window=(7, 7, 7))

    def __str__(self) -> str:
        shift = "shifted" if self.case.shift[0] else "not shifted"
        return f"{self.size}³, C = {self.channels}, {self.heads} heads, {shift}"


STAGES = [
    Stage(48, 24, 3),
    Stage(48, 24, 3, shifted=False),
    Stage(48, 12, 3),
    Stage(48, 48, 3),
    Stage(24, 48, 6),
    Stage(12, 96, 12),
    Stage(6, 192, 24),
]


class Work:
    """Holds one stage's tensors and the three ways to attend."""

    def __init__(self, stage: Stage):
        self.case = case = stage.case
        qkv, table, index, pad = case.tensors()
        assert pad is not None
        self.qkv, self.pad = qkv.requires_grad_(), pad.requires_grad_()
        self.table, self.index = table.requires_grad_(), index
        self.padded = [math.ceil(s / w) * w for s, w in zip(case.sizes, case.window, strict=True)]
        self.tokens = math.prod(case.window)
        with torch.no_grad():
            after = [n for s, p in zip(reversed(case.sizes), reversed(self.padded), strict=True) for n in (0, p - s)]
            inside = F.pad(torch.ones(case.sizes, dtype=torch.bool), after)[..., None]
            full = torch.where(inside, F.pad(qkv, [0, 0, *after]), pad)
            rolled = torch.roll(full, [-s for s in case.shift], (1, 2, 3))
            self.windows = reference.partition(rolled, case.window)[0].contiguous()
        self.windows.requires_grad_()
        self.mask = compute_mask(self.padded, case.window, case.shift, "cpu") if any(case.shift) else None
        self.ready_bias = self.bias_and_mask().detach().expand(len(self.windows), -1, -1, -1).contiguous()
        self.grad = torch.randn(*qkv.shape[:-1], qkv.shape[-1] // 3)
        self.window_grad = torch.randn(*self.windows.shape[:-1], qkv.shape[-1] // 3)

    def bias(self) -> Tensor:
        return self.table[self.index.reshape(-1)].reshape(self.tokens, self.tokens, -1).permute(2, 0, 1).contiguous()

    def bias_and_mask(self) -> Tensor:
        bias = self.bias()[None]
        return bias if self.mask is None else bias + self.mask[:, None]

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        count, n, _ = self.windows.shape
        qkv = self.windows.reshape(count, n, 3, self.case.heads, self.case.head_dim).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1], qkv[2]

    def medaccel(self) -> Tensor:
        return shifted_window_attention(self.qkv, self.table, self.index, pad_qkv=self.pad, **self.case.options())

    def monai(self) -> Tensor:
        """Computes `WindowAttention.forward` of MONAI 1.6.1, without its two linear layers."""
        q, k, v = self.heads()
        attn = (q * self.case.head_dim**-0.5) @ k.transpose(-2, -1)
        attn = attn + self.bias().unsqueeze(0)
        if self.mask is not None:
            attn = (attn.unsqueeze(0) + self.mask.unsqueeze(1).unsqueeze(0)).squeeze(0)
        return (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(self.window_grad.shape)

    def sdpa(self, mask: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(), attn_mask=mask)
        return y.transpose(1, 2).reshape(self.window_grad.shape)

    def sdpa_from_table(self) -> Tensor:
        mask = self.bias_and_mask()
        return self.sdpa(mask.expand(len(self.windows), -1, -1, -1))

    def check_parity(self) -> None:
        """Stops the benchmark if results differ: no speed is printed for them."""
        with torch.no_grad():
            y = self.medaccel()
            peers = {"MONAI": self.monai(), "SDPA": self.sdpa(self.ready_bias)}
        for name, windows in peers.items():
            rolled = reference.unpartition(windows[None], self.padded, self.case.window)
            full = torch.roll(rolled, self.case.shift, (1, 2, 3))
            error = float((full[:, : y.shape[1], : y.shape[2], : y.shape[3]] - y).abs().max())
            if not error <= 1e-4:
                raise SystemExit(f"{name}: differs from medaccel by {error:.2g}; nothing is timed")

    def forward(self) -> list[Contender]:
        def quiet(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
            return torch.no_grad()(call)

        return [
            Contender("medaccel", quiet(self.medaccel)),
            Contender("MONAI", quiet(self.monai)),
            Contender("SDPA, bias ready", quiet(lambda: self.sdpa(self.ready_bias))),
        ]

    def training(self) -> list[Contender]:
        def step(call: Callable[[], Tensor], wanted: list[Tensor], grad: Tensor) -> Callable[[], object]:
            return lambda: torch.autograd.grad(call(), wanted, grad, allow_unused=True)

        return [
            Contender("medaccel", step(self.medaccel, [self.qkv, self.table, self.pad], self.grad)),
            Contender("MONAI", step(self.monai, [self.windows, self.table], self.window_grad)),
            Contender("SDPA", step(self.sdpa_from_table, [self.windows, self.table], self.window_grad)),
        ]


def main() -> None:
    """Measures, prints, and writes the table if an output is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first stage only, one second a row")
    add_allocator(parser)
    parser.add_argument("--output", type=Path, help="write the rows to this CSV file")
    arguments = parser.parse_args()
    seconds = 1.0 if arguments.quick else 4.0
    choose_allocator(arguments.allocator)
    print(", ".join(f"{k} {v}" for k, v in machine().items()), f"{arguments.allocator} allocator", sep=", ")
    print("time: median; ×: that time over medaccel's; memory: peak above the start, results included")
    rows: list[dict[str, object]] = []
    for stage in STAGES[:1] if arguments.quick else STAGES:
        work = Work(stage)
        work.check_parity()
        for kind, contenders in (("forward", work.forward()), ("forward + backward", work.training())):
            measure(contenders, seconds=seconds, least=3)
            rows += rows_of(f"{stage}, {kind}", contenders)
    if arguments.output:
        write_table(arguments.output, rows)


if __name__ == "__main__":
    main()
