# SPDX-License-Identifier: Apache-2.0
"""Shows how well model observers find faint lesions in the input, in each method's images and in the target."""

from __future__ import annotations

import math

from medaccel.report.html import Block, Cell, Column, Interval, Note, Row, Table
from medaccel.restoration.detection import GROUPS, TARGET, Detection
from medaccel.restoration.methods.names import IDENTITY, REFERENCES, label
from medaccel.studies.statistics import Statistic

_WORDS = {"small": "of 6 to 10 mm", "large": "of 10 mm and more"}


def detection_blocks(found: Detection) -> list[Block]:
    """Makes a table for the small lesions and one for the large ones, where there are any."""
    labels = {TARGET: f"Target ({found.target_seconds} s)"}
    columns = []
    for observer in ("NPWE", "CHO"):
        columns += [
            Column(f"{observer}: AUC", digits=3, best="max"),
            Column(f"{observer}: SNR", digits=2, best="max"),
            Column(f"{observer}: SNR minus the input's", digits=2, signed=True, best="max"),
            Column(f"{observer}: Wilcoxon, Holm", "p"),
        ]
    blocks: list[Block] = []
    for group in GROUPS:
        count = len(found.chosen(group))
        if not count:
            continue
        results = {
            observer: (
                found.statistic(observer, "auc", group),
                found.statistic(observer, "snr", group),
                {c.method: c for c in found.comparisons(observer, group)},
            )
            for observer in found.sums
        }
        body = []
        for method in found.sums["npwe"]:
            cells: list[Cell] = []
            for auc, snr, compared in results.values():
                pair = compared.get(method)
                cells += [_interval(auc[method]), _interval(snr[method])]
                cells += [math.nan, "–"] if pair is None else [_interval(pair.difference), _p(pair.wilcoxon_holm)]
            reference = method in REFERENCES or method == TARGET
            body.append(Row(label(method, labels), cells, reference=reference))
        caption = (
            f"{count} faint hot lesions {_WORDS[group]} in {found.phantoms} phantoms, {found.realisations} simulated "
            f"realisations of {found.seconds} s with them and as many without: mean over lesions with its 95 % "
            f"bootstrap interval, and paired differences from {label(IDENTITY, {})}."
        )
        blocks.append(Table(caption, columns, body))
    blocks.append(
        Note(
            "Model observers look for a lesion at a known place: NPWE, the expected lesion through an eye filter; "
            "CHO, the channelized Hotelling observer with Laguerre-Gauss channels, which also knows how the noise "
            "correlates. SNR: of their sums; AUC: how often the image with the lesion has the higher one. "
            "Contrast: (10 mm/diameter)^1.5 of the host's uptake, so that lesions are found sometimes. An optimal "
            "observer gains nothing by any restoration; these gain where noise is taken away that they can't "
            "allow for, and lose where a lesion is taken for noise."
        )
    )
    if found.left_out:
        names = ", ".join(label(name, {}) for name in found.left_out)
        blocks.append(Note(f"Left out, since drawing samples of so many images would take hours: {names}."))
    return blocks


def _interval(value: Statistic) -> Interval:
    return Interval(value.mean, value.low, value.high)


def _p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
