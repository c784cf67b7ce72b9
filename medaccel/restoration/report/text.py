# SPDX-License-Identifier: Apache-2.0
"""Writes the restoration report's words: facts about the score, published rows, the finding in sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from medaccel.report.html import Column, Row, Table
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.study_scores import SummaryRow
from medaccel.restoration.methods.names import ORACLE, REFERENCES, label

BLIND_SPOT = (
    "The score's blind spot: it rewards looking like a noisy image. The noise-free truth itself scores about "
    "−100 % on MSE at 60 s of 90 s, and worse on 1 − SSIM. So each table has a second one beside it, against the "
    "noise-free truth, and no method is chosen by the first table alone."
)
CASCADE = (
    "Gaussians in sequence are one Gaussian, whose variance is the sum of theirs: three layers can express "
    "nothing that one layer cannot, and must score the same. The published 15.2 % against 11.8 % must therefore "
    "come from something else. The mix, Σ w·G_σ with the identity among its terms and Σ w = 1, is a wider family: "
    "it can keep fine detail and smooth at the same time."
)
COSTS = (
    "Time: mean of the studies, on this machine, one method after the other. Memory: the most that one restoration "
    "had beyond what the process had before it, by the growth of its resident size to the peak, which is set back "
    "before each restoration; what a GPU's allocator gained comes on top. It is the volumes' and the network's "
    "features', not the program's."
)
CONVENTIONS = (
    "SSIM is scikit-image's, Gaussian window of σ 1.5 voxels and 11 taps, averaged over the body. Primary: 3-D "
    "windows and a fixed data range of 10 SUV. The two others change one thing each: the study's own range, which "
    "a hot bladder turns into a second MSE, and 2-D windows within axial slices. Scores are means of the studies' "
    "scores; brackets are 95 % bootstrap intervals over studies."
)
LESION_RULES = (
    "Lesions are measured in the same voxels of the restored and of the noise-free reconstruction; bias is the "
    "mean difference in percent of the noise-free value, brackets are Bland–Altman 95 % limits of agreement over "
    "all lesions. SUVpeak: the highest mean over a 1 cm³ sphere centred in the lesion. Lost: a hot lesion with a "
    "noise-free contrast of at least 25 % of its surroundings that keeps less than half of it. Created: a "
    "connected group of voxels, of at least a 6 mm sphere's volume and 6 mm from any lesion, that lies 50 % and "
    "0.5 SUV above the noise-free maximum within 6 mm."
)


def subscripts(text: str) -> str:
    """Returns plain text as HTML in which PET_t, D_d, ρ_d and G_σ have real subscripts."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(PET|D|ρ|G)_(\w)(?!\w)", r"\1<sub>\2</sub>", str(escape(text))))


def limit_note(input_seconds: float, target_seconds: float) -> str:
    """Explains why 100 % cannot be reached, and which score can."""
    limit = 100 * metrics.mse_limit(input_seconds, target_seconds)
    return subscripts(
        f"The limit: the {target_seconds:g} s image is noisy itself, and {input_seconds:g} s of it are the input. "
        "The best estimate that there can be knows the truth λ and is (t·PET_t + (T − t)·λ)/T. Its MSE score is "
        f"1 − t/T: {limit:.1f} % here (33.3 % for 60 s of 90 s, 66.7 % for 30 s). Exact for a linear "
        "reconstruction, within about two points with OSEM. The share of the limit compares across data sets: it is "
        "the fraction of the input's squared error that is gone in the implied truth, and a share s is as good as "
        "a scan of t/(1 − s) seconds."
    )


def published_table() -> Table:
    """Lists figures from the literature, measured on real scanners and other data, for orientation only."""
    columns = [
        Column("Input"),
        Column("MSE score", "%", signed=True),
        Column("1 − SSIM score", "%", signed=True),
        Column("Share of the MSE limit", "%", digits=0),
    ]
    rows = [
        Row("Gaussian filtration, 1 layer", ["60 s", 11.8, 3.2, 35.0]),
        Row("Gaussian filtration, 3 layers", ["60 s", 15.2, -58.6, 46.0]),
        Row("Swin Transformer (Swin UNETR)", ["60 s", 16.6, -128.6, 50.0]),
        Row("3D MedNeXt, Kruzhilov et al. 2024", ["60 s", 21.5, 16.9, 64.0]),
        Row("3D MedNeXt, Kruzhilov et al. 2024", ["30 s", 48.3, 38.2, 72.0]),
    ]
    caption = (
        "Published results for restoring 90 s, on other data and with other SSIM conventions. Kruzhilov et al. "
        "(doi 10.3389/fmed.2024.1415058, 212 studies) report RMSE, 11.4 % and 28.1 %; its MSE is converted, which "
        "is approximate."
    )
    return Table(caption, columns, rows)


