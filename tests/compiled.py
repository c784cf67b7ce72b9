# SPDX-License-Identifier: Apache-2.0
"""C++ that tests compile and run: nothing is compiled twice, and what a sanitizer found is told from its words."""

from __future__ import annotations

import functools
import hashlib
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
from typing import TypeVar

REPOSITORY = Path(__file__).resolve().parents[1]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Result:
    """Tells how a driver ended."""

    returncode: int
    output: str  # stdout, then stderr

    @property
    def finding(self) -> str | None:
        """Returns the fault and its finder, such as ``AddressSanitizer: use-after-poison``; None if there is no
        fault.

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
    """Says why nothing can be compiled here; returns None if it can."""
    return None if shutil.which("g++") else "g++ was not found: tests of the kernels' sources compile with it"


@functools.cache
def _cache_folder() -> Path:
    folder = REPOSITORY / ".pytest_cache" / "d" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only checkout
        folder = Path(tempfile.gettempdir()) / f"medaccel-compiled-{os.getuid()}"
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


def produce(name: str, command: Sequence[str]) -> Path:
    """A file of the cache: what the command writes to the path appended to it, unless it is there already."""
    target = _cache_folder() / name
    if target.exists():
        os.utime(target)
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    _compile([*command, "-o", str(partial)])
    os.replace(partial, target)
    return target


def compiled(source: Path, flags: tuple[str, ...], root: Path = REPOSITORY) -> Path:
    """The object file of a source, in the cache; a second call with the same text takes no time.

    Args:
        source: ``.cpp``, or ``.cu`` as C++.
        flags: options of the compiler.
        root: folder of a copy of the sources; its place does not change the object.

    Raises:
        RuntimeError: with the command and the compiler's words.
    """
    language = ("-x", "c++") if source.suffix == ".cu" else ()
    # What the compiler would see decides, so that any change of any header counts, and nothing else does.
    preprocessed = _compile(["g++", *flags, *language, "-E", str(source)]).replace(str(root), "")
    key = hashlib.sha256("\0".join((_compiler(), *flags, preprocessed)).encode()).hexdigest()[:24]
    return produce(f"{source.stem}-{key}.o", ["g++", *flags, *language, "-c", str(source)])


def execute(command: Sequence[str], timeout_s: float = 240.0, **environment: str) -> Result:
    """Run a compiled program, its sanitizers as the tests want them; the first finding ends it."""
    env = dict(
        os.environ,
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        TSAN_OPTIONS="halt_on_error=1",
        **environment,
    )
    for attempt in (list(command), ["setarch", "-R", *command]):
        try:
            done = subprocess.run(attempt, capture_output=True, text=True, env=env, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return Result(-1, f"Timeout: {timeout_s:.0f} s (does the kernel wait for another block?)")
        # Where the kernel randomises addresses more than this TSan knows of, it needs to be without.
        if "ThreadSanitizer: unexpected memory mapping" not in done.stderr:
            break
    return Result(done.returncode, done.stdout + done.stderr)
