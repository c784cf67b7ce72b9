# SPDX-License-Identifier: Apache-2.0
"""The gates on what the Triton kernels' machine code may need: one table, which docs/gpu.md quotes.

`python -m tests.gpu_gates` prints what the kernels of every call need beside their gates.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.triton_interpretation.launches import Compiled, compile_calls

ARCHS = (80, 90, 100)

# Training steps at 96³, as users launch them, and calls with the other head dimensions, precisions and dropout.
NETWORKS = [f"swin_unetr {f} {dtype}" for f in (48, 24) for dtype in ("bfloat16", "float32")]
QUICK = NETWORKS[:1]
OTHERS = [
    *(f"attention {d} {dtype}" for d in (32, 64) for dtype in ("bfloat16", "float32")),
    *(f"attention {d} float32 {precision}" for d in (16, 32, 64) for precision in ("high", "medium")),
    "attention 16 bfloat16 dropout",
    "attention 64 float16 dropout",
    "attention 16 float32 dropout",
]
CONTRASTS = [
    *(f"pixel_contrast {c} bfloat16" for c in (32, 64, 128, 256)),
    *(f"pixel_contrast {c} float32" for c in (32, 64, 128, 256)),
    *(f"pixel_contrast {c} float32 {precision}" for c in (32, 64, 128, 256) for precision in ("high", "medium")),
    "pixel_contrast 37 bfloat16",
    *(f"pixel_contrast 64 {dtype} coordinates64" for dtype in ("bfloat16", "float32")),
]


# What the suite compiles: every call, gated ones and the networks' on several architectures, others on one in turn.
# `python -m tests.gpu_gates` compiles every call for every architecture, which takes seven minutes.
SELECTED = {
    80: [NETWORKS[0], *OTHERS[0::3], *CONTRASTS[0::3]],
    90: [*NETWORKS[1:], "attention 16 float32 high", *OTHERS[1::3], "pixel_contrast 64 bfloat16", *CONTRASTS[2::3]],
    100: [NETWORKS[0], *OTHERS[2::3], *CONTRASTS[1::3]],
}


@dataclass(frozen=True)
class Gate:
    """Limits what a kernel's launches may need.

    Attributes:
        call: the call that launches it.
        kernel: its name.
        shifted: whether windows are shifted; None: the kernel has no such variants.
        instructions: thread-instructions per score (pair of tokens or of pixels) in the sm_90 code.
        blocks: at least so many fit on an sm_90 multiprocessor.
        exponentials: number of exponentials of each score.
    """

    call: str
    kernel: str
    shifted: bool | None
    instructions: float
    blocks: int
    exponentials: int = 1

    def holds_for(self, c: Compiled) -> bool:
        """Tells whether the gate is on this kernel."""
        same = c.arch == 90 and (c.call, c.kernel) == (self.call, self.kernel)
        return same and (self.shifted is None or c.constants["SHIFTED"] == self.shifted)


_BF16, _FP32, _CONTRAST = "swin_unetr 48 bfloat16", "swin_unetr 48 float32", "pixel_contrast 64 bfloat16"
GATES = (
    Gate(_BF16, "forward_kernel", True, 12.5, 4),
    Gate(_BF16, "query_kernel", True, 11, 4),
    Gate(_BF16, "key_kernel", True, 12, 2),
    Gate(_BF16, "bias_kernel", True, 13, 2),
    Gate(_BF16, "forward_kernel", False, 11.5, 4),
    Gate(_BF16, "query_kernel", False, 10, 4),
    Gate(_BF16, "key_kernel", False, 11.5, 2),
    Gate(_BF16, "bias_kernel", False, 12, 2),
    Gate(_FP32, "forward_kernel", True, 75, 2),
    Gate(_FP32, "query_kernel", True, 82, 2),
    Gate(_FP32, "key_kernel", True, 105, 2),
    Gate(_FP32, "bias_kernel", True, 70, 2),
    Gate("attention 16 float32 high", "forward_kernel", True, 35, 2),
    Gate("attention 16 float32 high", "query_kernel", True, 37, 2),
    Gate("attention 16 float32 high", "key_kernel", True, 51, 2),
    Gate("attention 16 float32 high", "bias_kernel", True, 35, 2),
    Gate(_CONTRAST, "forward_kernel", None, 48, 1, 2),
    Gate(_CONTRAST, "query_kernel", None, 45, 1, 2),
    Gate(_CONTRAST, "key_kernel", None, 47, 1, 2),
)

# On every architecture: no register is spilled, and the shared memory of a block fits; sm_86 and consumer GPUs run
# sm_80's tiles in 99 KiB.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def problems(kernels: Iterable[Compiled]) -> list[str]:
    """Says in a sentence each what kernels need beyond their gates."""
    found = []
    for c in kernels:
        if c.code.local_accesses:
            found.append(f"{c}: {c.code.local_accesses} instructions access local memory (allowed 0)")
        if c.code.atomics:
            found.append(f"{c}: {c.code.atomics} atomic instructions (allowed 0)")
        if c.shared > SHARED_MEMORY[c.arch]:
            found.append(f"{c}: {c.shared} bytes of shared memory (allowed {SHARED_MEMORY[c.arch]})")
        if c.occupancy.blocks < 1:
            found.append(f"{c}: no block fits on a multiprocessor: {c.code.registers} registers")
        for gate in GATES:
            if gate.holds_for(c):
                count = c.instructions_per_score(gate.exponentials)
                if count > gate.instructions:
                    found.append(f"{c}: {count:.1f} instructions per score (allowed {gate.instructions:g})")
                if c.occupancy.blocks < gate.blocks:
                    found.append(f"{c}: {c.occupancy.blocks} blocks fit on a multiprocessor (at least {gate.blocks})")
    return found


def table() -> str:
    """Returns the gates in Markdown."""
    lines = [
        "| call | kernel | shifted | instructions a score, at most | blocks an SM, at least |",
        "|---|---|---|---|---|",
    ]
    for g in GATES:
        shifted = "" if g.shifted is None else "yes" if g.shifted else "no"
        lines.append(f"| `{g.call}` | `{g.kernel}` | {shifted} | {g.instructions:g} | {g.blocks} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compiles every call for every architecture and prints what its kernels need; 1 where a gate is broken."""
    cache = Path(".pytest_cache", "d", "triton")
    cache.mkdir(parents=True, exist_ok=True)
    kernels = compile_calls({key: [*NETWORKS, *OTHERS, *CONTRASTS] for key in ARCHS}, cache.resolve())
    print(
        f"{'call':<32}{'kernel':<16}{'shifted':<9}{'sm':>4}{'registers':>11}{'shared':>8}{'blocks':>8}{'a score':>9}"
    )
    for c in kernels:
        gate = next((g for g in GATES if g.kernel == c.kernel and g.call.split()[0] == c.call.split()[0]), None)
        per_score = f"{c.instructions_per_score(gate.exponentials if gate else 1):.1f}" if c.code.loop else ""
        shifted = str(c.constants.get("SHIFTED", ""))
        print(
            f"{c.call:<32}{c.kernel:<16}{shifted:<9}{c.arch:>4}{c.code.registers:>11}{c.shared:>8}"
            f"{c.occupancy.blocks:>8}{per_score:>9}"
        )
    broken = problems(kernels)
    print("\n".join(broken))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
