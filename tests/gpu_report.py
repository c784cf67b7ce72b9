# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.gpu_report`: what the CUDA kernels need on each architecture, and what they should take there.

Registers, spills and shared memory come from ptxas, occupancy from the architectures' limits. The time is a
*prediction*, bytes over an H100's bandwidth, to be held against a real run one day; nothing here ran on a GPU.
"""

import re
import shutil
import sys

from tests.cuda_emulation.sanitized import CSRC
from tests.gpu_resources import compile_for_gpu

H100_BYTES_PER_SECOND = 3.35e12
_TILE = r"kTileX = (\d+), kTileY = (\d+), kChunk = (\d+);"
_FOUND = re.search(_TILE, (CSRC / "gaussian" / "cuda.cu").read_text(encoding="utf-8"))
assert _FOUND is not None, f"csrc/gaussian/cuda.cu has no line {_TILE}"
TILE_X, TILE_Y, CHUNK = map(int, _FOUND.groups())
THREADS = {"march": 512, "make_taps": 128, "architecture": 1}
OTHERS = 256  # threads of every other kernel


def march_traffic(size: int, reach: int, radius: int) -> tuple[float, float]:
    """Volumes moved by one march of a size³ volume: requested, and an estimate with the second-level cache.

    Requested: each block reads its tile with a halo (`reach` columns on both sides along x, `radius` rows along y)
    and each chunk the `radius` planes before and after it, as far as the volume goes; one volume is written. With the
    cache, neighbouring tiles of a plane are read at about the same time, and what remains is the halo between chunks.
    """
    inside = lambda start, length, margin: min(start + length + margin, size) - max(start - margin, 0)  # noqa: E731
    columns = sum(inside(x, TILE_X, reach) for x in range(0, size, TILE_X))
    rows = sum(inside(y, TILE_Y, radius) for y in range(0, size, TILE_Y))
    planes = sum(inside(z, CHUNK, radius) for z in range(0, size, CHUNK))
    requested = columns * rows * planes / size**3 + 1
    return requested, planes / size + 1


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
            o = r.occupancy(THREADS.get(name, OTHERS))
            spilled = r.spill_store_bytes + r.spill_load_bytes
            spills += spilled
            print(
                f"{r.kernel.removeprefix('medaccel::'):<46}{r.arch:>4}{r.registers:>10}{spilled:>8}{r.static_shared_bytes:>8}"
                f"{100 * o.fraction:>10.0f}%  {o.limited_by}"
            )
    print()
    print(f"{'Gaussian, fp32, 256³':<28}{'volumes':>9}{'with L2':>9}{'bytes/voxel':>13}{'H100, predicted':>17}")
    for sigma, reach, radius in ((1.0, 4, 4), (2.0, 8, 8)):
        requested, cached = march_traffic(256, reach, radius)
        milliseconds = 1e3 * 4 * 256**3 * cached / H100_BYTES_PER_SECOND
        print(
            f"{f'fused, σ = {sigma:g}':<28}{requested:>9.2f}{cached:>9.2f}{4 * requested:>13.1f}"
            f"{milliseconds:>14.3f} ms"
        )
    plain = 1e3 * 4 * 256**3 * 6 / H100_BYTES_PER_SECOND
    print(f"{'three plain passes':<28}{6:>9.2f}{6:>9.2f}{24:>13.1f}{plain:>14.3f} ms")
    print("volumes: requested by the kernel; with L2: an estimate of what DRAM sees; the ideal is 2")
    return int(spills > 0)


if __name__ == "__main__":
    sys.exit(main())
