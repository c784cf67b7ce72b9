# SPDX-License-Identifier: Apache-2.0
"""Reads the options of tools/gpu_check, runs the stages, and writes the summary."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_checks import records, summary
from gpu_checks.context import ROOT, Stage
from gpu_checks.runner import Runner

EPILOG = """\
examples:
  tools/gpu_check                                   # part 1 on the GPU: facts, build, numbers, contracts, speed
  tools/gpu_check --part 2                          # Swin UNETR; needs MONAI; into the same folder
  tools/gpu_check --stage numbers:gaussian_filter --out /tmp/check
  tools/gpu_check --resume                          # what crashed, timed out or was not reached
  tools/gpu_check --device cpu --part all           # a dry run: the same stages where there is no GPU

exit status: 0 where everything ran and all numbers and contracts hold; 1 where one does not, or could not be told;
2 for options that make no sense; 3 where numbers and contracts hold, but a timing or another stage is missing."""

LIMITS = {"1": 8 * 60.0, "2": 10 * 60.0, "all": 18 * 60.0}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    made = argparse.ArgumentParser(
        "tools/gpu_check",
        description="Checks and times every kernel on this machine's GPU, and writes one page about it.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--part", choices=("1", "2", "all"), default="1", help="1: the ops; 2: whole networks")
    made.add_argument("--stage", action="append", metavar="NAME", help="only this stage; may be given again")
    made.add_argument("--out", type=Path, default=Path("gpu_check_results"), help="folder of the results")
    made.add_argument("--limit", type=float, metavar="SECONDS", help="for all stages together (480, 600 or 1080)")
    made.add_argument("--resume", action="store_true", help="go on in the folder: only what has not finished")
    made.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (a dry run)")
    return made


def _device(name: str) -> str:
    """Returns the device's name where torch sees it; ValueError in a sentence elsewhere."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected cuda, cuda:1 or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count <= (device.index or 0):
            raise ValueError(f"device is {name}, but torch sees {count} GPUs here; --device cpu is a dry run")
    return name


def source_digest() -> str:
    """Returns a digest of the sources: results of other sources are not to be mixed."""
    import hashlib

    digest = hashlib.sha256()
    for folder in ("csrc", "medaccel", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".cmake"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _check_folder(out: Path, stages: Sequence[Stage], resume: bool, identity: dict[str, Any]) -> None:
    """ValueError where the folder holds results of these stages, or of another machine or source."""
    file = out / "results.jsonl"
    if not file.exists():
        if resume:
            raise ValueError(f"{file} is not there: there is nothing to resume")
        return
    known, _ = records.read(file)
    runs = [r for r in known if r.get("kind") == "run"]
    for key, value in identity.items():
        before = runs[-1].get(key) if runs else value
        if before != value:
            raise ValueError(f"{file} is of another {key} ({before}, now {value}); --out names another folder")
    there = {r.get("stage") for r in known} & {stage.name for stage in stages}
    if there and not resume:
        raise ValueError(
            f"{file} has results of {min(map(str, there))} already; --resume goes on, --out names another folder"
        )


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run(
    stages: Sequence[Stage], out: Path, device: str, limit: float, resume: bool, workers: int | None = None
) -> int:
    """Runs the stages, writes the summary, and returns the exit status."""
    from gpu_checks.facts import gpu_name

    identity = {"device": device, "GPU": gpu_name(device), "source": source_digest()}
    _check_folder(out, stages, resume, identity)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out is {out}, which can't be made a folder: {error}") from None
    file = out / "results.jsonl"
    records.append(
        file, {"kind": "run", **identity, "when": time.strftime("%Y-%m-%d %H:%M:%S"), "argv": sys.argv[1:]}
    )
    done, items = records.finished(records.read(file)[0])
    waiting = [stage for stage in stages if stage.name not in done]
    if workers is None:
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    before = signal.signal(signal.SIGTERM, _interrupt)
    interrupted = False
    try:
        Runner(out, device, limit, workers).run(waiting, items)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
    outcome = summary.Outcome.of(*records.read(file), planned=[stage.name for stage in stages])
    text = outcome.text()
    (out / "summary.txt").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(outcome.html(), encoding="utf-8")
    print(text)
    print(f"written: {file}, {out / 'summary.txt'}, {out / 'report.html'}")
    return 130 if interrupted else outcome.status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    arguments = parser().parse_args(argv)
    try:
        device = _device(arguments.device)
        if arguments.limit is not None and not arguments.limit > 0:
            raise ValueError(f"limit is {arguments.limit:g}; expected seconds, more than 0")
        from gpu_checks.plan import chosen, plan

        stages = chosen(plan(device), arguments.part, arguments.stage)
        limit = arguments.limit or LIMITS["all" if arguments.stage else arguments.part]
        return run(stages, arguments.out, device, limit, arguments.resume)
    except ValueError as error:
        print(f"tools/gpu_check: {error}", file=sys.stderr)
        return 2
