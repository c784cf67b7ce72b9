# SPDX-License-Identifier: Apache-2.0
"""Compiles exactly what public calls would launch on a GPU that is not there.

    compiled = launches(["swin_unetr 48 bfloat16"], 90, cache)

A driver that knows only its architecture stands in for CUDA's; each `kernel[grid](…)` then goes through Triton's own
specialisation (dtypes, alignment of addresses, divisible and unit sizes) to its compiler, and nothing is executed. So
a test sees the variants that a user's first step compiles, no hand-written signature included. The private names
that are used, all here: `triton.runtime.driver.set_active` and the methods of `_Driver`, `JITFunction.run`'s
arguments `grid` and `warmup`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.gpu_resources import Occupancy, occupancy

from .errors import CompilationFailed
from .machine_code import MachineCode, read

_MODULE = "tests.triton_interpretation.launches"
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Compiled:
    """Describes a kernel as a call launches it.

    Attributes:
        call: the first call that launches it, as in `steps.CALLS`.
        kernel: its name.
        arch: 80, 90 or 100.
        constants: the launch's keyword arguments: constants, num_warps and num_stages.
        code: what its machine code says.
        shared: bytes of shared memory per block.
        grid: blocks of the first launch.
        launches: how often the call launches it.
    """

    call: str
    kernel: str
    arch: int
    constants: dict[str, Any]
    code: MachineCode
    shared: int
    grid: int
    launches: int

    @property
    def occupancy(self) -> Occupancy:
        """The blocks that fit on a multiprocessor."""
        return occupancy(self.arch, 32 * self.constants.get("num_warps", 4), self.code.registers, self.shared)

    def instructions_per_score(self, exponentials: int = 1) -> float:
        """Thread-instructions per score (pair of tokens or pixels), of which each has so many exponentials.

        It is the loop's length over the scores that a thread has of a tile; ptxas may have unrolled the loop.
        """
        constants = self.constants
        scores = constants["BLOCK_M"] * constants["BLOCK_N"] / (32 * constants["num_warps"])
        return self.code.loop / (scores * max(1, int(self.code.exponentials / (scores * exponentials))))

    def __str__(self) -> str:
        return f"{self.kernel} sm_{self.arch} ({self.call}): {self.constants}"


@dataclass(frozen=True)
class Launches:
    """Holds what calls would launch: Triton's kernels, each distinct one once, and torch's operations by call."""

    kernels: list[Compiled]
    torch: dict[str, dict[str, int]]


def launches(calls: Sequence[str], arch: int, cache: Path) -> Launches:
    """Compiles what the calls launch on an architecture, in a process of its own.

    Raises:
        CompilationFailed: with the compiler's words.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", _MODULE, str(arch), *calls]
    run = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)
    if run.returncode:
        raise CompilationFailed(f"the compiler's process ended with {run.returncode}:\n{run.stderr[-4000:]}")
    answer = json.loads(run.stdout.splitlines()[-1])
    kernels = [Compiled(**k | {"code": MachineCode(**k["code"])}) for k in answer["kernels"]]
    return Launches(kernels, answer["torch"])


def compile_calls(calls: Mapping[int, Sequence[str]], cache: Path) -> list[Compiled]:
    """Compiles the calls of several architectures, two at a time; returns the kernels."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda arch: launches(list(dict.fromkeys(calls[arch])), arch, cache), calls)
        return [kernel for of_arch in found for kernel in of_arch.kernels]


# The compiler's process


class _Driver:
    """Knows what Triton asks of a GPU before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


def _record(arch: int, calls: dict[str, Callable[[], Any]], cache: Path) -> Launches:
    from triton.runtime import driver, jit

    driver.set_active(_Driver(arch))
    compile_only: Any = jit.JITFunction.run
    found: dict[tuple[str, str], Compiled] = {}
    running = ""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        key = (running, compiled.hash)
        if key in found:
            found[key] = Compiled(**vars(found[key]) | {"launches": found[key].launches + 1})
            return compiled
        plain = {name: v for name, v in kwargs.items() if isinstance(v, (bool, int, float, str))}
        code, size, blocks = _code(compiled, cache), compiled.metadata.shared, grid[0]
        found[key] = Compiled(running, self.fn.__name__, arch, plain, code, size, blocks, 1)
        return compiled

    jit.JITFunction.run = run
    operations = {}
    for running, call in calls.items():
        operations[running] = call()
    return Launches(list(found.values()), operations)


def _code(compiled: Any, cache: Path) -> MachineCode:
    """Reads the kernel's machine code, kept beside it in Triton's cache."""
    import triton

    kept = cache / f"{compiled.hash}.machine_code"
    if kept.exists():
        return MachineCode(**json.loads(kept.read_text()))
    code = read(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(code)))
    os.replace(temporary, kept)
    return code


def _main(arch: int, names: Sequence[str]) -> None:
    from . import steps

    calls = {name: functools.partial(steps.run, name, arch) for name in names}
    print(json.dumps(asdict(_record(arch, calls, Path(os.environ["TRITON_CACHE_DIR"])))))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
