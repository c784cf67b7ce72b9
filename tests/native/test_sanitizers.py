# SPDX-License-Identifier: Apache-2.0
"""csrc's CPU kernels without torch: under sanitizers, and on an emulated old processor."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import medaccel

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=gnu++17", "-g1", "-O1", "-ffp-contract=off", "-fopenmp", "-Wno-psabi"]
CHECKED = {
    "gaussian": 2880,
    "instance_norm": 2304,
    "pixel_consistency": 252,
    "pixel_contrast": 192,
    "propagation": 54,
    "window_attention": 128,
    "diffusion_step": 1552,
}


def build(target: Path, op: str, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not here")
    sources = [str(ROOT / f"tests/native/{op}_driver.cpp"), str(ROOT / f"csrc/{op}/cpu.cpp")]
    subprocess.run([compiler, *FLAGS, *flags, *sources, "-o", str(target)], check=True, timeout=300)
    return target


# 64: AVX-512's loops without its instructions, so that they run on any processor.
@pytest.mark.parametrize(
    ("op", "register_bytes"),
    [("gaussian", 16), *((op, width) for op in CHECKED if op != "gaussian" for width in (16, 64))],
)
def test_kernel_is_right_and_clean_under_address_and_undefined_behaviour_sanitizers(
    op: str, register_bytes: int, tmp_path: Path
):
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    driver = build(tmp_path / "asan", op, f"-DMEDACCEL_REGISTER_BYTES={register_bytes}", *sanitize)
    result = subprocess.run([str(driver)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{CHECKED[op]} checked, 0 failed" in result.stdout


# Nehalem (2008) has SSE4.2 and nothing newer: an AVX instruction that slipped into the baseline is illegal there.
BASELINE = """
import array, importlib.util, sys
spec = importlib.util.spec_from_file_location("medaccel._cpu_baseline", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa, module.supported_isas())
shape, strides, n = [1, 1, 9, 10, 11], [990, 990, 110, 11, 1], 990
x = array.array("f", [i % 7 for i in range(n)])
y = array.array("f", [float("nan")] * n)
address = lambda a: a.buffer_info()[0]
settings = [4.0, 0, 1, True, False, 2]  # truncated, erf, reflect, normalize, not the adjoint, threads
assert module.gaussian_filter(address(x), address(y), 0, shape, strides, strides, [1.0] * 3, *settings)
assert abs(sum(y) - sum(x)) < 1e-2 * sum(x) and min(y) > 0
print("sum", sum(y))
"""


def baseline_module() -> Path:
    found = sorted(Path(medaccel.__file__).parent.glob(f"_cpu_baseline*{sysconfig.get_config_var('EXT_SUFFIX')}"))
    assert found, "the baseline module is not built"
    return found[0]


def test_the_baseline_module_runs_on_a_2008_processor():
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("qemu-x86_64 (Debian's qemu-user) is not here")
    python = str(Path(sysconfig.get_config_var("BINDIR")) / f"python{sysconfig.get_python_version()}")
    command = [qemu, "-cpu", "Nehalem", python, "-I", "-c", BASELINE, str(baseline_module())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "baseline ['baseline']" in result.stdout


def test_qemus_old_processor_really_refuses_avx(tmp_path: Path):
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("qemu-x86_64 (Debian's qemu-user) is not here")
    driver = build(tmp_path / "avx2", "gaussian", "-mavx2", "-mfma")
    result = subprocess.run([qemu, "-cpu", "Nehalem", str(driver)], capture_output=True, timeout=300)
    assert result.returncode != 0
