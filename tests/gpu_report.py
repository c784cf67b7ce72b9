# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.gpu_report`: what the CUDA kernels need on each architecture, and what they should take there.

Registers, spills and shared memory come from ptxas, occupancy from the architectures' limits. The time is a
*prediction* from blocks, instructions and bytes, to be held against a real run one day; nothing here ran on a GPU.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

from tests.cuda_emulation.sanitized import CSRC
from tests.gpu_resources import compile_for_gpu

THREADS = {"march": 256, "make_taps": 128, "architecture": 1}  # a block's threads; other kernels have 256
# An H100 SXM: its multiprocessors, each issuing four instructions a cycle; bytes a second of its memory.
PROCESSORS, HERTZ, ISSUED, BYTES_PER_SECOND = 132, 1.755e9, 4, 3.35e12
# Instructions of one thread for one plane (4 voxels) within the volume, by reach: `plane_instructions` of sm_90.
PLANE_INSTRUCTIONS = {4: 274, 8: 439}
# Share of the cycles in which an instruction is issued, an assumption: with two blocks on a multiprocessor, and one.
ISSUE_SHARE = {2: 0.6, 1: 0.4}


class MarchPlan(NamedTuple):
    """Tells how the fused kernel's work is cut."""

    chunks: int
    blocks: int
    longest: int  # planes of a chunk
    busy: int  # multiprocessors that have a block


class Prediction(NamedTuple):
    """Holds the predicted time of one march on an H100, and what it is made of."""

    plan: MarchPlan
    waves: float  # blocks over the places for two on each multiprocessor
    requested: float  # volumes that blocks read and write
    by_bytes: float  # seconds, of what the memory sees
    by_instructions: float  # seconds, of the multiprocessor with the most blocks

    @property
    def seconds(self) -> float:
        return max(self.by_bytes, self.by_instructions)


