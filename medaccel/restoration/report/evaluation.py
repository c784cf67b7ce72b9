# SPDX-License-Identifier: Apache-2.0
"""Presents the evaluation beyond scores as blocks of the report: uncertainty, paired comparisons, noise, resolution.

Each function takes results by method, in the order to be shown, and the names for readers of methods that are not
this package's, and returns blocks for a `medaccel.report.html.Section`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from medaccel.report.html import Block, Cell, Column, Figure, Interval, Note, Row, Table
from medaccel.restoration.evaluation.calibration import (
    ACTIVITY,
    BY_SUV,
    CALIBRATED,
    CONSTANT,
    UNCALIBRATED,
    Calibration,
    Coverage,
)
from medaccel.restoration.evaluation.comparison import PairedComparison
from medaccel.restoration.evaluation.hot_lesion import DIAMETER, KEPT_WITHIN, SUV
from medaccel.restoration.evaluation.noise import AXES
from medaccel.restoration.evaluation.noise_effects import NoiseChange, NoiseShare, noise_trend
from medaccel.restoration.evaluation.resolution import PointResponse, summarize_responses
from medaccel.restoration.methods.names import REFERENCES, label
from medaccel.restoration.report import evaluation_figures as drawings
from medaccel.restoration.report.text import subscripts
from medaccel.studies.statistics import Statistic, mean_statistic

BAND = (0.80, 0.97)  # coverage of single SUV bins that counts as near enough to 90 %


def calibration_blocks(
    results: Mapping[str, Coverage],
    calibrations: Mapping[str, Calibration],
    *,
    labels: Mapping[str, str] | None = None,
    band: tuple[float, float] = BAND,
) -> list[Block]:
    """Shows coverage, width and interval score: overall, by SUV bin, by predicted deviation.

    Args:
        results: coverage on test studies, by method.
        calibrations: the calibrations that were used, by method.
        labels: names of methods for readers.
        band: shaded in the figures, fractions.

    Raises:
        ValueError: there are no results, methods without a calibration, or results of several levels, of both kinds
            of truth or in different SUV bins.
    """
    names = _names(results, labels)
    if results.keys() != calibrations.keys():
        raise ValueError(f"results of {list(results)}, calibrations of {list(calibrations)}; expected the same")
    first = next(iter(results.values()))
    kinds = {(r.covers, r.level, tuple(row.label for row in r.rows)) for r in results.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"results cover {sorted({(r.covers, r.level) for r in results.values()})} in "
            f"{len(kinds)} ways; expected one truth, one level and one set of SUV bins"
        )
    percent = f"{100 * first.level:g} %"
    what = (
        "the activity λ, in a simulation the noise-free reconstruction"
        if first.covers == ACTIVITY
        else "the measured PET_T, its own noise included"
    )
    z = _normal_factor(first.level)
    caption = (
        f"Intervals mean ± factor·sd of the samples, meant to cover {what}, in {percent} of the body's voxels. The "
        "factors are quantiles of |truth − mean|/sd on validation studies, one a bin of predicted SUV. Coverage: "
        "voxels whose truth lies within, mean of the studies with its 95 % interval over studies. Width: mean of the "
        "voxels. Interval score (Gneiting and Raftery 2007): the width plus 2/α times what the truth lies outside "
        f"by, α = {1 - first.level:.2g}; smaller is better. Beside it: ± {z:.3f}·sd uncalibrated; one width for all "
        "voxels; one width a SUV bin, both as validation studies ask for. Samples tell more than the SUV does where "
        "the calibrated score is the smallest."
    )
    columns = [
        Column("Coverage", "%"),
        Column("Width", "SUV", digits=3),
        Column("Interval score", "SUV", digits=3, best="min"),
        Column("Uncalibrated coverage", "%"),
        Column("Uncalibrated score", "SUV", digits=3),
        Column("One width: score", "SUV", digits=3),
        Column("Width by SUV: score", "SUV", digits=3),
    ]
    body = []
    for method, result in results.items():
        found = result.overall.intervals
        cells: list[Cell] = [
            _interval(result.statistic(), 100),
            found[CALIBRATED].width,
            found[CALIBRATED].score,
            100 * found[UNCALIBRATED].coverage,
            found[UNCALIBRATED].score,
            found[CONSTANT].score,
            found[BY_SUV].score,
        ]
        body.append(Row(names[method], cells))
    blocks: list[Block] = [Table(subscripts(caption), columns, body)]
    blocks += [_bins_table(names[m], results[m], calibrations[m]) for m in results]
    for group, x_label, words in (
        ("suv", "predicted SUV", "by predicted SUV"),
        (
            "deviation",
            "tenth of the voxels by predicted deviation, 10 the largest",
            "by predicted standard deviation",
        ),
    ):
        rows = {names[m]: result.group(group) for m, result in results.items()}
        png = drawings.coverage_plot(rows, level=first.level, band=band, x_label=x_label)
        text = (
            f"Coverage {words}: solid with the factors, dotted ± {z:.3f}·sd as drawn. Dashed: the nominal {percent}; "
            f"shaded: {100 * band[0]:g} to {100 * band[1]:g} %."
        )
        blocks.append(Figure(png, text, f"Coverage {words} of {', '.join(rows)}"))
    blocks.append(
        Note(
            "The factors promise coverage of the average voxel of studies like the validation ones. Other studies, "
            "single patients and single bins may lie above or below."
        )
    )
    return blocks


def comparison_blocks(
    comparisons: Sequence[PairedComparison],
    quantity: str,
    *,
    unit: str = "",
    factor: float = 1.0,
    larger_is_better: bool = True,
    digits: int = 1,
    labels: Mapping[str, str] | None = None,
) -> list[Block]:
    """Makes a table of paired differences and tests.

    Args:
        comparisons: results of `comparison.compare_methods`, all against one method.
        quantity: the compared quantity in words, such as "share of the limit".
        unit, factor, digits: form of the shown differences: 100 and "%" for fractions.
        larger_is_better: True if a larger quantity is better.

    Raises:
        ValueError: there are no comparisons, or comparisons against several methods.
    """
    against = {c.against for c in comparisons}
    if len(against) != 1:
        raise ValueError(f"comparisons are against {sorted(against)}; expected one method")
    names = _names({c.method: c for c in comparisons}, labels)
    base = label(next(iter(against)), labels or {})
    direction = "positive" if larger_is_better else "negative"
    caption = (
        f"Paired comparison of the {quantity} with {base}: the difference (method − {base}) within each study, its "
        f"mean over studies and 95 % bootstrap interval; {direction} is better. p: two-sided, of the paired t-test "
        "and of Wilcoxon's signed-rank test; Holm: corrected for the number of methods in this table, so that the "
        "chance of any false claim stays at the level of one test."
    )
    columns = [
        Column("Difference", unit, digits=digits, signed=True, best="max" if larger_is_better else "min"),
        Column("Better in"),
        Column("t-test", "p"),
        Column("t-test, Holm", "p"),
        Column("Wilcoxon", "p"),
        Column("Wilcoxon, Holm", "p"),
    ]
    body = []
    for c in comparisons:
        better = c.larger if larger_is_better else c.smaller
        cells: list[Cell] = [
            _interval(c.difference, factor),
            f"{better} of {c.difference.count}",
            *(_p_value(p) for p in (c.t_p, c.t_holm, c.wilcoxon_p, c.wilcoxon_holm)),
        ]
        body.append(_row(c.method, names, cells))
    return [Table(caption, columns, body)]


def noise_share_blocks(
    points: Mapping[str, Sequence[NoiseShare]], *, where: str = "body", labels: Mapping[str, str] | None = None
) -> list[Block]:
    """Shows the share of the limit against the study's noise level: a figure, and each method's trend.

    Args:
        points: results of `noise_effects.share_against_noise`, by method.
        where: the noise level of the "body" or of the "liver".

    Raises:
        ValueError: there are no methods, or `where` is neither.
    """
    names = _names(points, labels)
    trends = {method: noise_trend(found, where=where) for method, found in points.items()}
    if where == "body":
        meaning = (
            "the input's standard deviation over the mean SUV, sd(PET_t − PET_T)/√(1 − t/T) divided by the mean of "
            "PET_T, inside the body"
        )
    else:
        meaning = "standard deviation over mean of the input in the liver, its edge left out"
    series = {
        names[m]: ([getattr(point.noise, where) for point in found], [point.share for point in found])
        for m, found in points.items()
    }
    png = drawings.noise_share_plot(series, x_label=f"noise level of the input, {where}, %")
    caption = f"Share of the limit of each study against its noise level: {meaning}. Lines: least squares."
    columns = [
        Column("Share of the limit", "%"),
        Column("Rank correlation with noise", digits=2, signed=True),
        Column("Trend", "p"),
        Column("Studies", digits=0),
    ]
    body = [
        _row(
            m,
            names,
            [
                _interval(mean_statistic([point.share for point in found]), 100),
                trends[m].correlation,
                _p_value(trends[m].p),
                trends[m].count,
            ],
        )
        for m, found in points.items()
    ]
    words = (
        "Spearman's rank correlation of the share with the noise level over studies: positive where noisier "
        "studies gain more of what can be gained; p is of no correlation. The share is the mean over studies."
    )
    return [
        Figure(png, subscripts(caption), f"Share of the limit against noise level of {', '.join(series)}"),
        Table(words, columns, body),
    ]


def noise_change_blocks(
    changes: Sequence[NoiseChange], *, target_seconds: int, labels: Mapping[str, str] | None = None
) -> list[Block]:
    """Shows noise before and after: its strength, and its correlation along each axis.

    Args:
        changes: results of `noise_effects.compare_noise`, the input's among them.

    Raises:
        ValueError: there are no changes.
    """
    names = _names({change.method: change for change in changes}, labels)
    strength = [_row(c.method, names, [_interval(c.sd), _interval(c.ratio, 100)]) for c in changes]
    distances = sorted({d for _, d in changes[0].correlation})
    columns = [Column(f"ρ, d = {d}", digits=2) for d in distances]
    columns += [Column(f"Var(D), d = {d}", digits=2) for d in distances]
    body = []
    for change in changes:
        for axis, letter in enumerate(AXES):
            nearest = change.distance[axis, distances[0]] / distances[0]
            cells: list[Cell] = [
                table[axis, d].mean for table in (change.correlation, change.variance) for d in distances
            ]
            body.append(_row(change.method, names, cells, f", axis {letter} ({nearest:.3g} mm)"))
    caption = (
        f"What is left between the image and the {target_seconds} s one, Δ = image − PET{target_seconds}, inside "
        "the body: its standard deviation, and that over the input's; means over studies with 95 % intervals. The "
        f"{target_seconds} s image's own noise is in it: even the oracle, which knows the truth, leaves √(t/T) of "
        "the input's."
    )
    words = (
        "The same Δ divided by its local standard deviation: D_d is the difference of two voxels at a distance of d "
        "voxels, ρ_d = 1 − Var(D_d)/(2·Var(Δ)) their correlation, 0 for white noise; means over studies. A "
        "restoration that takes fine noise away leaves a higher ρ than the input's."
    )
    return [
        Table(
            subscripts(caption),
            [Column("sd(Δ)", "SUV", digits=3), Column("sd(Δ) over the input's", "%", best="min")],
            strength,
        ),
        Table(subscripts(words), columns, body, "Noise"),
    ]


def resolution_blocks(
    responses: Mapping[str, Sequence[PointResponse]], *, labels: Mapping[str, str] | None = None
) -> list[Block]:
    """Shows the response to added blobs: medians in a table, each blob in a figure.

    Args:
        responses: results of `resolution.point_response`, by method, all to blobs of one width and amplitude.

    Raises:
        ValueError: there are no methods, one has no responses, or blobs have several widths or amplitudes.
    """
    names = _names(responses, labels)
    summaries = {method: summarize_responses(found) for method, found in responses.items()}
    blobs = sorted({(summary.added_fwhm, round(summary.amplitude, 3)) for summary in summaries.values()})
    if len(blobs) > 1:
        raise ValueError(f"responses are to blobs of (FWHM, amplitude) {blobs}; expected one kind")
    width, amplitude = blobs[0]
    columns = [Column(f"FWHM along {axis}", "mm", digits=2) for axis in AXES]
    columns += [
        Column("Peak", "% kept", best="max"),
        Column("Sum", "% kept"),
        Column("Explained", "%"),
        Column("Blobs", digits=0),
    ]
    body = [
        _row(m, names, [*s.fwhm, 100 * s.peak, 100 * s.total, 100 * s.explained, f"{s.fitted} of {s.count}"])
        for m, s in summaries.items()
    ]
    caption = (
        f"Point response: a Gaussian blob of {width:g} mm FWHM, {amplitude:.3g} times the SUV around it, is "
        "added to the input at several places in the body, and the difference between restoring with and without it "
        "is measured. FWHM: of the 3-D Gaussian fitted to that difference. Peak and sum: of the difference over the "
        "blob's. Explained: the part of the difference's squares that the Gaussian explains. Medians over blobs; "
        "the last column counts those that a Gaussian fits."
    )
    note = (
        "A restoration that is not linear answers to another amplitude otherwise: it may clean a faint blob away and "
        "keep a strong one."
    )
    figure = Figure(
        drawings.response_plot({names[m]: found for m, found in responses.items()}),
        f"Point response, a point a blob, bars at medians. Dashed: the blob of {width:g} mm as it was added.",
        f"Width, peak and sum of point responses of {', '.join(names.values())}",
    )
    return [Table(caption, columns, body), figure, Note(note)]


def hot_lesion_table(kept: Mapping[str, Sequence[float]], *, labels: Mapping[str, str] | None = None) -> Table:
    """Shows the share of the peak of small, very hot lesions that is kept: the mean, the least and the greatest.

    Args:
        kept: results of `hot_lesion.hot_lesion_kept`, by method.

    Raises:
        ValueError: there are no methods.
    """
    names = _names(kept, labels)
    columns = [
        Column("Peak", "% kept"),
        Column("Least", "% kept", best="max"),
        Column("Greatest", "% kept"),
        Column(f"All within {100 * KEPT_WITHIN:g} %"),
    ]
    body = []
    for method, shares in kept.items():
        within = all(abs(share - 1) <= KEPT_WITHIN for share in shares)
        cells: list[Cell] = [100 * sum(shares) / len(shares), 100 * min(shares), 100 * max(shares)]
        body.append(_row(method, names, [*cells, "yes" if within else "no"]))
    caption = (
        f"Spheres of {DIAMETER:g} mm and SUV {SUV:g}, as the scanner's blur shows them, are added to the input at "
        "several places: the change of the restored image at their peak over what was added."
    )
    return Table(caption, columns, body)


def _bins_table(name: str, result: Coverage, calibration: Calibration) -> Table:
    columns = [
        Column("Voxels", digits=0),
        Column("Factor", digits=2),
        Column("Coverage", "%"),
        Column("Width", "SUV", digits=3),
        Column("Interval score", "SUV", digits=3),
        Column("Uncalibrated coverage", "%"),
        Column("One width: coverage", "%"),
        Column("Width by SUV: score", "SUV", digits=3),
    ]
    rows = []
    for row, factor in zip(result.group("suv"), calibration.factors, strict=True):
        found = row.intervals
        cells: list[Cell] = [
            row.voxels,
            factor,
            100 * found[CALIBRATED].coverage,
            found[CALIBRATED].width,
            found[CALIBRATED].score,
            100 * found[UNCALIBRATED].coverage,
            100 * found[CONSTANT].coverage,
            found[BY_SUV].score,
        ]
        rows.append(Row(row.label, cells))
    caption = (
        f"{name}: intervals by predicted SUV, all studies' voxels together; columns as above. A bin with too few "
        f"validation voxels has the factor of all together, {calibration.pooled:.2f}."
    )
    return Table(caption, columns, rows, "Predicted SUV")


def _names(methods: Mapping[str, object], labels: Mapping[str, str] | None) -> dict[str, str]:
    if not methods:
        raise ValueError("there are no results to show; expected at least one method")
    return {method: label(method, labels or {}) for method in methods}


def _row(method: str, names: Mapping[str, str], cells: Sequence[Cell], suffix: str = "") -> Row:
    return Row(names[method] + suffix, cells, reference=method in REFERENCES)


def _interval(value: Statistic, factor: float = 1.0) -> Interval:
    low, high = sorted((factor * value.low, factor * value.high))
    return Interval(factor * value.mean, low, high)


def _p_value(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _normal_factor(level: float) -> float:
    """Returns the factor that covers the level of a normal distribution: 1.645 at 90 %."""
    from scipy.stats import norm

    return float(norm.ppf((1 + level) / 2))
