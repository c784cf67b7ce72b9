# SPDX-License-Identifier: Apache-2.0
"""Runs `medaccel pretraining run`: prepares scans, trains, evaluates on held-out ones, writes weights and a report.

config.yaml             the options
scans/                  phantoms, where no scans were given
cache/                  scans as they are trained on, unless another folder was named
inputs.json             size, time and SHA-256 of the scans' files, where scans were given
scans.json              what was trained on, held out, skipped, found twice
training/               logs, and what an interrupted training goes on from
checkpoints/weights.pt  the backbone's trained tensors, for `medaccel.nets.load_pretrained`
metrics.json|csv, report.html
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medaccel.data.files import atomic_path, read_json, write_text
from medaccel.pretraining.config import PretrainingConfig
from medaccel.studies.inputs import INPUTS, check_inputs, differences, read, refuse_changes
from medaccel.studies.run_folder import REPORT, OptionsFolder
from medaccel.studies.settings import before_work, check_accelerator, check_group, converted, hints_of, nearest
from medaccel.training import ranks
from medaccel.training.memory import Part, expect, local_processes, swin_unetr

if TYPE_CHECKING:
    from medaccel.data.ct import ScanList
    from medaccel.pretraining.network import PretrainingNet
    from medaccel.pretraining.tasks import Task

Say = Callable[[str], None]


class PretrainingFolder(OptionsFolder):
    """Describes the folder of a pretraining."""

    generated = ("scans", "training", "checkpoints", "metrics.json", "metrics.csv", "scans.json")
    folders = ("checkpoints",)
    worth = ("training/last.ckpt", "checkpoints/*.pt")

    @property
    def ended(self) -> bool:
        return (self.path / REPORT).exists()


def run(config: PretrainingConfig, *, force: bool = False, resume: bool = False, say: Say = print) -> Path:
    """Pretrains, evaluates on held-out scans and writes a report; a finished run of these options is left as it is.

    Under `torchrun` all processes train together; the first one does everything else.

    Args:
        config: the options.
        force: start clean if the folder holds a run with other options, or a finished one.
        resume: refuse a folder that holds no run. (One that holds this run is continued in any case.)
        say: a function that is called with each line of progress.

    Returns:
        The path of report.html; beside it is `weights(output)`.

    Raises:
        ValueError, OSError: options or data are bad, or the folder is unwritable or holds something else.
    """
    folder = PretrainingFolder(config.output)
    with before_work():
        if folder.ended and not force:
            folder.refuse(config.plain(), force, resume)
            _refuse_changed_scans(config)
            say(f"{config.output}: pretrained before")
            return config.output / REPORT
        plan = check(config)
        expected = _expected(config, plan.settings)
    ranks.join(str(plan.settings["accelerator"]))
    alone = folder.session(config.plain(), force, resume, say) if ranks.rank() == 0 else nullcontext()
    with alone:
        if ranks.rank() == 0:
            say(expected)
        return _run(config, plan, say)


@dataclass(frozen=True)
class Plan:
    """Holds the objects that `check` has made from the options: settings, tasks, the network, and the given scans."""

    settings: Mapping[str, Any]
    tasks: Sequence[Task]
    net: PretrainingNet
    found: ScanList | None


def check(config: PretrainingConfig, *, with_scans: bool = True) -> Plan:
    """Refuses bad settings, devices and scans before anything is made.

    Args:
        config: the options.
        with_scans: search the scans too.

    Raises:
        ValueError, OSError: something is refused.
    """
    from medaccel.data.ct import find_scans
    from medaccel.data.views import TwoViews
    from medaccel.nets import SwinUNETR
    from medaccel.pretraining.fit import settings_of
    from medaccel.pretraining.network import PretrainingNet
    from medaccel.pretraining.tasks import TASKS, make_tasks

    settings = settings_of(config.trainer)
    check_accelerator("trainer: accelerator", settings["accelerator"])
    for name, task in TASKS.items():
        check_group(name, config.settings.get(name, {}), task.defaults)
    tasks = make_tasks(list(config.weights), config.settings, config.roi_size)
    _check_options("views", config.views, TwoViews, ("roi_size", "intensity"))
    try:
        TwoViews(config.roi_size, **config.views)
    except (ValueError, TypeError) as error:
        raise ValueError(f"views is {config.views}: {error}") from error
    _check_options("network", config.network, SwinUNETR, ("in_channels", "out_channels"))
    torch.manual_seed(config.seed)  # the weights are random
    try:
        net = PretrainingNet(tasks, **config.network)
    except Exception as error:  # a network may raise anything on wrong options
        raise ValueError(f"network is {config.network}; expected options of SwinUNETR ({error})") from error
    found = find_scans(*config.scans, check_units=config.check_units) if config.scans and with_scans else None
    return Plan(settings, tasks, net, found)


def _check_options(group: str, given: Mapping[str, Any], target: Any, own: Sequence[str]) -> None:
    """Refuses options that a class doesn't have, that are set here, or that are of another type than its own."""
    hints = {name: hint for name, hint in hints_of(target).items() if name not in ("self", "args", "kwargs", *own)}
    for name, value in given.items():
        if name not in hints:
            raise ValueError(
                f"{group} is {dict(given)}; expected options of {target.__name__}, of which {name} is none"
                f"{nearest(name, hints)}"
            )
        converted(f"{group}.{name}", value, hints[name])


