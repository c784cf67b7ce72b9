# SPDX-License-Identifier: Apache-2.0
"""The build finds nvcc in the environment, the toolkit, or NVIDIA's PyPI packages, which suffice."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
CUDA_VERSION = "13.0"
PYPI_IS_AWAY = ("connection broken", "Max retries exceeded", "Connection refused", "ConnectTimeout")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, on a machine that has no nvcc: none in the environment, no toolkit, no packages."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("medaccel_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folders = [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep)]  # CMake's is the first
    monkeypatch.setenv("PATH", os.pathsep.join(f for f in folders if not (Path(f) / "nvcc").exists()))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "TOOLKIT", tmp_path / "toolkit")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    without = [p for p in sys.path if not list(Path(p).glob("nvidia/cu*/bin/nvcc"))]
    monkeypatch.setattr(sys, "path", without)
    return module


def fake_nvcc(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvcc").write_text("#!/bin/sh\n")
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def test_a_machine_without_nvcc_has_none(script: ModuleType):
    assert script.find_nvcc() is None


def test_the_users_choice_goes_before_the_toolkit_and_that_before_the_packages(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake_nvcc(tmp_path / "site-packages" / "nvidia" / "cu12" / "bin")
    newer = fake_nvcc(tmp_path / "site-packages" / "nvidia" / "cu13" / "bin")
    assert script.find_nvcc() == newer
    toolkit = fake_nvcc(tmp_path / "toolkit" / "bin")
    assert script.find_nvcc() == toolkit
    on_path = fake_nvcc(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert script.find_nvcc() == on_path
    monkeypatch.setenv("CUDACXX", "/opt/cuda/bin/nvcc")
    assert script.find_nvcc() == "/opt/cuda/bin/nvcc"


def test_packages_elsewhere_on_the_module_path_are_found(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = fake_nvcc(tmp_path / "target" / "nvidia" / "cu13" / "bin")
    monkeypatch.syspath_prepend(tmp_path / "target")
    assert script.find_nvcc() == found


def test_the_linker_is_told_of_the_packages_lib_folder_before_the_users(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nvcc = fake_nvcc(tmp_path / "nvidia" / "cu13" / "bin")
    monkeypatch.setenv("LIBRARY_PATH", "/opt/lib")
    assert script.build_environment(nvcc)["LIBRARY_PATH"] == "/opt/lib"  # a toolkit's nvcc knows its lib64
    library = tmp_path / "nvidia" / "cu13" / "lib"
    library.mkdir()
    assert script.build_environment(nvcc)["LIBRARY_PATH"] == f"{library}{os.pathsep}/opt/lib"
    monkeypatch.delenv("LIBRARY_PATH")
    assert script.build_environment(nvcc)["LIBRARY_PATH"] == str(library)


def test_cuda_asked_for_without_nvcc_stops_with_the_sentence_that_helps(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MEDACCEL_CUDA", "1")
    build = script.CMakeBuild(setuptools.Distribution())
    with pytest.raises(SystemExit) as stop:
        build.run()
    assert "MEDACCEL_CUDA=1 asks for the CUDA kernels, but no nvcc was found" in stop.value.code
    assert f"pip install {script.NVCC_PACKAGES}" in stop.value.code


@pytest.fixture
def nvcc_packages(script: ModuleType, tmp_path: Path) -> Iterator[Path]:
    """The folder of NVIDIA's packages from PyPI; skips where that can't be reached, and only then."""
    target = tmp_path / "site-packages"
    packages = [f"{name}=={CUDA_VERSION}.*" for name in script.NVCC_PACKAGES.split()]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries=1", "--timeout=20"]
    result = subprocess.run([*command, f"--target={target}", *packages], capture_output=True, text=True, timeout=300)
    if any(sign in result.stderr for sign in PYPI_IS_AWAY):
        pytest.skip("PyPI can't be reached, from which nvcc's packages come")
    assert result.returncode == 0, result.stderr
    yield target
    shutil.rmtree(target)  # 270 MB, which pytest would keep


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="nvcc's packages are used on Linux")
def test_nvcc_from_pypi_is_found_and_compiles_a_kernel_where_no_toolkit_is_installed(
    script: ModuleType, nvcc_packages: Path, tmp_path: Path
):
    if not shutil.which("g++"):
        pytest.skip("g++ is not here, or only in the folder that holds an nvcc too")
    nvcc = script.find_nvcc()
    assert nvcc == str(nvcc_packages / "nvidia" / "cu13" / "bin" / "nvcc")

    environment, build = script.build_environment(nvcc), tmp_path / "build"
    configure = script.configure_command(build, tmp_path / "install", cuda="1", archs="80", nvcc=nvcc)
    target = Path("CMakeFiles") / "_cuda.dir" / "probe" / "cuda.cu.o"
    output = ""
    for command in (configure, ["cmake", "--build", str(build), "--verbose", "--target", str(target)]):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        output += result.stdout
        assert result.returncode == 0, output + result.stderr
    # CMake links a program before it trusts a compiler: the packages' runtime library was found too.
    assert f"CUDA kernels: nvcc {CUDA_VERSION}." in output
    compilation = next(line for line in output.splitlines() if "probe/cuda.cu" in line and " -c " in line)
    assert nvcc in compilation
    assert "arch=compute_80,code=[sm_80]" in compilation
    assert b".nv_fatbin" in (build / target).read_bytes()


def options_of_compilers(build: Path) -> str:
    return "\n".join(line for line in (build / "build.ninja").read_text().splitlines() if "FLAGS = " in line)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not here")
def test_warnings_are_errors_in_the_projects_own_builds_alone(tmp_path: Path):
    """A newer nvcc, which warns of more, must still build the kernels for a user."""
    spec = importlib.util.spec_from_file_location("medaccel_setup", ROOT / "setup.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **options: None)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    build, found = tmp_path / "build", {}
    for werror in ("0", "1"):
        command = module.configure_command(
            build, tmp_path / "install", cuda="1", archs="80", nvcc=shutil.which("nvcc"), werror=werror
        )
        if werror == "1":
            command.remove("--fresh")  # the compilers are known
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
        found[werror] = options_of_compilers(build)
    assert "-O3 --threads=4" in found["0"]
    assert "-Werror" not in found["0"]
    assert "-Werror=all-warnings" in found["1"]
