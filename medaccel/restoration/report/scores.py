# SPDX-License-Identifier: Apache-2.0
"""Builds the scores of one exposure as a page: fill `RestorationResults`, call `build_page`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medaccel.report.html import (
    Block,
    Cell,
    Code,
    Column,
    Interval,
    Note,
    Page,
    Row,
    Section,
    Table,
    Text,
    versions,
)
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.noise import AXES, NoiseAnalysis
from medaccel.restoration.evaluation.study_scores import SummaryRow, lesion_checks, summarize
from medaccel.restoration.methods.names import IDENTITY, NOISE_FREE, ORACLE, REFERENCES, label
from medaccel.restoration.report import text as report_text
from medaccel.restoration.report.figures import RestorationExample, example_figures, noise_figure
from medaccel.restoration.report.text import subscripts
from medaccel.studies.statistics import Agreement, Statistic

# Keys of the page's sections.
TARGET, TRUTH, WITHIN_PATIENT, IMAGES, NOISE = "target", "truth", "within_patient", "images", "noise"
EACH_STUDY, PUBLISHED, RUN = "each_study", "published", "run"
_COUNTS = (("lesion", "_lost"), ("lesion", "_lost_anew"), ("hot_spots", ""))
_YES = {True: "yes", False: "no", None: "–"}
_CORRELATION = "Correlation ρ_d = 1 − Var(D_d)/(2·Var(Δ)), d in voxels: 0 for white noise. Axes are the volume's own."


@dataclass(frozen=True)
class RestorationResults:
    """Holds everything that the report shows.

    Attributes:
        input_seconds, target_seconds: the exposures compared, such as 60 and 90.
        studies: names of the test studies.
        per_study: method: its rows of `StudyEvaluator.evaluate`, one a study in the order of `studies`. The keys
            "identity", "oracle" and "noise_free" are the reference rows; others are methods, in the order given.
        data: the kind of test studies, to complete "scored on 20 studies …: ", such as "phantoms of the shifted
            generator".
        best: the method that was chosen on validation studies, which the summary describes; "" for the best here.
        simulated: whether the exposures' counts are simulated; the report says which.
        examples: studies to show as pictures.
        noise: noise analyses by name, such as {"Simulated": …, "A real PET": …}.
        within_patient: {"mse": …, "ssim": …} from `statistics.within_patient` by method, for one real study.
        config: the run's configuration, as YAML text.
        labels: names of further methods for readers; this package's methods have names already.
        notes: further sentences that the reader must know, such as how the truth was made.
        costs: seconds and memory (GiB) of a volume, by method; see `Scored.costs`.
    """

    input_seconds: int
    target_seconds: int
    studies: Sequence[str]
    per_study: Mapping[str, Sequence[Mapping[str, float]]]
    data: str
    best: str = ""
    simulated: bool = True
    examples: Sequence[RestorationExample] = ()
    noise: Mapping[str, NoiseAnalysis] = field(default_factory=dict)
    within_patient: Mapping[str, Mapping[str, Statistic]] = field(default_factory=dict)
    config: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    costs: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        metrics.check_seconds(self.input_seconds, self.target_seconds)
        wrong = {m: len(rows) for m, rows in self.per_study.items() if len(rows) != len(self.studies)}
        if wrong or not self.studies or not self.per_study:
            raise ValueError(
                f"per_study has rows {wrong or dict(self.per_study)} for {len(self.studies)} studies; "
                "expected at least one study and one method, and a row a study for each method"
            )


def build_page(results: RestorationResults) -> Page:
    """Builds the report's content, before it is HTML."""
    rows = summarize(results.per_study)
    input_name, target_name = f"{results.input_seconds:g} s", f"{results.target_seconds:g} s"
    kind = "simulated exposures" if results.simulated else "measured exposures"
    summary = report_text.finding(
        rows,
        results.labels,
        data=results.data,
        simulated=results.simulated,
        input_seconds=results.input_seconds,
        target_seconds=results.target_seconds,
        chosen=results.best or None,
    )
    sections = [Section(f"Against the {target_name} image", _target_blocks(results, rows), TARGET)]
    if any(math.isfinite(row.metrics["truth_mse"].mean) for row in rows):
        sections.append(Section("Against the noise-free truth", _truth_blocks(results, rows), TRUTH))
    if results.within_patient:
        sections.append(Section("Within the patient", [_within_patient_table(results)], WITHIN_PATIENT))
    if results.examples:
        names = {m: label(m, results.labels) for e in results.examples for m in e.restored}
        pictures = [
            figure
            for example in results.examples
            for figure in example_figures(example, names, input_name, target_name)
        ]
        sections.append(Section("Images", pictures, IMAGES))
    if results.noise:
        difference = f"PET{results.input_seconds} − PET{results.target_seconds}"
        plots = [noise_figure(name, analysis, difference) for name, analysis in results.noise.items()]
        sections.append(Section("Noise", [*plots, _noise_table(results)], NOISE))
    sections.append(Section("Each study", [_study_table(results, key) for key in ("mse", "ssim")], EACH_STUDY))
    sections.append(Section("Published results", [report_text.published_table()], PUBLISHED))
    found = versions()
    run: list[Block] = [
        Table("", [Column("Version")], [Row(name, [version]) for name, version in found.items()], "Software")
    ]
    if results.config:
        run.append(Code("Configuration (YAML)", results.config))
    sections.append(Section("This run", run, RUN))
    facts = {
        "Restored": f"{input_name} → {target_name}",
        "Test studies": f"{len(results.studies)}, {kind}",
        "medaccel": found["medaccel"],
    }
    return Page(f"PET restoration, {input_name} to {target_name}", summary, sections, facts)


