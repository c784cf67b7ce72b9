# SPDX-License-Identifier: Apache-2.0
"""Times a whole Swin UNETR: MONAI, MONAI with flash attention, and medaccel.

`python -m benchmarks.bench_swin_unetr` times the forward pass and a training step at 96³ for several widths;
`--sizes` measures time and memory against the volume's size and draws the figure. Volumes are fp32, batch 1, on
torch's threads. Each contender runs in a process of its own (its peak memory is the process's), the contenders in
turn within each round. Ratios are of the medians over the rounds. A contender that needs more than MEMORY_GIB is
shown as not fitting.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, write_table

MEMORY_GIB = 16  # address space for one contender
SIZES = (64, 96, 128, 160)  # at 32³ a single voxel is left of the last map, which MONAI's instance norm refuses
CONTENDERS = ("medaccel", "MONAI", "MONAI, flash attention")


def build(contender: str, features: int) -> torch.nn.Module:
    """Builds the contender's network, with the same weights for each."""
    from monai.networks.nets import SwinUNETR

    import medaccel

    torch.manual_seed(0)
    model = SwinUNETR(1, 2, feature_size=features, use_flash_attention="flash" in contender)
    if contender.startswith("medaccel"):
        medaccel.accelerate(model, strict=True)
    return model


def run(contender: str, features: int, size: int, training: bool, repeats: int) -> dict[str, Any]:
    """Returns, from this process, the seconds of each repetition, the peak memory above the start, and a number to
    compare."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB * 2**30,) * 2)
    model = build(contender, features).train(training)
    x = torch.rand(1, 1, size, size, size, generator=torch.Generator().manual_seed(1))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def call() -> float:
        if not training:
            with torch.no_grad():
                return float(model(x).square().mean())
        model.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        return float(loss.detach())

    seconds = []
    for _ in range(repeats + 1):
        before = time.perf_counter()
        value = call()
        seconds.append(time.perf_counter() - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds[1:] or seconds, "mib": (peak - start) / 1024, "value": value}


def measure(features: int, size: int, training: bool, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Measures one row per contender, medaccel's first, without a speed if the numbers differ."""
    # MONAI uses flash attention without gradients only
    contenders = [c for c in CONTENDERS if not (training and "flash" in c)]
    seconds: dict[str, list[float]] = {c: [] for c in contenders}
    results: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for contender in contenders:
            job = [contender, str(features), str(size), str(int(training)), str(repeats)]
            command = [sys.executable, "-m", "benchmarks.bench_swin_unetr", "--job", *job]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
            if "DefaultCPUAllocator: can't allocate memory" in done.stderr:
                results[contender] = {}
                continue
            if done.returncode != 0:
                raise SystemExit(f"{contender} at {size}³ failed:\n{done.stderr[-2000:]}")
            results[contender] = json.loads(done.stdout.splitlines()[-1])
            seconds[contender] += results[contender]["seconds"]
    reference = results["MONAI"] or results["medaccel"]
    truth = reference["value"]
    rows = []
    for contender in contenders:
        result = results[contender]
        if not result:
            print(f"{contender}: does not fit into {MEMORY_GIB} GiB at {size}³", flush=True)
            continue
        if not abs(result["value"] - truth) <= 1e-3 * abs(truth):
            raise SystemExit(f"{contender}: {result['value']} where MONAI has {truth}; nothing is timed")
        median, ours = statistics.median(seconds[contender]), statistics.median(seconds["medaccel"])
        rows.append(
            {
                "work": "training step" if training else "forward",
                "features": features,
                "size": size,
                "contender": contender,
                "seconds": round(median, 3),
                "times_medaccel": round(median / ours, 2),
                "peak_mib": round(result["mib"]),
                "share_of_monai_memory": round(result["mib"] / results["MONAI"]["mib"], 2)
                if results["MONAI"]
                else None,
            }
        )
        print("  ".join(f"{value}" for value in rows[-1].values()), flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws time and memory against the volume's size, forward and training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, constrained_layout=True)
    for column, work in enumerate(("forward", "training step")):
        for line, (key, label) in enumerate((("seconds", "seconds"), ("peak_mib", "peak memory, MiB"))):
            axis = axes[line, column]
            for contender in CONTENDERS:
                points = sorted(
                    (r["size"], r[key]) for r in rows if r["work"] == work and r["contender"] == contender
                )
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=contender)
            axis.set_yscale("log")
            axis.set_xticks(sorted({r["size"] for r in rows}))
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            if line == 0:
                axis.set_title(f"Swin UNETR, 24 features, {work}")
            else:
                axis.set_xlabel("volume, voxels per side")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints, and writes the table if an output is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true", help="against the volume's size, 64³ to 160³, 24 features")
    parser.add_argument("--features", type=int, nargs="+", default=[24, 12, 48])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the rows to this CSV file, and the figure beside it")
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        contender, features, size, training, repeats = arguments.job
        print(json.dumps(run(contender, int(features), int(size), bool(int(training)), int(repeats))))
        return
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    print("work  features  size  contender  seconds  × medaccel  peak MiB  share of MONAI's memory", flush=True)
    rows: list[dict[str, Any]] = []
    if arguments.sizes:
        for size in SIZES:
            for training in (False, True):
                rows += measure(24, size, training, 1, 3 if size < 96 else 1)
    else:
        for features in arguments.features:
            for training in (False, True):
                rows += measure(features, 96, training, arguments.rounds, 1)
    if arguments.output:
        write_table(arguments.output, rows)
        if arguments.sizes:
            draw(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