def _refuse_changed_scans(config: PretrainingConfig) -> None:
    """Refuses to continue a run with other scans; scans that are gone since it ended don't matter."""
    record = config.output / INPUTS
    if record.exists():
        before = read(record)
        said, _ = differences(before, map(Path, before), lenient=True)
        refuse_changes(config.output, "run", said)


def _run(config: PretrainingConfig, plan: Plan, say: Say) -> Path:
    from medaccel.pretraining.data import Scans, Volumes, files_of, prepare
    from medaccel.pretraining.evaluation import evaluate
    from medaccel.pretraining.fit import PretrainingFit
    from medaccel.pretraining.items import Items
    from medaccel.pretraining.report import write_report
    from medaccel.training.fit import train

    settings, tasks, net = plan.settings, plan.tasks, plan.net
    folder, report = config.output, config.output / REPORT
    cache = folder / "cache" if config.cache_folder is None else config.cache_folder
    with ranks.first_process() as first:
        if first:
            if plan.found is not None:
                check_inputs(folder, "run", (file for scan in plan.found.scans for file in files_of(scan)))
            sources = list(config.scans) or [_phantoms(config)]
            say("scans: reading what is not in the cache")
            found = prepare(
                sources,
                cache,
                config.spacing,
                held_out=config.held_out,
                skip_limit=config.skip_limit,
                check_units=config.check_units,
                seed=config.seed,
                workers=settings["num_workers"],
                found=plan.found,
            )
            write_text(folder / "scans.json", json.dumps(found, indent=1) + "\n", force=True)
    plain = read_json(folder / "scans.json")
    scans = Scans.of(plain, cache)
    if ranks.rank() == 0 and settings["cache"] == "memory":
        say(_expected(config, settings, scans.training))
    items = Items(
        Volumes(scans.training, settings["cache"]),
        tasks,
        windows=config.windows,
        roi_size=config.roi_size,
        batch_size=settings["batch_size"],
        views=config.views,
        seed=config.seed,
    )
    if ranks.rank() == 0:
        say(f"pretraining ({config.title}) on {len(scans.training)} scans; {len(scans.held_out)} held out")
    fit = PretrainingFit(net, tasks, config.weights, settings)
    losses, seconds, per_step = train(fit, items, folder / "training", seed=config.seed)
    if ranks.rank() != 0:
        ranks.leave()
        return report
    say("evaluating on held-out scans")
    held_out = evaluate(
        net,
        tasks,
        Volumes(scans.held_out, "disk"),
        windows=config.windows,
        roi_size=config.roi_size,
        views=config.views,
        seed=config.seed,
    )
    metrics: dict[str, Any] = {
        "tasks": config.weights,
        "held_out": held_out.figures,
        "scans": {name: len(entries) for name, entries in plain.items()},
        "steps": settings["steps"],
        "seconds": round(seconds, 2),
        "seconds_per_step": round(per_step, 4),
        "parameters": sum(p.numel() for p in net.backbone.parameters() if p.requires_grad),
        "losses": losses,
    }
    _save_weights(weights(folder), config, net.trained_state(), metrics)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n", force=True)
    write_text(folder / "metrics.csv", _csv(losses), force=True)
    write_report(report, config, metrics, held_out, plain)  # the last file: if it exists, the run has ended
    say(f"weights: {weights(folder).resolve()}")
    say(f"report: {report.resolve()}")
    ranks.leave()
    return report


def _expected(config: PretrainingConfig, settings: Mapping[str, Any], kept: Sequence[Path] = ()) -> str:
    """Returns the sentence on the expected memory, with the prepared scans that are kept once they are known."""
    # Both views of every item pass through the network at once.
    parts = swin_unetr(
        config.roi_size,
        2 * settings["batch_size"] / max(ranks.world_size(), 1),
        int(config.network.get("feature_size", 24)),
        training=True,
    )
    if kept:
        size = sum(path.stat().st_size for path in kept)
        parts.append(Part(f"{len(kept)} scans in memory", size, 'set trainer.cache to "disk"'))
    return expect(
        f"pretraining on {len(kept)} scans" if kept else "pretraining, without its scans,",
        parts,
        gpu=torch.cuda.is_available() and settings["accelerator"] != "cpu",
        processes=local_processes(),
    ).sentence


def weights(output: Path) -> Path:
    """Returns the path of a run's weights."""
    return output / "checkpoints" / "weights.pt"


def _phantoms(config: PretrainingConfig) -> Path:
    """Returns the folder of the phantoms, which are written if they don't exist."""
    from medaccel.phantoms.ct_dataset import write_pool

    folder = config.output / "scans"
    write_pool(folder, config.phantoms, seed=config.seed, spacing=config.phantom_spacing)
    return folder


def _save_weights(
    path: Path, config: PretrainingConfig, state: Mapping[str, torch.Tensor], metrics: Mapping[str, Any]
) -> None:
    content = {
        "state_dict": dict(state),
        "pretraining": {
            "options": config.plain(),
            "tasks": metrics["tasks"],
            "steps": metrics["steps"],
            "held_out": metrics["held_out"],
        },
    }
    with atomic_path(path, force=True) as temporary:
        torch.save(content, temporary)


def _csv(losses: Mapping[str, list[float]]) -> str:
    """Formats mean losses, a line per epoch."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", *losses])
    writer.writerows([number + 1, *values] for number, values in enumerate(zip(*losses.values(), strict=True)))
    return text.getvalue()
