# SPDX-License-Identifier: Apache-2.0
"""Compiles a CUDA kernel's C++ driver against the emulator, with or without sanitizers, and runs it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tests.compiled import REPOSITORY, Result, compiled, compiler_is_missing, execute, in_parallel, produce

__all__ = [
    "ADDRESS",
    "CSRC",
    "ORDERS",
    "THREAD",
    "Result",
    "build",
    "build_and_run",
    "compiler_is_missing",
    "in_parallel",
    "load_module",
    "run",
]

CSRC = REPOSITORY / "csrc"
EMULATOR_SOURCES = tuple(sorted((CSRC / "common" / "emulation").glob("*.cpp")))
ORDERS = ("fwd", "rev", "rand1", "rand2")
ADDRESS = "address,undefined"
THREAD = "thread"

# -fno-strict-aliasing: as nvcc does, take a vector load through a reinterpreted pointer for what it says.
# -ffp-contract=off: the kernels say fma where they mean it.
_COMMON_FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{CSRC}", f"-I{Path(__file__).parent}"),
)
_LEFT_OUT = "null,vptr,object-size,nonnull-attribute"  # ASan sees these too, and they double the time of compilation
_FLAGS: dict[str | None, tuple[str, ...]] = {
    None: ("-O2",),
    ADDRESS: ("-O1", "-g", f"-fsanitize={ADDRESS}", f"-fno-sanitize={_LEFT_OUT}", "-fno-sanitize-recover=all"),
    THREAD: ("-O1", "-g", f"-fsanitize={THREAD}"),
}
# The emulator itself is not under test, so it is compiled without instrumentation.
_EMULATOR_FLAGS: dict[str | None, tuple[str, ...]] = {
    None: ("-O2",),
    ADDRESS: ("-O1", "-DMEDACCEL_EMU_ASAN"),
    THREAD: ("-O1", "-DMEDACCEL_EMU_TSAN"),
}


@functools.cache
def build(
    sources: tuple[Path, ...],
    sanitizer: str | None = None,
    *,
    extra_flags: tuple[str, ...] = (),
    shared: bool = False,
) -> Path:
    """Compiles the sources (``.cu``, ``.cpp``) and the emulator, and links them.

    Args:
        sources: the op's ``cuda.cu`` files and the driver with its ``main``.
        sanitizer: ``"address,undefined"``, ``"thread"`` or None.
        extra_flags: options of the compiler for the sources (not for the emulator).
        shared: link a shared object (a Python module) rather than a program.

    Returns:
        the program's path, in the pytest cache; a second build of the same text takes no time.

    Raises:
        RuntimeError: with the command and the compiler's words.
    """
    flags = (*_COMMON_FLAGS, *_FLAGS[sanitizer])
    emulator_flags = (*_COMMON_FLAGS, *_EMULATOR_FLAGS[sanitizer])
    jobs = [(s, (*flags, *extra_flags)) for s in sources] + [(s, emulator_flags) for s in EMULATOR_SOURCES]
    objects = in_parallel(lambda job: compiled(*job), jobs)
    key = hashlib.sha256("\0".join((*flags, str(shared), *(o.name for o in objects))).encode()).hexdigest()[:24]
    link = ["g++", *_FLAGS[sanitizer], *map(str, objects), "-pthread", *(["-shared"] if shared else [])]
    return produce(f"{sources[-1].stem}-{key}{'.so' if shared else ''}", link)


def load_module(name: str, path: Path) -> ModuleType:
    """Import a Python module that `build` made with ``shared=True``; `name` is what its sources call it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(program: Path, args: Sequence[str] = (), *, order: str = "fwd", timeout_s: float = 240.0) -> Result:
    """Runs a driver that `build` made, its blocks and threads in the given order; see `ORDERS`."""
    return execute([str(program), *args], timeout_s, MEDACCEL_EMU_ORDER=order)


def build_and_run(
    sources: Sequence[Path],
    sanitizer: str | None = None,
    *,
    order: str = "fwd",
    args: Sequence[str] = (),
    extra_flags: Sequence[str] = (),
    timeout_s: float = 240.0,
) -> Result:
    """Calls `build`, then `run`."""
    program = build(tuple(sources), sanitizer, extra_flags=tuple(extra_flags))
    return run(program, args, order=order, timeout_s=timeout_s)
