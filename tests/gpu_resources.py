# SPDX-License-Identifier: Apache-2.0
"""Reads the report of nvcc's compiler on each kernel (registers, spills, shared memory), and computes the
occupancy."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"


@dataclass(frozen=True)
class Multiprocessor:
    """Holds the limits of one multiprocessor; CUDA programming guide, "Technical specifications per compute
    capability"."""

    shared_bytes: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


MULTIPROCESSORS = {
    80: Multiprocessor(164 << 10),
    90: Multiprocessor(228 << 10),
    100: Multiprocessor(228 << 10),
}

_WARP = 32
_SCHEDULERS = 4  # each with a quarter of the registers
_REGISTER_UNIT = 256  # registers are given to a warp in such units,
_SHARED_UNIT = 128  # shared memory to a block in such bytes,
_SHARED_RESERVED = 1024  # the system takes these from each block


@dataclass(frozen=True)
class Occupancy:
    """Tells how full a multiprocessor can be of one kernel."""

    blocks: int  # at a time on one multiprocessor; 0: the kernel cannot be launched
    fraction: float  # share of the warps that the multiprocessor can hold
    limited_by: str  # "registers", "shared memory", "threads" or "blocks"


@dataclass(frozen=True)
class KernelResources:
    """Holds the resources that one kernel takes on one architecture."""

    kernel: str  # as in ``medaccel::gaussian::march<float, 4>``
    signature: str  # demangled in full
    arch: int  # as in 80 for sm_80
    registers: int  # per thread
    spill_store_bytes: int  # per thread
    spill_load_bytes: int  # per thread
    stack_bytes: int  # per thread, local memory
    static_shared_bytes: int  # per block

    def occupancy(self, threads: int, dynamic_shared_bytes: int = 0) -> Occupancy:
        """Returns the occupancy with blocks of so many threads; see `occupancy`."""
        return occupancy(self.arch, threads, self.registers, self.static_shared_bytes + dynamic_shared_bytes)


def occupancy(arch: int, threads: int, registers: int, shared_bytes: int = 0) -> Occupancy:
    """Computes how many blocks fit on one multiprocessor, as NVIDIA's occupancy calculator (cuda_occupancy.h) counts.

    Args:
        arch: 80, 90 or 100.
        threads: per block.
        registers: per thread.
        shared_bytes: per block, static and dynamic together.

    Raises:
        ValueError: for an unknown architecture, or a number of threads that no block can have.
    """
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"occupancy: arch is {arch} (expected one of {sorted(MULTIPROCESSORS)})")
    if not 1 <= threads <= 1024:
        raise ValueError(f"occupancy: threads is {threads} (expected 1 to 1024)")
    limits = MULTIPROCESSORS[arch]
    warps = -(-threads // _WARP)
    registers_of_warp = -(-max(registers, 1) * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    warps_by_registers = limits.registers // _SCHEDULERS // registers_of_warp * _SCHEDULERS
    shared_of_block = -(-(shared_bytes + _SHARED_RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    fits = {
        "threads": limits.threads // _WARP // warps,
        "blocks": limits.blocks,
        "registers": warps_by_registers // warps,
        "shared memory": limits.shared_bytes // shared_of_block,
    }
    limited_by = min(fits, key=lambda name: fits[name])
    blocks = fits[limited_by]
    return Occupancy(blocks, blocks * warps / (limits.threads // _WARP), limited_by)


def nvcc_is_missing() -> str | None:
    """Says why nothing can be compiled for a GPU here; returns None if it can."""
    return None if shutil.which("nvcc") else "nvcc was not found on PATH"


def compile_for_gpu(
    cu: Path,
    archs: Sequence[int] = (80, 90, 100),
    *,
    extra_flags: Sequence[str] = (),
    allow_spills: bool = False,
) -> list[KernelResources]:
    """Compiles a ``.cu`` file to machine code, every warning an error, and reports each kernel on each architecture.

    Args:
        cu: the source; ``csrc`` is on its include path.
        archs: numbers such as 80 for sm_80.
        extra_flags: options of nvcc.
        allow_spills: report spilled registers rather than fail.

    Returns:
        sorted by kernel, then architecture.

    Raises:
        FileNotFoundError: without nvcc.
        RuntimeError: with the compiler's words, where it warns or fails, or a kernel spills registers.
    """
    if reason := nvcc_is_missing():
        raise FileNotFoundError(reason)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    report = "-v" if allow_spills else "-v,-warn-spills"
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", report, *targets]
        command += [f"-I{CSRC}", *extra_flags, "-c", str(cu), "-o", str(Path(folder) / "kernels.o")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("ptxas info")]
        raise RuntimeError(f"{' '.join(command)}\n" + "\n".join(said))
    return parse_ptxas(done.stdout + done.stderr)


def parse_ptxas(text: str) -> list[KernelResources]:
    """The kernels in what ``ptxas -v`` prints. Spills of a function that was not inlined count for its kernel."""
    entries = re.split(r"Compiling entry function '", text)[1:]
    mangled = [entry.split("'", 1)[0] for entry in entries]
    kernels = []
    for entry, signature in zip(entries, _demangle(mangled), strict=True):
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        stack, stores, loads = (sum(int(frame[i]) for frame in frames) for i in range(3))
        arch = re.search(r"for 'sm_(\d+)\w?'", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        if not arch or not registers or not frames:
            raise RuntimeError(f"ptxas said nothing that is understood of {signature}:\n{entry}")
        kernels.append(
            KernelResources(
                kernel=_short(signature),
                signature=signature,
                arch=int(arch[1]),
                registers=int(registers[1]),
                spill_store_bytes=stores,
                spill_load_bytes=loads,
                stack_bytes=stack,
                static_shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return sorted(kernels, key=lambda k: (k.kernel, k.signature, k.arch))


def _demangle(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _short(signature: str) -> str:
    """Removes the return type, the parameters and anonymous namespaces."""
    name = re.sub(r"\(anonymous namespace\)::", "", signature)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    depth = 0
    for i in range(len(name) - 1, -1, -1):
        depth += (name[i] == ">") - (name[i] == "<")
        if name[i] == " " and depth == 0:
            return name[i + 1 :]
    return name
