# SPDX-License-Identifier: Apache-2.0
"""Hands csrc/ to CMake (Ninja generator). Metadata is in pyproject.toml.

Environment: MEDACCEL_CUDA=auto|0|1 (build the CUDA kernels where nvcc is found, never, or fail without it; it is
looked for in CUDACXX, PATH, /usr/local/cuda and NVIDIA's PyPI packages),
MEDACCEL_CUDA_ARCHS (default "80;90;100"), MEDACCEL_WERROR=0|1 (make nvcc's warnings errors, as `make test` does;
default 0).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TOOLKIT = Path("/usr/local/cuda")
NVCC_PACKAGES = "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"


def setting(name: str, default: str, pattern: str, expected: str) -> str:
    """An environment variable, refused in a sentence where it makes no sense."""
    value = os.environ.get(name, default)
    if not re.fullmatch(pattern, value):
        sys.exit(f"medaccel: {name} is {value!r}; expected {expected}")
    return value


def find_nvcc() -> str | None:
    """nvcc of the environment (CUDACXX, PATH, /usr/local/cuda), else of NVIDIA's PyPI packages in this Python."""
    chosen = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if chosen:
        return chosen
    if (TOOLKIT / "bin" / "nvcc").exists():
        return str(TOOLKIT / "bin" / "nvcc")
    # Build isolation hides the packages from sys.path, not the folder that they lie in.
    for folder in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        for found in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True):
            return str(found)
    return None


def build_environment(nvcc: str | None) -> dict[str, str]:
    """NVIDIA's PyPI packages have lib where nvcc looks for lib64: the linker is told of it by LIBRARY_PATH."""
    environment = dict(os.environ)
    if nvcc and (libraries := Path(nvcc).resolve().parents[1] / "lib").is_dir():
        known = [str(libraries), os.environ.get("LIBRARY_PATH")]
        environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, known))
    return environment


def configure_command(
    build: Path, install: Path, *, cuda: str, archs: str, nvcc: str | None, werror: str = "0"
) -> list[str]:
    """CMake's first step, for the folder to build in and the one to install to."""
    import pybind11

    return [
        # --fresh: an earlier build's cache names the ninja and pybind11 of a build environment that is gone.
        "cmake", "--fresh", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_INSTALL_PREFIX={install}",
        f"-DMEDACCEL_CUDA={cuda}",
        *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
        f"-DMEDACCEL_CUDA_ARCHS={re.sub('[ ,]', ';', archs)}",
        f"-DMEDACCEL_WERROR={werror}",
    ]  # fmt: skip


class CMakeBuild(build_ext):
    """Builds every native module in one CMake run."""

    def run(self) -> None:
        if not any(shutil.which(c) for c in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")):
            sys.exit(
                "medaccel: no C++ compiler was found. Install one (Debian/Ubuntu: apt-get install g++; Fedora: dnf "
                "install gcc-c++; conda: conda install cxx-compiler), or set CXX to its path."
            )
        cuda = setting("MEDACCEL_CUDA", "auto", "auto|0|1", "auto, 0 or 1")
        archs = setting("MEDACCEL_CUDA_ARCHS", "80;90;100", r"\d+[af]?([; ,]\d+[af]?)*", "numbers such as 80;90;100")
        werror = setting("MEDACCEL_WERROR", "0", "0|1", "0 or 1")
        nvcc = find_nvcc() if cuda != "0" else None
        if cuda == "1" and nvcc is None:
            sys.exit(
                "medaccel: MEDACCEL_CUDA=1 asks for the CUDA kernels, but no nvcc was found. Install the toolkit "
                f"or, from PyPI: pip install {NVCC_PACKAGES}. Or build without the kernels: MEDACCEL_CUDA=0."
            )
        build = Path(self.build_temp).resolve() / "cmake"
        install = ROOT if self.inplace else Path(self.build_lib).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = configure_command(build, install, cuda=cuda, archs=archs, nvcc=nvcc, werror=werror)
        for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
            if subprocess.run(command, env=build_environment(nvcc)).returncode != 0:
                sys.exit(f"medaccel: `{' '.join(command[:4])} …` failed; the reason is in the lines above.")

    def get_outputs(self) -> list[str]:
        return [str(p) for p in Path(self.build_lib).glob("medaccel/_*.so")]


setup(ext_modules=[Extension("medaccel._native_modules", sources=[])], cmdclass={"build_ext": CMakeBuild})
