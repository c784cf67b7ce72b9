# SPDX-License-Identifier: Apache-2.0
"""Finds the cells that an op's row of the registry lacks: each cell is looked up where it claims to be."""

import importlib.util
import re
from pathlib import Path

import torch

from medaccel import _native, ops
from medaccel.ops._checks import Verifier
from medaccel.ops._registry import DEVICES, Kernel, NoKernel, Op

ROOT = Path(__file__).resolve().parents[2]
PYTHON_FILES = ("__init__", "reference", "op", "native", "cases", "verify")


def lacking(op: Op) -> list[str]:
    """Returns one line for each cell that is missing or untrue, beginning with the cell's name."""
    return [*_paths(op), *_kernels(op), *_cases(op), *_verifier(op), *_benchmark(op), *_files(op)]


def _loaded(op: Op, cell: str) -> tuple[object, str | None]:
    """Returns the object that a cell's path names, or the fault of the path."""
    path = getattr(op, cell)
    if not path:
        return None, f"{cell}: is empty"
    try:
        return op.load(cell), None
    except (ImportError, AttributeError, ValueError) as error:
        return None, f"{cell}: {error}"


def _paths(op: Op) -> list[str]:
    found = []
    for cell in ("function", "reference", "predicate"):
        value, problem = _loaded(op, cell)
        if problem is None and not callable(value):
            problem = f"{cell}: {getattr(op, cell)} is no function"
        if problem is None and not getattr(op, cell).startswith(f"medaccel.ops.{op.folder}"):
            problem = f"{cell}: {getattr(op, cell)} is not in the op's folder"
        found.append(problem)
    if getattr(ops, op.name, None) is not _loaded(op, "function")[0] or op.name not in ops.__all__:
        found.append(f"name: medaccel.ops.{op.name} is not {op.function}")
    if not op.docs:
        found.append("docs: is empty")
    return [problem for problem in found if problem is not None]


def _kernels(op: Op) -> list[str]:
    found = [f"kernels: says nothing of {device}" for device in DEVICES if device not in op.kernels]
    if not op.registered or not hasattr(torch.ops.medaccel, op.registered):
        return [*found, f"registered: there is no torch.ops.medaccel.{op.registered}"]
    for device, kernel in op.kernels.items():
        key = {"cpu": "CPU", "cuda": "CUDA"}[device]
        there = torch._C._dispatch_has_kernel_for_dispatch_key(f"medaccel::{op.registered}", key)
        if isinstance(kernel, Kernel):
            if not there:
                found.append(f"kernels: {op.registered} has none registered for {device}")
            if not kernel.language or not (ROOT / kernel.source).is_file():
                found.append(f"kernels: {device}'s has no language, or {kernel.source!r} is no file")
        elif not isinstance(kernel, NoKernel) or not kernel.reason:
            found.append(f"kernels: {device} has neither a kernel nor a reason for having none")
        elif there:
            found.append(f"kernels: {op.registered} has one for {device}, where the row has none")
    return found


def _cases(op: Op) -> list[str]:
    module, problem = _loaded(op, "cases")
    if problem is not None:
        return [problem]
    cases = getattr(module, "CASES", None)
    if not cases:
        return [f"cases: {op.cases} has no CASES"]
    names = [str(case) for case in cases]
    return ["cases: two have one name"] if len(set(names)) < len(names) else []


def _verifier(op: Op) -> list[str]:
    verifier, problem = _loaded(op, "verifier")
    if problem is not None:
        return [problem]
    if not isinstance(verifier, Verifier) or not verifier.cases:
        return [f"verifier: {op.verifier} is no Verifier with cases"]
    name = verifier.check(torch.device("cpu"), torch.float64, verifier.cases[0]).op
    return [] if name == op.name else [f"verifier: {op.verifier} checks {name}"]


def _benchmark(op: Op) -> list[str]:
    if not op.benchmark or importlib.util.find_spec(op.benchmark) is None:
        return [f"benchmark: there is no module {op.benchmark!r}"]
    text = (ROOT / f"{op.benchmark.replace('.', '/')}.py").read_text(encoding="utf-8")
    wanted = {op.name: rf"\b{op.name}\b", op.cases: rf"\b{re.escape(op.cases)}\b"}
    return [
        f"benchmark: {op.benchmark} does not use {what}"
        for what, found in wanted.items()
        if not re.search(found, text)
    ]


def _files(op: Op) -> list[str]:
    """The folders have the files that their ops need, and the modules what bind.cpp registers."""
    folder = ROOT / "medaccel" / "ops" / op.folder
    wanted = [folder / f"{name}.py" for name in PYTHON_FILES]
    wanted += [ROOT / "csrc" / op.folder / name for name in (f"{op.folder}.h", "cpu.cpp", "bind.cpp")]
    wanted += [ROOT / "tests" / "ops" / f"test_{op.folder}.py", ROOT / "tests" / "native" / f"{op.folder}_driver.cpp"]
    if (ROOT / "csrc" / op.folder / "cuda.cu").exists():
        wanted.append(ROOT / "csrc" / op.folder / "bind_cuda.cpp")
    found = [f"folder: there is no {path.relative_to(ROOT)}" for path in wanted if not path.is_file()]
    bindings = ROOT / "csrc" / op.folder / "bind.cpp"
    if bindings.is_file() and _native.cpu is not None:
        bound = re.findall(r'm\.def\("(\w+)"', bindings.read_text(encoding="utf-8"))
        found += [f"folder: the module has no {name}" for name in bound if not hasattr(_native.cpu, name)]
        found += [] if bound else ["folder: bind.cpp registers nothing"]
    return found
