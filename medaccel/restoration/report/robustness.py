# SPDX-License-Identifier: Apache-2.0
"""Shows how far results reach: the share of the limit over exposures, and the methods' order under other truths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medaccel.data.files import read_json
from medaccel.report.html import Block, Cell, Column, Figure, Interval, Note, Row, Table, Text
from medaccel.restoration.config import ScoreConfig
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.ranking import RankAgreement, compare_rankings
from medaccel.restoration.methods.names import REFERENCES, label
from medaccel.restoration.report import evaluation_figures as drawings
from medaccel.restoration.scoring import Scored
from medaccel.restoration.sources import TRUTHS
from medaccel.studies.statistics import mean_statistic


def curve_rows(curve: Sequence[Scored]) -> list[dict[str, Any]]:
    """Returns a row for each exposure and method: the share of the limit with its interval, and what it costs."""
    rows = []
    for one in curve:
        costs = one.costs()
        for name, found in one.rows.items():
            if name in REFERENCES:
                continue
            share = mean_statistic([row["share_of_limit"] for row in found])
            seconds, memory = costs[name]
            rows.append(
                {
                    "seconds": one.seconds,
                    "method": name,
                    "studies": share.count,
                    "share_of_limit": share.mean,
                    "share_of_limit_low": share.low,
                    "share_of_limit_high": share.high,
                    "equivalent_seconds": metrics.equivalent_seconds(share.mean, one.seconds),
                    "score_mse": mean_statistic([row["score_mse"] for row in found]).mean,
                    "share_of_ceiling": mean_statistic([row["share_of_ceiling"] for row in found]).mean,
                    "seconds_per_volume": seconds,
                    "memory_gib": memory,
                }
            )
    return rows


def curve_blocks(curve: Sequence[Scored], left_out: Sequence[str], fitted: Sequence[int]) -> list[Block]:
    """Shows the share of the limit over exposures: a figure with a line for each method, and a table.

    Args:
        curve: a scoring of each exposure.
        left_out: methods that can't restore all exposures.
        fitted: exposures, s, that the methods of single exposures were fitted on.

    Raises:
        ValueError: there is no exposure, or no method.
    """
    rows = curve_rows(curve)
    if not rows:
        raise ValueError("the curve has no exposure with a method; expected at least one")
    exposures = sorted({row["seconds"] for row in rows})
    methods = dict.fromkeys(row["method"] for row in rows)
    found = {(row["method"], row["seconds"]): row for row in rows}
    lines = {
        label(name, {}): (
            [t for t in exposures if (name, t) in found],
            [found[name, t]["share_of_limit"] for t in exposures if (name, t) in found],
        )
        for name in methods
    }
    target = curve[0].target_seconds
    body = []
    for name in methods:
        cells: list[Cell] = []
        for t in exposures:
            row = found[name, t]
            low, high = (100 * row[f"share_of_limit_{end}"] for end in ("low", "high"))
            cells.append(Interval(100 * row["share_of_limit"], low, high))
        body.append(Row(label(name, {}), cells))
    told = " and ".join(f"{t} s" for t in fitted)
    caption = (
        f"Share of the limit by exposure, {len(curve[0].paths)} studies, restored to {target} s; brackets are 95 % "
        "bootstrap intervals over studies. Exposures that the run doesn't have were simulated anew, with another "
        f"realisation of the noise. Classical methods have the strength fitted on {told}, the nearest, as a multiple "
        "of each image's own noise (a Gaussian's width does not follow it); BM4D by noise level and the U-Net follow "
        "the noise that they measure."
    )
    columns = [Column(f"{t} s", "%", best="max") for t in exposures]
    png = drawings.exposure_plot(lines, target=target)
    blocks: list[Block] = [
        Figure(png, f"Share of the limit by exposure, to {target} s.", f"Share by exposure of {', '.join(lines)}"),
        Table(caption, columns, body),
    ]
    if left_out:
        names = ", ".join(label(name, {}) for name in left_out)
        blocks.append(Note(f"Left out, as they restore only the exposures that they were trained on: {names}."))
    return blocks


@dataclass(frozen=True)
class OtherTruth:
    """Holds the mean share of the limit of a patient's methods under one way to make the truth."""

    truth: str
    shares: Mapping[int, Mapping[str, float]]  # seconds: method: fraction


