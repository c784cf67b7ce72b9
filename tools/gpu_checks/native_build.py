# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled modules inside the source tree with g++ and nvcc alone: no CMake, no installation.

Where CMake, Ninja and pybind11 are installed, setup.py does it. Elsewhere (a bare container without a network) the
same sources are compiled here, as csrc/CMakeLists.txt lists them, with the copy of pybind11's headers that torch
brings.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_checks.context import ROOT

CSRC = ROOT / "csrc"
PACKAGE = ROOT / "medaccel"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CPU_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno")
COMMON = ("-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fopenmp", "-DNDEBUG")


def listed(name: str, file: str = "CMakeLists.txt") -> list[str]:
    """Returns the folders that a list in csrc's build files names."""
    found = re.search(rf"set\({name} ([^)]*)\)", (CSRC / file).read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit(f"csrc/{file} has no list {name}")
    return found[1].split()


def isas() -> dict[str, list[str]]:
    """Returns the instruction sets that a module is built for, with their flags."""
    text = (CSRC / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.findall(r"^\s*medaccel_cpu_module\((\w+)([^)]*)\)", text, re.MULTILINE)
    x86 = os.uname().machine in ("x86_64", "AMD64")
    return {isa: flags.split() for isa, flags in found if x86 or isa == "baseline"}


def find_nvcc() -> str | None:
    """Looks for nvcc where setup.py does: the environment, PATH, the toolkit's folder, NVIDIA's PyPI packages."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for found in (os.environ.get("CUDACXX"), shutil.which("nvcc"), f"{home}/bin/nvcc", "/usr/local/cuda/bin/nvcc"):
        if found and Path(found).exists():
            return found
    for folder in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        for packaged in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True):
            return str(packaged)
    return None


def own_architecture(device: str = "cuda") -> str | None:
    """Returns the number of the GPU's architecture, such as "90"; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def pybind11_include() -> Path:
    """Returns the folder with pybind11's headers: the package's own, else torch's copy."""
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin and (found := Path(spec.origin).parent / folder / "pybind11").is_dir():
            return found.parent
    raise SystemExit("pybind11's headers were found neither in the package pybind11 nor in torch's include folder")


def has_cmake() -> bool:
    """Tells whether setup.py can build here."""
    packages = all(importlib.util.find_spec(name) for name in ("pybind11", "setuptools"))
    return bool(packages and shutil.which("cmake") and shutil.which("ninja"))


def is_current(architecture: str | None) -> str | None:
    """Returns None if the modules that are there are newer than their sources and have code for the architecture;
    else what is missing."""
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.is_file())
    wanted = [f"_cpu_{isa}" for isa in isas()] + (["_cuda"] if architecture else [])
    for name in wanted:
        module = PACKAGE / f"{name}{SUFFIX}"
        if not module.exists():
            return f"{name} is not built"
        if module.stat().st_mtime < newest:
            return f"{name} is older than its sources"
    if architecture:
        code = "import torch; from medaccel import _cuda; print(_cuda.architectures)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        built = done.stdout.strip().split(",")
        if architecture not in [arch.rstrip("af") for arch in built]:
            return f"_cuda has code for {done.stdout.strip() or 'nothing'}, not for {architecture}"
    return None


def build(architecture: str | None, folder: Path, jobs: int | None = None) -> list[str]:
    """Builds what is needed, and returns the names of the modules.

    Args:
        architecture: such as "90"; None: no CUDA module.
        folder: for object files.
        jobs: compilers at a time; default: one a processor.
    """
    nvcc = find_nvcc() if architecture else None
    if architecture and nvcc is None:
        raise SystemExit(
            "nvcc was not found (CUDACXX, PATH, CUDA_HOME, /usr/local/cuda): no CUDA kernels can be built"
        )
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise SystemExit("no C++ compiler was found; set CXX to its path")
    folder.mkdir(parents=True, exist_ok=True)
    cpu = [*compiler.split(), *COMMON, "-w", f"-I{CSRC}"]
    bindings = [f"-isystem{pybind11_include()}", f"-isystem{sysconfig.get_path('include')}"]
    said = subprocess.run([*compiler.split(), "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    ops = listed("OPS")
    steps: list[tuple[Path, list[str]]] = []
    of_module: dict[str, list[Path]] = {}

    def step(name: str, command: Sequence[str], source: Path) -> Path:
        target = folder / f"{name}.o"
        steps.append((target, [*command, "-c", str(source), "-o", str(target)]))
        return target

    compiled_by = f'-DMEDACCEL_COMPILER="GNU {said}"'
    glue = [
        step(f"bind_{source.parent.name}", [*cpu, *bindings, "-O1", compiled_by], source)
        for source in (CSRC / "module.cpp", *(CSRC / op / "bind.cpp" for op in ops))
    ]
    for isa, flags in isas().items():
        defines = [f"-DMEDACCEL_MODULE=_cpu_{isa}", f'-DMEDACCEL_ISA="{isa}"']
        sources = [CSRC / "isa.cpp", *(CSRC / op / "cpu.cpp" for op in ops)]
        command = [*cpu, *bindings, *CPU_FLAGS, *defines, *flags]
        of_module[f"_cpu_{isa}"] = glue + [step(f"{isa}_{s.parent.name}", command, s) for s in sources]
    if architecture:
        assert nvcc is not None
        folders = listed("CUDA_FOLDERS", "cmake/cuda.cmake")
        version = _nvcc_version(nvcc)
        defines = ["-DMEDACCEL_MODULE=_cuda", f'-DMEDACCEL_CUDA_ARCHS="{architecture}"']
        defines.append(f'-DMEDACCEL_CUDA_VERSION="{version}"')
        host = [*cpu, *bindings, "-O1", *defines]
        kernels = [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DNDEBUG"]
        for code in ("sm", "compute"):  # machine code, and PTX for later GPUs
            kernels += ["-gencode", f"arch=compute_{architecture},code={code}_{architecture}"]
        of_module["_cuda"] = [
            step("cuda_module", host, CSRC / "cuda_module.cpp"),
            *(step(f"cuda_bind_{f}", host, CSRC / f / "bind_cuda.cpp") for f in folders),
            *(step(f"cuda_{f}", kernels, CSRC / f / "cuda.cu") for f in folders),
        ]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        for _ in pool.map(lambda pair: _run(pair[1]), steps):
            pass
    for name, objects in of_module.items():
        link = [*compiler.split(), "-shared", "-fopenmp", "-s", *map(str, objects)]
        if name == "_cuda":
            assert nvcc is not None
            # nvcc knows where its libraries are, also where the one on PATH is a script beside no toolkit.
            link = [nvcc, "-shared", "-cudart", "static", *map(str, objects)]
            link += [f"-L{Path(nvcc).resolve().parents[1] / 'lib'}"]  # of NVIDIA's PyPI packages
            link += ["-Xlinker", "-s", "-Xlinker", "--exclude-libs,ALL", "-lpthread", "-ldl", "-lrt"]
        new = PACKAGE / f".{name}.new"
        _run([*link, "-o", str(new)])
        os.replace(new, PACKAGE / f"{name}{SUFFIX}")
    return list(of_module)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")


def _nvcc_version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return found[1] if found else "unknown"


def build_with_cmake(architecture: str | None) -> None:
    """Has setup.py build."""
    environment = {**os.environ, "MEDACCEL_CUDA": "1" if architecture else "0"}
    if architecture:
        environment["MEDACCEL_CUDA_ARCHS"] = architecture
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment)
    if done.returncode != 0:
        raise RuntimeError("setup.py could not build; the reason is in the lines above")


def ensure(architecture: str | None, folder: Path) -> str:
    """Builds what is missing, and says what was done."""
    missing = is_current(architecture)
    if missing is None:
        return "built before"
    if has_cmake():
        build_with_cmake(architecture)
        return f"built by CMake, since {missing}"
    names = build(architecture, folder)
    return f"built {', '.join(names)} with g++ and nvcc alone, since {missing}"
