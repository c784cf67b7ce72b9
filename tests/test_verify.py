# SPDX-License-Identifier: Apache-2.0
"""`medaccel verify`: its peers, and that it runs where there is only torch and numpy. (The command: test_cli.py.)"""

import json
import re
import subprocess
import sys

import pytest
import torch

from medaccel import verify
from medaccel.ops import _checks
from medaccel.ops._registry import OPS
from medaccel.ops.gaussian import verify as gaussian_verify

# None in sys.modules makes an import fail as if the package were not installed.
BARE = """
import runpy, sys
for name in ("monai", "lightning", "nibabel", "pydicom", "jsonargparse", "scipy", "skimage", "matplotlib", "jinja2",
             "SimpleITK", "tqdm", "yaml"):
    sys.modules[name] = None
runpy.run_module("medaccel.verify", run_name="__main__")
"""


@pytest.mark.slow
def test_verify_runs_and_times_where_only_torch_and_numpy_are():
    result = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all held" in result.stdout
    times = [line for line in result.stdout.splitlines() if "σ = " in line and " cpu " in line]
    assert len(times) == 3
    assert all(re.search(r"ms +[\d.]+× +not here +\d+% of copy$", line) for line in times), times
    attention = [
        line for line in result.stdout.splitlines() if line.startswith("shifted_window_attention") and " ms " in line
    ]
    assert len(attention) == 4
    assert all(re.search(r"ms +[\d.]+× +not here +\d+% of matmul$", line) for line in attention), attention
    steps = [line for line in result.stdout.splitlines() if line.startswith("diffusion_step") and " ms " in line]
    assert len(steps) == 2
    contrast = [line for line in result.stdout.splitlines() if line.startswith("pixel_contrastive_loss")]
    assert re.search(r"12³ pixels, float32 .* not here +\d+% of matmul$", contrast[-1]), contrast
    for op in OPS:
        lines = [line for line in result.stdout.splitlines() if line.startswith(f"{op} ")]
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            (checked,) = (line for line in lines if f" {dtype} " in line and line.endswith("its kernel"))
            assert int(checked.split()[3]) >= 3, checked  # cases
        assert any(" ms " in line for line in lines), f"{op} is not timed"


def test_monai_is_a_peer_where_it_is_installed():
    speed = gaussian_verify.time_filter(torch.device("cpu"), 1.0)
    outcome = verify.Verification([], speeds=[speed])
    (written,) = json.loads(outcome.json())["speeds"]
    assert written["monai_ms"] == speed.monai_ms > 0
    header, row = (line for line in str(outcome).splitlines() if "MONAI" in line or "σ = " in line)
    assert header.index("PyTorch") < header.index("MONAI") < header.index("of ceiling")
    assert f"{speed.monai_ms:.2f} ms" in row
    assert f"{speed.monai_ms / speed.kernel_ms:.1f}×" in row


def test_the_peers_do_the_same_work_as_the_kernel(monkeypatch: pytest.MonkeyPatch):
    results = []
    monkeypatch.setattr(_checks, "median_ms", lambda call, device: results.append(call()) or 1.0)
    gaussian_verify.time_filter(torch.device("cpu"), 2.0)
    ours, plain, monai, _ = results
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, monai, rtol=1e-5, atol=1e-6)
