# SPDX-License-Identifier: Apache-2.0
"""Compile a CUDA kernel's C++ driver against the emulator, with or without sanitizers, and run it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

REPOSITORY = Path(__file__).resolve().parents[2]
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

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Result:
    """How a driver ended."""

    returncode: int
    output: str  # stdout, then stderr

    @property
    def finding(self) -> str | None:
        """What was found and by whom, as in ``AddressSanitizer: use-after-poison``; None where nothing was.

        The checkers: AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer, KernelFault (the emulator),
        CudaError (the emulated runtime, through CUDA_CHECK and LAUNCH), CheckFailed (the driver's own
        comparisons), Timeout.
        """
        for pattern in (r"(AddressSanitizer: [\w-]+)", r"(ThreadSanitizer: [^(\n]+)", r"(Timeout: .*)"):
            if found := re.search(pattern, self.output):
                return found[1].strip()
        if found := re.search(r"runtime error: (.*)", self.output):
            return f"UndefinedBehaviorSanitizer: {found[1]}"
        if found := re.search(r"((?:KernelFault|CudaError|CheckFailed): .*)", self.output):
            return found[1]
        return None if self.returncode == 0 else f"exit status {self.returncode}: {self.output[-2000:]}"


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``[function(item) for item in items]``, as many at a time as there are processors."""
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(function, items))


def compiler_is_missing() -> str | None:
    """None, or the sentence that says why nothing can be compiled here."""
    return None if shutil.which("g++") else "g++ was not found: the CUDA emulator is compiled with it"


@functools.cache
def _cache_folder() -> Path:
    folder = REPOSITORY / ".pytest_cache" / "d" / "cuda_emulation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only checkout
        folder = Path(tempfile.gettempdir()) / f"medaccel-cuda-emulation-{os.getuid()}"
        folder.mkdir(parents=True, exist_ok=True)
    forgotten = time.time() - 7 * 24 * 3600
    for path in folder.iterdir():
        if path.stat().st_mtime < forgotten:
            path.unlink(missing_ok=True)
    return folder


def _compile(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@functools.cache
def _compiler() -> str:
    return _compile(["g++", "--version"]).splitlines()[0]


def _produce(target: Path, command: Sequence[str]) -> Path:
    """Run the command, which writes to the path appended to it, unless the target is there already."""
    if target.exists():
        os.utime(target)
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    _compile([*command, "-o", str(partial)])
    os.replace(partial, target)
    return target


def _object(source: Path, flags: tuple[str, ...]) -> Path:
    language = ("-x", "c++") if source.suffix == ".cu" else ()
    # What the compiler would see decides, so that any change of any header counts, and nothing else does.
    preprocessed = _compile(["g++", *flags, *language, "-E", str(source)])
    key = hashlib.sha256("\0".join((_compiler(), *flags, preprocessed)).encode()).hexdigest()[:24]
    return _produce(_cache_folder() / f"{source.stem}-{key}.o", ["g++", *flags, *language, "-c", str(source)])


@functools.cache
def build(
    sources: tuple[Path, ...],
    sanitizer: str | None = None,
    *,
    extra_flags: tuple[str, ...] = (),
    shared: bool = False,
) -> Path:
    """Compile the sources (``.cu``, ``.cpp``) and the emulator, and link them.

    Args:
        sources: the op's ``cuda.cu`` files and the driver with its ``main``.
        sanitizer: ``"address,undefined"``, ``"thread"`` or None.
        extra_flags: for the compiler, of the sources (not of the emulator).
        shared: link a shared object (a Python module) rather than a program.

    Returns:
        the program's path, in the pytest cache; a second build of the same text takes no time.

    Raises:
        RuntimeError: with the command and the compiler's words.
    """
    flags = (*_COMMON_FLAGS, *_FLAGS[sanitizer])
    emulator_flags = (*_COMMON_FLAGS, *_EMULATOR_FLAGS[sanitizer])
    jobs = [(s, (*flags, *extra_flags)) for s in sources] + [(s, emulator_flags) for s in EMULATOR_SOURCES]
    objects = in_parallel(lambda job: _object(*job), jobs)
    key = hashlib.sha256("\0".join((*flags, str(shared), *(o.name for o in objects))).encode()).hexdigest()[:24]
    link = ["g++", *_FLAGS[sanitizer], *map(str, objects), "-pthread", *(["-shared"] if shared else [])]
    return _produce(_cache_folder() / f"{sources[-1].stem}-{key}{'.so' if shared else ''}", link)


def load_module(name: str, path: Path) -> ModuleType:
    """Import a Python module that `build` made with ``shared=True``; `name` is what its sources call it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(program: Path, args: Sequence[str] = (), *, order: str = "fwd", timeout_s: float = 240.0) -> Result:
    """Run a driver that `build` made, its blocks and threads in the given order; see `ORDERS`."""
    environment = dict(
        os.environ,
        MEDACCEL_EMU_ORDER=order,
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        TSAN_OPTIONS="halt_on_error=1",
    )
    command = [str(program), *args]
    for attempt in (command, ["setarch", "-R", *command]):
        try:
            done = subprocess.run(attempt, capture_output=True, text=True, env=environment, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return Result(-1, f"Timeout: {timeout_s:.0f} s (does the kernel wait for another block?)")
        # Where the kernel randomises addresses more than this TSan knows of, it needs to be without.
        if "ThreadSanitizer: unexpected memory mapping" not in done.stderr:
            break
    return Result(done.returncode, done.stdout + done.stderr)


def build_and_run(
    sources: Sequence[Path],
    sanitizer: str | None = None,
    *,
    order: str = "fwd",
    args: Sequence[str] = (),
    extra_flags: Sequence[str] = (),
    timeout_s: float = 240.0,
) -> Result:
    """`build`, then `run`."""
    program = build(tuple(sources), sanitizer, extra_flags=tuple(extra_flags))
    return run(program, args, order=order, timeout_s=timeout_s)
