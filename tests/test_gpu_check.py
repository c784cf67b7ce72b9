# SPDX-License-Identifier: Apache-2.0
"""Tests tools/gpu_check: what crashes or hangs loses nothing else; exit statuses, resuming, the page, the plan."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from gpu_checks import (  # noqa: E402
    command,
    native_build,
    network,
    plan,
    records,
    speed,
    speed_attention,
    summary,
)
from gpu_checks.context import Context, Stage  # noqa: E402
from gpu_checks.runner import Runner  # noqa: E402

from medaccel.ops._registry import OPS, Kernel  # noqa: E402
from medaccel.ops.window_attention import verify as attention_verify  # noqa: E402
from medaccel.ops.window_attention.cases import Case  # noqa: E402


def stage(name: str, limit: float = 60.0, item_limit: float = 30.0, **options) -> Stage:
    return Stage(name, 1, "tests.planted_stages", limit, item_limit, **options)


def run(out: Path, *stages: Stage, seconds: float = 120.0, workers: int = 1) -> summary.Outcome:
    out.mkdir(exist_ok=True)
    records.append(out / "results.jsonl", {"kind": "run", "device": "cpu"})
    Runner(out, "cpu", seconds, workers).run(stages)
    return summary.Outcome.of(*records.read(out / "results.jsonl"), planned=[s.name for s in stages])


def ends(outcome: summary.Outcome) -> dict[str, str]:
    return {r["item"]: f"{r['status']} {r.get('error', '')}".strip() for r in outcome.found if r["kind"] == "end"}


# --- what ends badly ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("how", "end"),
    [
        ("exit", "crashed ended with status 7"),
        ("signal", "crashed killed by SIGSEGV"),
        ("raise", "failed RuntimeError: a kernel's"),
        ("half a line", "crashed ended early"),
    ],
)
def test_a_step_that_ends_badly_loses_nothing_of_the_others(how: str, end: str, tmp_path: Path):
    outcome = run(tmp_path, stage(f"numbers:fine,{how},fine"), stage("numbers:fine"))
    assert ends(outcome)[f"1 {how}"] == end
    assert [r["status"] for r in outcome.found if r["kind"] == "end"].count("done") == 3
    said = [r for r in outcome.found if r["kind"] == "check"]
    assert len(said) == 4, "what was said before the end is kept, and so is what came after"
    assert all(r["held"] for r in said)
    assert outcome.status == 1
    assert outcome.broken == (how == "half a line")


def test_a_step_that_hangs_is_ended_and_the_next_runs(tmp_path: Path):
    outcome = run(tmp_path, stage("numbers:hang,fine", item_limit=1.5))
    assert ends(outcome) == {"0 hang": "timed out no answer for 1.5 s", "1 fine": "done"}
    assert "said after" not in str(outcome.found)


def test_a_stage_has_a_time_of_its_own_and_what_was_not_reached_says_so(tmp_path: Path):
    outcome = run(tmp_path, stage("numbers:hang,fine", limit=2.0), stage("numbers:fine"))
    assert ends(outcome)["0 hang"].startswith("timed out the stage's time was over")
    assert ends(outcome)["1 fine"].startswith("not run")
    assert ends(outcome)["0 fine"] == "done"


def test_a_stage_that_can_not_start_is_reported_with_its_last_word(tmp_path: Path):
    outcome = run(tmp_path, stage("numbers:no start"), stage("numbers:fine"))
    assert ("numbers:no start", "", "crashed: ended with status 1; no driver") in outcome.unfinished
    assert ends(outcome) == {"0 fine": "done"}


def test_the_whole_time_ends_and_later_stages_say_so(tmp_path: Path):
    outcome = run(tmp_path, stage("numbers:hang"), stage("numbers:fine"), seconds=1.5)
    assert ("numbers:fine", "", "not run: no time was left") in outcome.unfinished


def test_stages_that_time_nothing_run_together_and_others_alone(tmp_path: Path):
    stages = [stage(f"slow:{i}", together=i < 2) for i in range(3)]
    outcome = run(tmp_path, *stages, workers=4)
    began, ended = (
        [
            next(r["value"] for r in outcome.found if r.get("stage") == s.name and r.get("name") == what)
            for s in stages
        ]
        for what in ("began", "ended")
    )
    assert max(began[:2]) < min(ended[:2])
    assert began[2] > max(ended[:2])


def test_a_stage_gets_its_environment(tmp_path: Path):
    outcome = run(tmp_path, stage("environment", environment={"PLANTED": "1"}))
    assert [r["value"] for r in outcome.found if r["kind"] == "fact"] == ["1"]


# --- statuses, resuming ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "status"),
    [
        (("numbers:fine", "speed:one"), 0),
        (("numbers:fine,wrong", "speed:one"), 1),
        (("contracts:exit",), 1),
        (("numbers:fine", "warming:exit"), 3),
    ],
)
def test_the_exit_status_is_0_only_where_everything_holds(names: tuple[str, ...], status: int, tmp_path: Path):
    assert run(tmp_path, *map(stage, names)).status == status


def test_a_check_that_was_not_run_is_not_one_that_held():
    found = [{"kind": "run", "device": "cpu"}]
    found += [{"kind": "check", "stage": "numbers:x", "name": str(h), "held": h, "note": "n"} for h in (True, None)]
    outcome = summary.Outcome.of(found, 0, planned=[])
    assert outcome.verdict.startswith(
        "DRY RUN on the CPU, which says nothing of a GPU: 1 of 1 checks hold, 1 were not"
    )


def test_resuming_runs_only_what_did_not_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "source_digest", lambda: "same")
    stages = [stage("numbers:fine"), stage("numbers:fine,exit,raise")]
    assert command.run(stages, tmp_path, "cpu", 100, False, 1) == 1
    before, _ = records.read(tmp_path / "results.jsonl")
    (tmp_path / "mended").touch()
    assert command.run(stages, tmp_path, "cpu", 100, True, 1) == 1  # what raised has an answer, and keeps it
    after, _ = records.read(tmp_path / "results.jsonl")
    begun = [r["item"] for r in after[len(before) :] if r["kind"] == "begin"]
    assert begun == ["1 exit"]
    outcome = summary.Outcome.of(after, 0, planned=[s.name for s in stages])
    assert [item for _, item, _ in outcome.unfinished] == ["2 raise"]


def test_results_of_another_source_or_again_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "source_digest", lambda: "one")
    one = [stage("numbers:fine")]
    with pytest.raises(ValueError, match=r"results\.jsonl is not there: there is nothing to resume"):
        command.run(one, tmp_path, "cpu", 100, True, 1)
    assert command.run(one, tmp_path, "cpu", 100, False, 1) == 0
    with pytest.raises(ValueError, match=r"has results of numbers:fine already; --resume goes on"):
        command.run(one, tmp_path, "cpu", 100, False, 1)
    assert command.run([stage("speed:one")], tmp_path, "cpu", 100, False, 1) == 0  # another part, the same folder
    monkeypatch.setattr(command, "source_digest", lambda: "two")
    with pytest.raises(ValueError, match=r"is of another source \(one, now two\); --out names another folder"):
        command.run(one, tmp_path, "cpu", 100, True, 1)


TERMINATED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from gpu_checks import command
from gpu_checks.context import Stage
stages = [Stage(f"numbers:{how}", 1, "tests.planted_stages", 60) for how in ("fine", "hang", "fine,fine")]
sys.exit(command.run(stages, Path(sys.argv[3]), "cpu", 100, False, 1))
"""


