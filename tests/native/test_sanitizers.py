# SPDX-License-Identifier: Apache-2.0
"""Runs csrc's CPU kernels without torch: under sanitizers, and on an emulated old processor."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import medaccel
from tests.compiled import compiler_is_missing, execute
from tests.native.kernel_drivers import ADDRESS_AND_BEHAVIOUR, THREAD, build, exchanged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler_is_missing() is not None, reason=str(compiler_is_missing())),
]

# How much each driver checks: of everything, and of what runs in several threads.
CHECKED = {
    "gaussian": (3170, 50),
    "instance_norm": (4952, 576),
    "pixel_consistency": (1848, 126),
    "nt_xent": (2488, 1256),
    "pixel_contrast": (822, 417),
    "propagation": (658, 70),
    "window_attention": (728, 104),
    "diffusion_step": (2992, 1616),
}


# 64: AVX-512's loops without its instructions, so that they run on any processor.
@pytest.mark.parametrize(
    ("op", "register_bytes"),
    [("gaussian", 16), *((op, width) for op in CHECKED if op != "gaussian" for width in (16, 64))],
)
def test_kernel_is_right_and_clean_under_address_and_undefined_behaviour_sanitizers(op: str, register_bytes: int):
    driver = build(op, ADDRESS_AND_BEHAVIOUR, f"-DMEDACCEL_REGISTER_BYTES={register_bytes}")
    result = execute([str(driver)])
    assert result.finding is None, result.output
    assert f"{CHECKED[op][0]} checked, 0 failed" in result.output


@pytest.mark.parametrize("op", CHECKED)
def test_jobs_of_a_kernel_do_not_race(op: str):
    result = execute([str(build(op, THREAD, "-DMEDACCEL_REGISTER_BYTES=16")), "races"])
    assert result.finding is None, result.output
    assert f"{CHECKED[op][1]} checked, 0 failed" in result.output


# Outputs larger than the caches are written past them, by instructions that need aligned addresses. No test has time
# for such outputs, so for once every output is large.
@pytest.mark.parametrize(
    ("op", "size"),
    [
        ("gaussian", "kCacheBytes = 32 << 20"),
        ("instance_norm", "kStreamed = int64_t(1) << 25"),
        ("diffusion_step", "kStreamedBytes = int64_t{1} << 23"),
    ],
)
def test_outputs_that_are_written_past_the_caches(op: str, size: str, tmp_path: Path):
    root = exchanged(tmp_path, f"csrc/{op}/cpu.cpp", size, f"{size.split(' = ')[0]} = 64")
    result = execute([str(build(op, ADDRESS_AND_BEHAVIOUR, root=root))])
    assert result.finding is None, result.output
    assert f"{CHECKED[op][0]} checked, 0 failed" in result.output


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


def test_qemus_old_processor_really_refuses_avx():
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("qemu-x86_64 (Debian's qemu-user) is not here")
    driver = build("gaussian", None, "-mavx2", "-mfma")
    result = subprocess.run([qemu, "-cpu", "Nehalem", str(driver)], capture_output=True, timeout=300)
    assert result.returncode != 0
