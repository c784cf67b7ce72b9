# SPDX-License-Identifier: Apache-2.0
"""Tests how the package builds: sdist, wheel, clear refusals; with build isolation, without torch."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`python -m build`: the sdist, and the wheel built from it; no CUDA, which tests/gpu covers."""
    folder = tmp_path_factory.mktemp("dist")
    result = python("-m", "build", "--outdir", str(folder), str(ROOT), MEDACCEL_CUDA="0")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "orch" not in "".join(line for line in result.stdout.splitlines() if line.startswith("* Installing"))
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.slow
def test_sdist_holds_the_sources_and_nothing_built(distributions: tuple[Path, Path]):
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"csrc/CMakeLists.txt", "csrc/gaussian/cpu.cpp", "csrc/common/parallel.h", "LICENSE", "setup.py"} <= names
    assert "medaccel/report/report.html.j2" in names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.mark.slow
def test_wheel_works_where_nothing_but_torch_is_there(distributions: tuple[Path, Path], tmp_path: Path):
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    modules = {Path(name).name.split(".")[0] for name in names if name.endswith(".so")}
    assert modules == {"_cpu_baseline", "_cpu_avx2", "_cpu_avx512"}
    assert "medaccel/report/report.html.j2" in names
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch, medaccel; "
        "assert medaccel.__file__.startswith(sys.path[0]), medaccel.__file__; "
        "print(medaccel.ops.gaussian_filter(torch.ones(1, 1, 9), 1.0, mode='reflect', normalize=True).sum())"
    )
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "9." in result.stdout


def build_extension(tmp_path: Path, **env: str) -> subprocess.CompletedProcess:
    command = ["setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return python(*command, **env)


def test_without_a_compiler_the_build_names_one(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    result = build_extension(tmp_path, PATH=str(tmp_path / "bin"), CXX="")
    assert result.returncode != 0
    assert "no C++ compiler was found. Install one (Debian/Ubuntu: apt-get install g++" in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("MEDACCEL_CUDA", "yes", "auto, 0 or 1"),
        ("MEDACCEL_CUDA_ARCHS", "sm_90", "numbers such as 80;90;100"),
        ("MEDACCEL_WERROR", "all", "0 or 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(name: str, value: str, expected: str, tmp_path: Path):
    result = build_extension(tmp_path, **{name: value})
    assert result.returncode != 0
    assert f"medaccel: {name} is '{value}'; expected {expected}" in result.stderr