def _target_blocks(results: RestorationResults, rows: Sequence[SummaryRow]) -> list[Block]:
    t, total = results.input_seconds, results.target_seconds
    columns = [
        Column("MSE score", "%", signed=True, best="max"),
        Column("Share of the limit", "%", digits=0, best="max"),
        Column("As good as a scan of", "s", digits=0, best="max"),
        Column("1 − SSIM score", "%, 3-D, range 10 SUV", signed=True, best="max"),
        Column("Share of the ceiling", "%", digits=0, best="max"),
        Column("1 − SSIM score", "%, study's range", signed=True, best="max"),
        Column("1 − SSIM score", "%, axial 2-D", signed=True, best="max"),
        Column("PSNR", "dB", best="max"),
        Column("Liver variation", "%"),
    ]
    if results.costs:
        columns += [Column("Time", "s a volume"), Column("Memory", "GiB a volume", digits=2)]
    body = []
    for row in rows:
        m = row.metrics
        share = metrics.share_of_limit(m["score_mse"].mean, t, total)
        cells: list[Cell] = [
            _interval(m["score_mse"]),
            100 * share,
            # Among the references, only the input is an image that a scan could give.
            math.nan if row.method in (ORACLE, NOISE_FREE) else metrics.equivalent_seconds(share, t),
            _interval(m["score_ssim"]),
            100 * m["share_of_ceiling"].mean,
            m["score_ssim_range"].mean,
            m["score_ssim_axial"].mean,
            m["psnr"].mean,
            100 * m["liver_cov"].mean,
        ]
        if results.costs:
            cells += results.costs.get(row.method, (math.nan, math.nan))
        body.append(_row(row.method, cells, results))
    caption = (
        f"Against the {total} s image: 100·(1 − Δ(restored, target)/Δ(input, target)); 0 is no help, negative is "
        "harm. The best method of a column is marked; references are in grey. "
    )
    blocks: list[Block] = [
        Table(caption + report_text.CONVENTIONS, columns, body),
        Note(report_text.limit_note(t, total)),
        Note(report_text.BLIND_SPOT),
    ]
    if results.costs:
        blocks.append(Note(report_text.COSTS))
    ceiling = rows[0].metrics["ceiling_score_ssim"].mean
    if math.isfinite(ceiling):
        weight = rows[0].metrics["ceiling_weight"].mean
        blocks.append(
            Text(
                subscripts(
                    f"The ceiling of the 1 − SSIM score is {ceiling:+.1f} %, of the best blend w·PET_t + (1 − w)·λ "
                    f"(w = {weight:.2f} on average)."
                )
            )
        )
    if {"gaussian1", "gaussian3"} <= results.per_study.keys():
        blocks.append(Text(subscripts(report_text.CASCADE)))
    return blocks + [Text(note) for note in results.notes]


def _truth_blocks(results: RestorationResults, rows: Sequence[SummaryRow]) -> list[Block]:
    columns = [
        Column("MSE score", "%", signed=True, best="max"),
        Column("1 − SSIM score", "%, 3-D, range 10 SUV", signed=True, best="max"),
        Column("MSE", "10⁻³ SUV²", digits=2, best="min"),
        Column("1 − SSIM", "10⁻³", digits=2, best="min"),
        Column("PSNR", "dB", best="max"),
        Column("Error gone in the implied truth", "%", signed=True, best="max"),
    ]
    body = []
    for row in rows:
        m = row.metrics
        cells: list[Cell] = [
            _interval(m["truth_score_mse"]),
            _interval(m["truth_score_ssim"]),
            1000 * m["truth_mse"].mean,
            1000 * m["truth_ssim_distance"].mean,
            m["truth_psnr"].mean if row.method != NOISE_FREE else math.inf,
            m["implied_truth_score"].mean,
        ]
        body.append(_row(row.method, cells, results))
    caption = (
        "Against the noise-free reconstruction λ, which only a simulation can give; scores are relative to the "
        "input's own distance to it. Last column: of the squared error of the input, what is gone in the implied "
        "truth (T·PET_r − t·PET_t)/(T − t)."
    )
    blocks: list[Block] = [Table(subscripts(caption), columns, body)]
    for group, words in (("large", "of 10 mm and more"), ("small", "below 10 mm")):
        count = rows[0].totals[f"lesion_{group}_count"]
        if math.isfinite(count) and count > 0:
            blocks.append(_lesion_table(results, rows, group, f"{count:.0f} hot lesions {words}"))
            blocks.append(_check_table(results, rows, group, words))
    cold = rows[0].agreement["cold", "suvmean"]
    if cold.count:
        body = [_row(row.method, [_limits(row.agreement["cold", "suvmean"])], results) for row in rows]
        column = Column("SUVmean", "% bias [limits]", signed=True, best="zero")
        blocks.append(Table(f"{cold.count} cold lesions of any size.", [column], body))
    if len(blocks) > 1:
        blocks.append(Note(report_text.LESION_RULES))
    return blocks


