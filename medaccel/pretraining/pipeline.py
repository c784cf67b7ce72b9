# SPDX-License-Identifier: Apache-2.0
"""Runs `medaccel pretraining run`: prepares scans, trains, evaluates on held-out ones, writes weights and a report.

See `run_folder` for what lies where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medaccel.data.files import atomic_path, read_json
from medaccel.pretraining.config import PretrainingConfig
from medaccel.pretraining.run_folder import PretrainingFolder, weights
from medaccel.studies.inputs import INPUTS, check_inputs, differences, read, refuse_changes
from medaccel.studies.run_folder import REPORT
from medaccel.studies.settings import before_work, check_accelerator
from medaccel.studies.tables import write_csv, write_json
from medaccel.training import ranks
from medaccel.training.memory import Part, expect, local_processes, swin_unetr

if TYPE_CHECKING:
    from medaccel.data.ct import ScanList
    from medaccel.pretraining.network import PretrainingNet
    from medaccel.pretraining.tasks import PretextTask

Say = Callable[[str], None]


def run(config: PretrainingConfig, *, force: bool = False, resume: bool = False, say: Say = print) -> Path:
    """Pretrains, evaluates on held-out scans and writes a report; a finished run of these options is left as it is.

    Under `torchrun` all processes train together; the first one does everything else.

    Args:
        config: the options.
        force: start clean if the folder holds a run with other options, or a finished one.
        resume: refuse a folder that holds no run. (One that holds this run is resumed in any case.)
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
    tasks: Sequence[PretextTask]
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
    from medaccel.pretraining.fit import settings_of
    from medaccel.pretraining.network import PretrainingNet
    from medaccel.pretraining.tasks import make_tasks

    settings = settings_of(config.trainer)
    check_accelerator("trainer: accelerator", settings["accelerator"])
    tasks = make_tasks(list(config.weights), config.settings, config.roi_size)
    try:
        TwoViews(config.roi_size, **config.views)
    except (ValueError, TypeError) as error:
        raise ValueError(f"views is {dict(config.views)}: {error}") from error
    torch.manual_seed(config.seed)  # the weights are random
    try:
        net = PretrainingNet(tasks, **config.network)
    except Exception as error:  # a network may raise anything on wrong options
        raise ValueError(f"network is {dict(config.network)}; expected options of SwinUNETR ({error})") from error
    found = find_scans(*config.scans, check_units=config.check_units) if config.scans and with_scans else None
    return Plan(settings, tasks, net, found)


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
    from medaccel.pretraining.report.write import write_report
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
            write_json(folder / "scans.json", found)
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
    write_json(folder / "metrics.json", metrics)
    epochs = (dict(zip(losses, values, strict=True)) for values in zip(*losses.values(), strict=True))
    rows = [{"epoch": number, **epoch} for number, epoch in enumerate(epochs, start=1)]
    write_csv(folder / "metrics.csv", rows, ["epoch", *losses])
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
        config.network.feature_size,
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