def march_plan(shape: Sequence[int], reach: int, processors: int = PROCESSORS) -> MarchPlan:
    """Asks the kernel's own code how it cuts volumes: (volumes, z, y, x)."""
    from tests.ops.checks import emulated_module

    chunks, blocks = emulated_module().gaussian_plan(shape[0], list(shape[1:]), reach, processors)
    return MarchPlan(chunks, blocks, -(-shape[1] // chunks), min(blocks, processors))


def predict_march(size: int, reach: int) -> Prediction:
    """Predicts one march of a size³ volume, fp32, from its instructions and bytes.

    The memory sees the volume once for each chunk's planes with their halo, and the output; halos of neighbouring
    tiles come from the second-level cache. A multiprocessor works on its blocks' planes, halos included, at an
    assumed share of its cycles; the one with the most blocks ends last.
    """
    from tests.ops.checks import emulated_module

    tile, plan = emulated_module().march_tile, march_plan((1, size, size, size), reach)
    inside = lambda start, length, margin: min(start + length + margin, size) - max(start - margin, 0)  # noqa: E731
    across = [sum(inside(at, tile, reach) for at in range(0, size, tile)) for _ in range(2)]
    bounds = [part * size // plan.chunks for part in range(plan.chunks + 1)]
    planes = sum(inside(a, b - a, reach) for a, b in pairwise(bounds))
    most = -(-plan.blocks // PROCESSORS)
    steps = most * (plan.longest + 2 * reach)
    warps = THREADS["march"] // 32
    by_instructions = steps * warps * PLANE_INSTRUCTIONS[reach] / (ISSUED * ISSUE_SHARE[min(most, 2)] * HERTZ)
    return Prediction(
        plan,
        plan.blocks / (2 * PROCESSORS),
        prod(across) * planes / size**3 + 1,
        4 * size**3 * (planes / size + 1) / BYTES_PER_SECOND,
        by_instructions,
    )


def find_cuobjdump() -> str | None:
    """Returns NVIDIA's disassembler: of the toolkit, or the one that Triton brings along; None if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(beside) if beside.exists() else None


def plane_instructions(machine_code: str, reach: int) -> int:
    """Counts a thread's instructions for one plane within the volume, from `cuobjdump --dump-sass` of `march<float>`.

    It is the last loop with both barriers (all radii the instance's own), without the blocks that read at the
    volume's border (single elements) or find a plane beyond it (a division); the loop along x within runs 1.5 or
    1.25 times.
    """
    function = next(f for f in machine_code.split("Function : ")[1:] if f"marchIfLi{reach}E" in f.split("\n", 1)[0])
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z0-9_.]+)([^;]*);", function)
    code = [(int(at, 16), name, rest) for at, name, rest in found]
    back = [
        (int(target[1], 16), at)
        for at, name, rest in code
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) <= at
    ]
    inside = lambda loop: [c for c in code if loop[0] <= c[0] <= loop[1]]  # noqa: E731
    marching = max(loop for loop in back if Counter(name.split(".")[0] for _, name, _ in inside(loop))["BAR"] == 2)
    along_x = max(
        (loop for loop in back if marching[0] < loop[0] and loop[1] < marching[1]),
        key=lambda loop: sum(name == "FFMA" for _, name, _ in inside(loop)),
    )
    targets = {
        int(t, 16) for _, name, rest in inside(marching) if "BRA" in name for t in re.findall(r"0x(\w+)", rest)
    }
    blocks: list[list[tuple[int, str, str]]] = [[]]
    for instruction in inside(marching):
        if instruction[0] in targets:
            blocks.append([])
        blocks[-1].append(instruction)
        if instruction[1].startswith("BRA"):
            blocks.append([])
    times = (32 + 2 * reach) * 8 / THREADS["march"]
    total = 0.0
    for block in blocks:
        names = [name for _, name, _ in block]
        at_border = any(re.fullmatch(r"LDG\.E(?!\.128).*|I2F.*|F2I.*", name) for name in names)
        within = block and along_x[0] <= block[0][0] <= along_x[1]
        total += 0 if at_border else len(block) * (times if within else 1)
    return round(total)


def disassembled() -> str:
    """Compiles the Gaussian's kernels for sm_90 and returns their machine code in words."""
    import tempfile

    tool = find_cuobjdump()
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "kernels.o")
        source = str(CSRC / "gaussian" / "cuda.cu")
        command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90,code=sm_90", f"-I{CSRC}", "-c", source]
        subprocess.run([*command, "-o", target], check=True, capture_output=True)
        return subprocess.run([tool, "--dump-sass", target], check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Prints the two tables; 1 where a kernel spills."""
    if shutil.which("nvcc") is None:
        print("gpu_report: nvcc was not found; nothing can be compiled", file=sys.stderr)
        return 1
    spills = 0
    print(f"{'kernel':<46}{'sm':>4}{'registers':>10}{'spills':>8}{'shared':>8}{'occupancy':>11}  limited by")
    for source in sorted(CSRC.glob("*/cuda.cu")):
        for r in compile_for_gpu(source, allow_spills=True):
            name = r.kernel.split("<")[0].rsplit("::")[-1]
            o = r.occupancy(THREADS.get(name, 256))
            spilled = r.spill_store_bytes + r.spill_load_bytes
            spills += spilled
            print(
                f"{r.kernel.removeprefix('medaccel::'):<46}{r.arch:>4}{r.registers:>10}{spilled:>8}{r.static_shared_bytes:>8}"
                f"{100 * o.fraction:>10.0f}%  {o.limited_by}"
            )
    print()
    print_predictions()
    return int(spills > 0)


def print_predictions() -> None:
    """Prints the table of predicted times."""
    head = f"{'Gaussian, fp32':<16}{'chunks':>8}{'blocks':>8}{'busy SMs':>10}{'waves':>7}{'volumes':>9}"
    print(head + f"{'bytes, µs':>11}{'instr., µs':>12}{'predicted, µs':>15}")
    for sigma, reach in ((1.0, 4), (2.0, 8)):
        for size in (64, 96, 128, 256):
            p = predict_march(size, reach)
            print(
                f"{f'{size}³, σ = {sigma:g}':<16}{p.plan.chunks:>8}{p.plan.blocks:>8}{p.plan.busy:>10}{p.waves:>7.2f}"
                f"{p.requested:>9.2f}{1e6 * p.by_bytes:>11.1f}"
                f"{1e6 * p.by_instructions:>12.1f}{1e6 * p.seconds:>15.1f}"
            )
    print("volumes: requested by the blocks; the ideal is 2. Predicted for an H100 without its launch: the larger of")
    print(f"bytes at {BYTES_PER_SECOND / 1e12} TB/s and instructions at {ISSUE_SHARE[2]:.0%} of the cycles")
    print(f"({ISSUE_SHARE[1]:.0%} with one block on a multiprocessor), halos and the fullest multiprocessor counted.")


if __name__ == "__main__":
    sys.exit(main())
