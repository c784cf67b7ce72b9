# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation of Triton kernels for GPUs that are not there, and gates on what they need.

    build = Build("medaccel.ops.gather.triton:kernel", 90, {"x": "*bf16", "n": "i32"}, {"BLOCK": 64})
    assert_resources(compile_all([build], cache))

The compiler runs in processes of its own, because TRITON_INTERPRET changes what @triton.jit makes at import.
ptxas is the one in Triton's wheel; TRITON_PTXAS_PATH (and TRITON_PTXAS_BLACKWELL_PATH for sm_100) name another.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import CompilationFailed, ResourceLimit

ARCHS = (80, 90, 100)

_MODULE = "tests.triton_interpretation.aot"
_ROOT = Path(__file__).resolve().parents[2]

# Bytes of shared memory that one block may use (CUDA C++ Programming Guide, table "Technical Specifications").
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Build:
    """One kernel, as it is launched, for one architecture.

    Attributes:
        kernel: "module:function" of a @triton.jit function.
        arch: 80, 90 or 100.
        signature: type of every run-time argument: "*bf16", "*fp32", "fp32", "i32", "i64", …
        constants: value of every tl.constexpr argument; "tl.float32" names a Triton type.
        num_warps, num_stages: those of the launch.
        aligned: arguments known to be multiples of 16 bytes or elements; None: all pointers, as torch allocates.
        fp_fusion: whether a·b + c is contracted, Triton's own default; the launch's `enable_fp_fusion`.
    """

    kernel: str
    arch: int
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    aligned: Sequence[str] | None = None
    fp_fusion: bool = True

    def __str__(self) -> str:
        pointers = "/".join(dict.fromkeys(t[1:] for t in self.signature.values() if t.startswith("*")))
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        name = self.kernel.rpartition(":")[2]
        return f"{name} sm_{self.arch} {pointers} {constants} warps={self.num_warps} stages={self.num_stages}"


@dataclass(frozen=True)
class Resources:
    """Holds the resources that a compiled kernel needs.

    Attributes:
        registers: per thread.
        spill_stores, spill_loads, stack: bytes per thread of local memory; stack counts local arrays too.
        shared: bytes per block.
        matrix_instructions: PTX families in use, of mma.sync, wgmma and tcgen05.mma.
        atomics: global atomic instructions in the PTX.
        contractions: the number of a·b + c of fp32 or fp64 that the PTX rounds once.
    """

    build: Build
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    matrix_instructions: list[str]
    atomics: list[str]
    contractions: int


