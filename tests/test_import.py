# SPDX-License-Identifier: Apache-2.0
"""`import medaccel` costs little beyond torch, and brings nothing along that only the pipelines need."""

import subprocess
import sys

import pytest

# Each is imported when something that needs it is first used.
HEAVY = (
    *("monai", "lightning", "lightning_fabric", "torchmetrics", "tensorboard", "einops", "triton"),
    *("jsonargparse", "yaml", "tqdm", "joblib", "distributed", "jinja2"),
    *("scipy", "skimage", "matplotlib", "nibabel", "pydicom", "SimpleITK"),
    *("torch._dynamo", "torch._inductor", "torch.onnx._internal.exporter", "torch.distributed.fsdp"),
)
SECONDS = 0.3

# Processor time, not the clock's: other programs may be running.
MEASURE = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import medaccel
seconds = time.process_time() - start
print(seconds, *(name for name in set(sys.modules) - before if name in {heavy!r}))
"""


def _import(heavy: tuple[str, ...] = HEAVY) -> tuple[float, list[str]]:
    code = MEASURE.format(heavy=heavy)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    seconds, *found = result.stdout.split()
    return float(seconds), found


def test_the_import_is_light():
    attempts = [_import() for _ in range(2)]
    assert attempts[0][1] == []
    assert min(seconds for seconds, _ in attempts) < SECONDS


def test_what_an_import_brings_along_is_seen():
    assert _import(("medaccel.ops", "monai"))[1] == ["medaccel.ops"]


@pytest.mark.parametrize("command", [["--version"], ["doctor"]])
def test_small_commands_import_no_pipeline(command: list[str]):
    code = f"""
import sys
from medaccel.cli import main
try:
    main({command!r})
except SystemExit:
    pass
heavy = {{"monai", "lightning", "scipy", "matplotlib", "skimage"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
