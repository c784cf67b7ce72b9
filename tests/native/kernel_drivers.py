# SPDX-License-Identifier: Apache-2.0
"""Compiles the drivers of csrc's CPU kernels without torch or Python, as they stand or with a line exchanged."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from tests.compiled import REPOSITORY, compiled, produce

ADDRESS = "address"
ADDRESS_AND_BEHAVIOUR = "address,undefined"
THREAD = "thread"

_FLAGS = ("-std=gnu++17", "-g1", "-O1", "-ffp-contract=off", "-fopenmp", "-pthread", "-Wno-psabi")
_SANITIZED = {
    None: (),
    ADDRESS: ("-fsanitize=address",),
    ADDRESS_AND_BEHAVIOUR: ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    # See csrc/common/parallel.h.
    THREAD: ("-fsanitize=thread", "-DMEDACCEL_PLAIN_THREADS"),
}


def build(op: str, sanitizer: str | None, *flags: str, root: Path = REPOSITORY) -> Path:
    """Builds the driver of an op's CPU kernel.

    Args:
        op: a folder of csrc.
        sanitizer: one of the above, or None.
        flags: more of them, for the compiler.
        root: folder of the sources; see `exchanged`.
    """
    every = (*_FLAGS, *_SANITIZED[sanitizer], *flags)
    sources = (root / f"tests/native/{op}_driver.cpp", root / f"csrc/{op}/cpu.cpp")
    objects = [compiled(source, every, root) for source in sources]
    key = hashlib.sha256("\0".join((*every, *(o.name for o in objects))).encode()).hexdigest()[:24]
    return produce(f"{op}_driver-{key}", ["g++", *every, *map(str, objects)])


def exchanged(folder: Path, file: str, old: str, new: str) -> Path:
    """The root of a copy of the kernels and their drivers in which one line reads differently.

    Raises:
        AssertionError: `old` isn't in the file just once, as after an edit of the kernel.
    """
    for part, suffixes in (("csrc", (".h", ".cpp")), ("tests/native", (".h", "_driver.cpp"))):
        for source in (REPOSITORY / part).rglob("*"):
            if source.name.endswith(suffixes):
                target = folder / source.relative_to(REPOSITORY)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times, not once: {old}"
    (folder / file).write_text(text.replace(old, new))
    return folder