def compile_all(builds: Iterable[Build], cache: Path, *, processes: int | None = None) -> list[Resources]:
    """Compiles kernels in separate processes.

    Args:
        builds: what to compile.
        cache: folder of Triton's cache; unchanged kernels come from there.
        processes: default: one per 8 builds, up to the number of processors and 8.

    Returns:
        one Resources per build, in order.

    Raises:
        CompilationFailed: naming every build that failed, with the compiler's words.
    """
    builds = list(builds)
    if processes is None:
        processes = max(1, min(-(-len(builds) // 8), os.cpu_count() or 1, 8))
    shares = [builds[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        answered = list(pool.map(lambda share: _ask_compiler(share, cache), shares))
    answers = [answered[i % processes][i // processes] for i in range(len(builds))]
    failures = [f"{build}: {a['error']}" for build, a in zip(builds, answers, strict=True) if "error" in a]
    if failures:
        raise CompilationFailed("\n".join(failures))
    return [Resources(build, **answer) for build, answer in zip(builds, answers, strict=True)]


def _ask_compiler(builds: list[Build], cache: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        answer_file = Path(folder, "answer.json")
        request = json.dumps([asdict(build) for build in builds])
        command = [sys.executable, "-m", _MODULE, str(answer_file)]
        run = subprocess.run(command, input=request, env=environment, cwd=_ROOT, capture_output=True, text=True)
        if run.returncode:
            raise CompilationFailed(f"the compiler's process ended with {run.returncode}:\n{run.stderr[-4000:]}")
        answers: list[dict[str, Any]] = json.loads(answer_file.read_text())
    return answers


def assert_resources(
    results: Iterable[Resources],
    *,
    spill_bytes: int = 0,
    registers: int = 255,
    shared: Mapping[int, int] = SHARED_MEMORY,
) -> None:
    """Raises ResourceLimit, listing every kernel that spills, or needs too many registers or shared memory.

    Args:
        results: the results of `compile_all`.
        spill_bytes: allowed bytes per thread, stores and loads together.
        registers: allowed per thread (255 is the hardware's limit; fewer buy occupancy).
        shared: allowed bytes per block, by architecture.
    """
    excess = []
    for result in results:
        spills = result.spill_stores + result.spill_loads
        if spills > spill_bytes:
            excess.append(f"{result.build}: spills {spills} bytes per thread (allowed {spill_bytes})")
        if result.registers > registers:
            excess.append(f"{result.build}: {result.registers} registers (allowed {registers})")
        limit = shared[result.build.arch]
        if result.shared > limit:
            excess.append(f"{result.build}: {result.shared} bytes of shared memory (allowed {limit})")
    if excess:
        raise ResourceLimit("\n".join(excess))


# The compiler's process


def _compile(build: Build) -> dict[str, Any]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    aligned = build.aligned
    if aligned is None:
        aligned = [argument for argument, kind in build.signature.items() if kind.startswith("*")]
    constants = {
        key: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for key, value in build.constants.items()
    }
    unknown = (set(build.signature) | set(constants)) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"arguments {sorted(unknown)} are in the kernel or in the build, but not in both")
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={argument: build.signature.get(argument, "constexpr") for argument in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": build.fp_fusion}
    target = GPUTarget("cuda", build.arch, 32)

    def run() -> tuple[Any, str]:
        with contextlib.redirect_stdout(io.StringIO()) as log:  # Triton prints what ptxas -v says
            return triton.compile(source, target=target, options=options), log.getvalue()

    compiled, log = run()
    # A kernel out of Triton's cache comes without ptxas's words: they are kept beside it.
    kept = Path(os.environ["TRITON_CACHE_DIR"], f"{compiled.hash}.ptxas")
    if not log and not kept.exists():
        triton.knobs.compilation.always_compile = True
        try:
            compiled, log = run()
        finally:
            triton.knobs.compilation.always_compile = False
    if log:
        kept.write_text(log)
    return _ptxas_report(kept.read_text()) | {
        "shared": compiled.metadata.shared,
        "matrix_instructions": sorted(set(re.findall(r"\b(mma\.sync|wgmma|tcgen05\.mma)\b", compiled.asm["ptx"]))),
        "atomics": sorted(set(re.findall(r"\b((?:atom|red)\.[\w.:]*global[\w.:]*)", compiled.asm["ptx"]))),
        "contractions": len(re.findall(r"\bfma\.rn\.(?:ftz\.)?f(?:32|64)\b", compiled.asm["ptx"])),
    }


def _ptxas_report(log: str) -> dict[str, int]:
    """Sums of `ptxas -v` over a kernel and the functions that were not inlined into it."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not frames:
        raise ValueError(f"ptxas -v did not say registers and spills:\n{log}")
    stack, stores, loads = (sum(int(frame[i]) for frame in frames) for i in range(3))
    return {"registers": max(registers), "stack": stack, "spill_stores": stores, "spill_loads": loads}


def _main(answer_file: Path) -> None:
    answers: list[dict[str, Any]] = []
    for request in json.load(sys.stdin):
        try:
            answers.append(_compile(Build(**request)))
        except Exception as error:  # the caller lists the failures of all builds together
            answers.append({"error": f"{type(error).__name__}: {error}"})
    answer_file.write_text(json.dumps(answers))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