def _lesion_table(results: RestorationResults, rows: Sequence[SummaryRow], group: str, words: str) -> Table:
    names = {"suvmean": "SUVmean", "suvmax": "SUVmax", "suvpeak": "SUVpeak"}
    columns = [Column(name, "% bias [limits]", signed=True, best="zero") for name in names.values()]
    columns.append(Column("Lost", "lesions", digits=0, best="min"))
    columns.append(Column("Lost that the input keeps", "lesions", digits=0, best="min"))
    columns.append(Column("Created", "hot spots", digits=0, best="min"))
    body = []
    for row in rows:
        cells: list[Cell] = [_limits(row.agreement[group, measure]) for measure in names]
        cells += [row.totals[f"{name}_{group}{end}"] for name, end in _COUNTS]
        body.append(_row(row.method, cells, results))
    return Table(f"{words}, and created hot spots of that size.", columns, body)


def _check_table(results: RestorationResults, rows: Sequence[SummaryRow], group: str, words: str) -> Table:
    columns = [
        Column("Biases below 2 %"),
        Column("Limits of SUVmean", "× the input's", digits=2, best="min"),
        Column("Limits of SUVmax", "× the input's", digits=2, best="min"),
        Column("None lost"),
        Column("None created"),
        Column("All"),
    ]
    before = next((row for row in rows if row.method == IDENTITY), rows[0])
    body = []
    for row in rows:
        found = lesion_checks(row, before, group)
        cells: list[Cell] = [_YES[found["unbiased"]], found["width_suvmean"], found["width_suvmax"]]
        cells += [_YES[found[key]] for key in ("none_lost", "none_created", "passed")]
        body.append(_row(row.method, cells, results))
    caption = (
        f"Are lesions {words} left as they are? Mean biases of SUVmean and SUVmax below 2 %, limits of agreement no "
        "wider than the input's, none lost that the input keeps, none created."
    )
    return Table(caption, columns, body)


def _within_patient_table(results: RestorationResults) -> Table:
    columns = [
        Column("MSE score", "%", signed=True, best="max"),
        Column("1 − SSIM score", "%", signed=True, best="max"),
    ]
    nothing = Statistic(math.nan, math.nan, math.nan, math.nan, 0)
    body = [
        _row(method, [_interval(found.get(key, nothing)) for key in ("mse", "ssim")], results)
        for method, found in results.within_patient.items()
    ]
    caption = (
        "One patient: scores of the whole body with within-patient 95 % intervals, a bootstrap over noise "
        "realisations × axial blocks. They say how sure the score of this patient is, nothing about others."
    )
    return Table(caption, columns, body)


def _noise_table(results: RestorationResults) -> Table:
    distances = sorted({d.voxels for a in results.noise.values() for d in a.differences})
    columns = [Column(f"ρ, d = {d}", digits=2) for d in distances]
    columns += [Column(f"Var(D), d = {d}", digits=2) for d in distances]
    body = []
    for name, analysis in results.noise.items():
        for axis in range(3):
            found = {d.voxels: d for d in analysis.differences if d.axis == axis}
            millimetres = next((d.distance / d.voxels for d in found.values()), math.nan)
            cells = [found[d].correlation if d in found else math.nan for d in distances]
            cells += [found[d].variance if d in found else math.nan for d in distances]
            body.append(Row(f"{name}, axis {AXES[axis]} ({millimetres:.3g} mm)", cells))
    return Table(subscripts(_CORRELATION), columns, body, "Noise")


def _study_table(results: RestorationResults, distance: str) -> Table:
    methods = [m for m in results.per_study if m != IDENTITY]
    columns = [Column(label(m, results.labels), "%", signed=True) for m in methods]
    rows = [
        Row(study, [results.per_study[m][index][f"score_{distance}"] for m in methods])
        for index, study in enumerate(results.studies)
    ]
    name = {"mse": "MSE", "ssim": "1 − SSIM"}[distance]
    return Table(f"{name} score of each study against the {results.target_seconds} s image.", columns, rows, "Study")


def _row(method: str, cells: Sequence[Cell], results: RestorationResults) -> Row:
    return Row(label(method, results.labels), cells, reference=method in REFERENCES)


def _interval(value: Statistic) -> Interval:
    return Interval(value.mean, value.low, value.high)


def _limits(value: Agreement) -> Interval:
    return Interval(value.bias, value.low, value.high)