def other_truths(folder: Path, chosen: ScoreConfig, frozen: str) -> list[OtherTruth]:
    """Finds scorings of the same patient and choices, with as many realisations, whose truth was made otherwise.

    Args:
        folder: the scoring's own folder, beside which the others are looked for.
        chosen: the scoring's own options.
        frozen: digest of the run's choices.
    """
    own = chosen.plain()
    found: dict[str, OtherTruth] = {}
    for path in sorted(folder.parent.glob("*/scoring.json")):
        if path.parent == folder or not (path.parent / "metrics.json").is_file():
            continue
        try:
            record, content = read_json(path), read_json(path.parent / "metrics.json")
            options = record["options"]
            truth = options.get("truth", "nlm")
            same = record["frozen"] == frozen and all(options.get(k) == own[k] for k in ("dicom", "realisations"))
            if not same or truth == chosen.truth or truth not in TRUTHS:
                continue
            shares: dict[int, dict[str, float]] = {}
            for row in content["methods"]:
                if row["share_of_limit"] is not None:
                    shares.setdefault(int(row["seconds"]), {})[row["method"]] = float(row["share_of_limit"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a damaged scoring is told when it is scored again
        found.setdefault(truth, OtherTruth(truth, shares))
    return list(found.values())


def rank_agreements(one: Scored, chosen: ScoreConfig, others: Sequence[OtherTruth]) -> list[RankAgreement]:
    """Compares the order of the methods with their order under each other truth, at one exposure."""
    own = _shares(one)
    compared = []
    for other in others:
        theirs = {name: share for name, share in other.shares.get(one.seconds, {}).items() if name in own}
        if len(theirs) > 1:
            compared.append(compare_rankings(chosen.truth, own, other.truth, theirs))
    return compared


def truth_blocks(one: Scored, chosen: ScoreConfig, others: Sequence[OtherTruth]) -> list[Block]:
    """Shows the methods' shares under each truth, and says whether their order holds; nothing without others."""
    agreements = rank_agreements(one, chosen, others)
    if not agreements:
        return []
    own = _shares(one)
    truths = {chosen.truth: own} | {other.truth: other.shares.get(one.seconds, {}) for other in others}
    columns = [Column(TRUTHS[truth], "%", best="max") for truth in truths]
    body = [Row(label(name, {}), [100 * by.get(name, float("nan")) for by in truths.values()]) for name in own]
    caption = f"Share of the limit from {one.seconds} s, by the denoiser that made the patient's truth."
    return [Table(caption, columns, body), Text(" ".join(_sentence(found) for found in agreements))]


def _sentence(found: RankAgreement) -> str:
    first, second = TRUTHS[found.first], TRUTHS[found.second]
    start = f"Between the truths by {first} and by {second}"
    end = f" (Kendall's τ {found.tau:.2f}, {found.methods} methods)."
    if found.same_order:
        return f"{start} the order of the methods is the same{end}"
    swapped = "; ".join(f"{label(a, {})} and {label(b, {})}" for a, b in found.swapped)
    best = "the best one stays" if found.same_best else "the best one changes"
    return f"{start} the order of the methods does not hold, and {best}: {swapped} change places{end}"


def _shares(one: Scored) -> dict[str, float]:
    shares = {
        name: mean_statistic([row["share_of_limit"] for row in rows]).mean
        for name, rows in one.rows.items()
        if name not in REFERENCES
    }
    return {name: share for name, share in shares.items() if share == share}