def test_a_command_that_is_terminated_still_writes_its_summary(tmp_path: Path):
    arguments = [sys.executable, "-c", TERMINATED, str(ROOT), str(ROOT / "tools"), str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end and "0 hang" not in _text(tmp_path / "results.jsonl"):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 130
    text = _text(tmp_path / "summary.txt")
    assert re.search(r"numbers:hang +interrupted: the command was interrupted", text)
    assert re.search(r"numbers:fine,fine +not run: the command was interrupted", text)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


# --- the page, the options ---------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Counts tags that stay open, and what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_well_formed_needs_nothing_and_escapes(tmp_path: Path):
    outcome = run(tmp_path, stage("numbers:fine,wrong,exit"), stage("speed:one"))
    page = Page()
    page.feed(outcome.html())
    assert page.open == []
    assert page.loaded == []
    assert "<2> & 3" in page.words
    assert "clock" in page.words
    assert "<none>" in page.words
    text = outcome.text()
    assert "two is three" in text
    assert "crashed: ended with status 7" in text


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--device", "tpu"], "device is 'tpu'; expected cuda, cuda:1 or cpu"),
        (["--device", "cpu", "--limit", "0"], "limit is 0; expected seconds, more than 0"),
        (["--device", "cpu", "--stage", "number"], "stage is 'number'; expected one of facts, build, warm, numbers"),
        (["--device", "cpu", "--resume", "--out", "/nowhere/at/all"], "there is nothing to resume"),
    ],
)
def test_options_that_make_no_sense_are_refused(argv: list[str], sentence: str, capsys: pytest.CaptureFixture):
    assert command.main(argv) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dry_run_is_named(capsys: pytest.CaptureFixture):
    assert command.main([]) == 2
    assert "device is cuda, but torch sees 0 GPUs here; --device cpu is a dry run" in capsys.readouterr().err


