# SPDX-License-Identifier: Apache-2.0
"""Builds the library that makes torch believe in a GPU."""

from pathlib import Path

from tests.compiled import compiled, produce


def library() -> Path:
    """Returns the library in the tests' cache, for the torch of this environment.

    Raises:
        RuntimeError: with the compiler's words, or because there is none.
    """
    import torch

    folder = Path(torch.__path__[0])
    try:
        flags = ("-std=c++20", "-fPIC", f"-isystem{folder / 'include'}")
        made = compiled(Path(__file__).with_name("fake_cuda.cpp"), flags)
        link = ["g++", "-shared", str(made), f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        return produce(f"{made.stem}.so", [*link, f"-Wl,-rpath,{folder / 'lib'}"])
    except FileNotFoundError as error:
        raise RuntimeError(str(error)) from None