def finding(
    rows: Sequence[SummaryRow],
    labels: Mapping[str, str],
    *,
    data: str,
    simulated: bool,
    input_seconds: float,
    target_seconds: float,
    chosen: str | None = None,
) -> list[str]:
    """Describes the study and its results, as paragraphs, from the numbers alone.

    `chosen` is the method that validation studies chose; without it, the text describes the best on these studies.
    """
    by_method = {row.method: row for row in rows}
    candidates = [row for row in rows if row.method not in REFERENCES]
    studies = rows[0].studies
    counts = "simulated counts" if simulated else "measured counts"
    done = (
        f"PET images of {input_seconds:g} s were restored to look like those of {target_seconds:g} s of the same "
        f"acquisition, and scored on {_count(studies, 'study', 'studies')} that no method was fitted to: {data} "
        f"({counts})."
    )
    candidates = [row for row in candidates if math.isfinite(row.metrics["score_mse"].mean)]
    if not candidates:
        return [done, "No restoration method has a score to report."]
    best = max(candidates, key=lambda row: (row.method == chosen, row.metrics["score_mse"].mean))
    paragraphs = [
        done,
        _against_target(best, by_method, labels, input_seconds, target_seconds, best.method == chosen),
    ]
    if math.isfinite(best.metrics["truth_score_mse"].mean):
        paragraphs.append(_against_truth(best, candidates, labels))
    if {"gaussian1", "gaussian3"} <= by_method.keys():
        one, three = (by_method[key].metrics["score_mse"].mean for key in ("gaussian1", "gaussian3"))
        verdict = (
            "as they must, being one Gaussian"
            if abs(one - three) <= 0.3
            else "though they are one Gaussian and must agree within 0.3: one of the fits has not converged"
        )
        paragraphs.append(f"Three Gaussian layers score {_points(three)} and one layer {_points(one)}, {verdict}.")
    return paragraphs


def _against_target(
    best: SummaryRow,
    by_method: Mapping[str, SummaryRow],
    labels: Mapping[str, str],
    input_seconds: float,
    target_seconds: float,
    chosen: bool,
) -> str:
    score = best.metrics["score_mse"]
    limit = 100 * metrics.mse_limit(input_seconds, target_seconds)
    spread = ""
    if math.isfinite(score.low):
        spread = f" (95 % interval {_plain(score.low)} to {_plain(score.high)})"
    name = label(best.method, labels)
    which = "which the validation studies chose" if chosen else "the best on MSE"
    if score.mean <= 0:
        text = f"{name}, {which}, does not help on MSE: it scores {_points(score.mean)}{spread}."
    else:
        share = metrics.share_of_limit(score.mean, input_seconds, target_seconds)
        seconds = metrics.equivalent_seconds(share, input_seconds)
        text = (
            f"{name}, {which}, removes {_plain(score.mean)} %{spread} of the input's squared error against "
            f"the {target_seconds:g} s image. Since that image is noisy itself, at most {limit:.1f} % can be "
            f"removed: this is {100 * share:.0f} % of the limit, as good as a scan of {seconds:.0f} s."
        )
    text += f" Its 1 − SSIM score is {_points(best.metrics['score_ssim'].mean)}."
    oracle = by_method.get(ORACLE)
    if oracle is not None and math.isfinite(oracle.metrics["score_mse"].mean):
        reached = oracle.metrics["score_mse"].mean
        text += f" The oracle, which knows the truth, scores {_points(reached)}"
        off = abs(reached - limit) > 2
        text += ", more than two points off the limit: here the limit is approximate." if off else "."
    return text


def _against_truth(best: SummaryRow, candidates: Sequence[SummaryRow], labels: Mapping[str, str]) -> str:
    name = label(best.method, labels)
    gain = best.metrics["truth_score_mse"].mean
    verb = "removes" if gain >= 0 else "adds"
    text = (
        f"Against the noise-free truth, {name} {verb} {_plain(abs(gain))} % of the input's squared error and scores "
        f"{_points(best.metrics['truth_score_ssim'].mean)} on 1 − SSIM"
    )
    winner = max(candidates, key=lambda row: row.metrics["truth_score_mse"].mean)
    if winner.method != best.method:
        text += (
            f"; nearest to the truth is {label(winner.method, labels)} "
            f"({_points(winner.metrics['truth_score_mse'].mean)} on MSE)"
        )
    text += "."
    sentences = []
    for group, words in (("large", "of 10 mm and more"), ("small", "below 10 mm")):
        peak = best.agreement[group, "suvmax"]
        if peak.count:
            lost = best.totals[f"lesion_{group}_lost"]
            sentences.append(
                f"{_count(peak.count, 'hot lesion', 'hot lesions')} {words}: SUVmax {_points(peak.bias)} on "
                f"average, {lost:.0f} lost"
            )
    return text + (" " + "; ".join(sentences) + "." if sentences else "")


def _points(value: float) -> str:
    """Formats a signed percentage with a true minus sign."""
    return ("+" if round(value, 1) > 0 else "") + _plain(value) + " %"


def _plain(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