# --- the plan ----------------------------------------------------------------------------------------------------
def test_every_op_has_its_stages():
    names = [stage.name for stage in plan.plan("cuda")]
    assert len(names) == len(set(names))
    for op, row in OPS.items():
        assert {f"numbers:{op}", f"contracts:{op}", f"speed:{op}"} <= set(names)
        assert (f"sanitizer:{op}" in names) == isinstance(row.kernels["cuda"], Kernel)
    dry = {stage.name: stage for stage in plan.plan("cpu")}
    assert set(names) - set(dry) == {f"warm:{i}" for i in range(1, 8)}
    assert dry["executed:shifted_window_attention"].environment == {"TRITON_INTERPRET": "1"}
    assert dry["executed:gaussian_filter"].environment == {}


def test_the_bare_build_has_the_lists_and_flags_of_cmake():
    text = (ROOT / "csrc" / "CMakeLists.txt").read_text(encoding="utf-8")
    assert set(native_build.listed("OPS")) == {row.folder for row in OPS.values()}
    assert " ".join(native_build.CPU_FLAGS) in text
    assert set(native_build.isas()) >= {"baseline"}
    for isa, flags in native_build.isas().items():
        assert f"medaccel_cpu_module({isa}{''.join(f' {flag}' for flag in flags)})" in text
    folders = native_build.listed("CUDA_FOLDERS", "cmake/cuda.cmake")
    assert set(folders) == {source.parent.name for source in (ROOT / "csrc").glob("*/cuda.cu")}
    assert (native_build.pybind11_include() / "pybind11" / "pybind11.h").exists()


@pytest.mark.slow
def test_the_command_runs_here_with_the_kernels_of_one_op(tmp_path: Path):
    stages = ("facts", "build", "warm", "numbers:instance_norm_act", "speed:instance_norm_act")
    chosen = [word for name in stages for word in ("--stage", name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_check"), "--device", "cpu", "--out", str(tmp_path), *chosen],
        capture_output=True, text=True, env=environment, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN on the CPU" in done.stdout
    found, broken = records.read(tmp_path / "results.jsonl")
    assert broken == 0
    numbers = [r for r in found if r["kind"] == "check" and r["stage"].startswith("numbers")]
    assert sum(r["held"] is True for r in numbers) >= 12
    assert {r["note"] for r in numbers if r["held"] is None} == {"not run: no GPU"}
    ways = {r["contender"] for r in found if r["kind"] == "speed" and r["ms"] is not None}
    assert ways == {"medaccel", "PyTorch", "torch's instance norm"}


# --- what is timed -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_peer_whose_result_differs_is_not_timed(dtype: torch.dtype):
    work = OPS["gaussian_filter"].load("verifier").work(torch.device("cpu"), dtype, "signal, numbers")
    ways = {"medaccel": work.forward, "same": work.forward, "other": lambda x: 1.2 * work.forward(x)}
    ways["refuses"] = lambda x: torch.nn.functional.conv3d(x, x)
    context = Context("speed:gaussian_filter", "cpu", Path())
    rows = {r["contender"]: r for r in speed.race(context, "", [work], ways, training=True)}
    assert rows["medaccel"]["ms"] > 0
    assert rows["same"]["ms"] > 0
    assert rows["other"]["ms"] is None
    assert rows["other"]["note"].startswith("result 0 is off by")
    assert rows["refuses"]["note"].startswith("RuntimeError: ")


@pytest.mark.parametrize("shift", [0, 3])
def test_the_attentions_peers_do_the_same_work(shift: int):
    case = Case("", (8, 9, 8), (7, 7, 7), (shift,) * 3, 2, 8)
    work = attention_verify.work_of(case, torch.device("cpu"), torch.float32, "")
    sdpa = speed_attention.around(case, speed_attention._with_sdpa(SDPBackend.MATH))
    for ours, theirs in zip(work.run(), replace(work, forward=sdpa).run(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert str(speed_attention.Configuration(case, torch.float32, False)).startswith("8³, 2 × 8, ")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_dgrad_implicit_gemm_indexed_bf16", "convolution"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<float>", "convolution"),
        ("void at::native::batch_norm_collect_statistics_kernel<float>", "norm"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_nn", "product"),
        ("fmha_cutlassB_bf16_aligned_64x64_k32_sm80", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", "element by element"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("something_else", "other"),
    ],
)
def test_a_kernel_has_a_class(name: str, kind: str):
    assert network.kernel_class(name) == kind
