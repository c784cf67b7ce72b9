# SPDX-License-Identifier: Apache-2.0
"""`medaccel verify`: its peers, and that it runs where there is only torch and numpy. (The command: test_cli.py.)"""

import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from medaccel import verify
from medaccel.ops import _checks, _conditions, _isolated
from medaccel.ops._registry import OPS, Op
from medaccel.ops.gaussian import verify as gaussian_verify
from medaccel.ops.window_attention import verify as attention_verify

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


# --- a check that takes its process with it ----------------------------------------------------------------------
WORKER = """
import json, os, signal, sys, time
import torch
from medaccel.ops import _checks, _isolated

def work(device, dtype, case):
    if dtype == torch.float64:
        if case == "exits": os._exit(7)
        if case == "killed": os.kill(os.getpid(), signal.SIGKILL)
        if case == "hangs": time.sleep(60)
        if case == "raises": raise RuntimeError("CUDA error: misaligned address")
        if case == "half a line":
            os.write(1, b'{"check": {"op"'); os._exit(0)
    x = torch.ones(3, device=device, dtype=dtype)
    return _checks.Work("double", case, None, lambda x: 2 * x, [x], (1.0, 1.0), grads=[x])

def speeds(device):
    yield _checks.Speed("double", str(device), "three", 1.0, 1.0, None, "copy", 1.0)
    os.abort()

cases = os.environ["CASES"].split(",")
def write(record): print(json.dumps(record), flush=True)
name, device, first, speed = sys.argv[1:]
verifier = _checks.Verifier(cases, work, speeds, "production")
_isolated.serve(verifier, name, torch.device(device), int(first), speed == "1", write)
"""


def run_worker(cases: str, monkeypatch: pytest.MonkeyPatch, speed: bool = False, limit: float = 60.0):
    monkeypatch.setenv("CASES", cases)
    command = (sys.executable, "-c", WORKER)
    return list(_isolated.isolated("double", torch.device("cpu"), speed, command=command, limit=limit))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("exits", "ended with status 7"),
        ("killed", "killed by SIGKILL"),
        ("raises", "RuntimeError: CUDA error: misaligned address"),
        ("half a line", "ended with status 0"),
    ],
)
def test_a_check_that_crashes_takes_no_other_with_it(case: str, fault: str, monkeypatch: pytest.MonkeyPatch):
    results = run_worker(f"before,{case},after", monkeypatch)
    failed = [r for r in results if not r.passed]
    assert [(r.case, r.dtype) for r in failed] == [(case, "float64")]
    assert failed[0].fault.startswith(fault)
    assert len(results) == 3 * len(_checks.FLOOR)


@pytest.mark.slow
def test_a_check_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    results = run_worker("hangs,after", monkeypatch, limit=20.0)
    assert [(r.case, r.fault) for r in results if not r.passed] == [("hangs", "no answer for 20 s")]
    assert len(results) == 2 * len(_checks.FLOOR)


@pytest.mark.slow
def test_timings_that_crash_are_reported_beside_those_that_were_taken(monkeypatch: pytest.MonkeyPatch):
    results = run_worker("fine", monkeypatch, speed=True)
    *checks, timed, crashed = results
    assert all(check.passed for check in checks)
    assert timed.kernel_ms == 1.0
    assert (crashed.case, crashed.passed) == ("timings", False)
    assert "SIGABRT" in crashed.fault
    text = str(verify.Verification([], [*checks, crashed], [timed]))
    assert "FAILED double cpu  timings: killed by SIGABRT" in text


def test_a_process_that_never_starts_is_one_failure():
    command = (sys.executable, "-c", "raise SystemExit('no driver')")
    (failed,) = _isolated.isolated("double", torch.device("cpu"), False, command=command)
    assert failed.fault == "ended with status 1; no driver"


# --- conditions ----------------------------------------------------------------------------------------------------
def test_conditions_find_what_depends_on_repeats_and_on_dirty_memory():
    counter = iter(range(100))

    def work(forward: Callable[[Tensor], Tensor]) -> _checks.Work:
        return _checks.Work("f", "", None, forward, [torch.ones(4)], (1.0, 1.0), grads=[torch.ones(4)])

    def faults(forward: Callable[[Tensor], Tensor]) -> list[str]:
        one = work(forward)
        return _conditions.faults(one, one.run(), _conditions.CONDITIONS)

    assert faults(lambda x: 2 * x) == []
    assert faults(lambda x: x + next(counter))[0] == "repeated: other bits in result 0"

    def unwritten(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:3] = x[:3]
        return x + torch.where(y.isnan(), y, 0)

    assert faults(unwritten) == ["poisoned memory: other bits in result 0"]


def test_the_attention_is_timed_with_an_index_whose_gathers_differ():
    one = attention_verify.work(torch.device("cpu"), torch.float32, "swin_unetr")
    index = one.others[0]
    assert index.unique().numel() == 13**3


def test_scalars_are_checked_on_the_host_and_on_the_device():
    for op, on_host, on_device in (
        ("gaussian_filter", "volume, numbers", "volume, reflect"),
        ("diffusion_step", "ddpm", "ddpm, scalars on the device"),
        ("pixel_contrastive_loss", "volume, radius a number", "volume"),
        ("pixel_consistency_loss", "volume, radius a number", "volume"),
        ("nt_xent_loss", "sharp", "sharp, learnt temperature"),
        ("shifted_window_attention", "swin_unetr", "swin_unetr, learnt scale"),
    ):
        verifier = OPS[op].load("verifier")
        assert {on_host, on_device} <= set(verifier.cases)
        count = [len(verifier.work(torch.device("cpu"), torch.float32, name).others) for name in (on_host, on_device)]
        assert count[0] < count[1], op


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_op_has_a_case_as_large_as_in_practice(op: Op):
    one = op.load("verifier")
    assert one.production not in one.cases
    work = one.work(torch.device("cpu"), torch.bfloat16, one.production)
    assert max(t.numel() for t in work.tensors) >= 2**18


def test_on_a_gpu_every_op_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def isolated(op: str, device: torch.device, speed: bool):
        asked.append((op, str(device), speed))
        yield _checks.Check(op, str(device), "float32", "case", "its kernel", 0.5, True)
        yield _checks.Speed(op, str(device), "case", 1.0, 2.0, None, "copy", 0.5)

    monkeypatch.setattr(verify, "isolated", isolated)
    monkeypatch.setattr(verify, "doctor", lambda: verify.Verification([]))
    monkeypatch.setattr(verify.Verification, "facts", [], raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = verify.verify(devices=["cuda:0"])
    assert asked == [(op, "cuda:0", True) for op in OPS]
    assert [check.op for check in outcome.checks] == [speed.op for speed in outcome.speeds] == list(OPS)
