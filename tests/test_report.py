# SPDX-License-Identifier: Apache-2.0
"""The report: one file that needs nothing else, with every row and figure, the right way up."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from markupsafe import Markup

from medaccel.report import figures
from medaccel.report.html import (
    Code,
    Column,
    Figure,
    Interval,
    Note,
    Page,
    Row,
    Section,
    Table,
    Text,
    format_cell,
    render,
    versions,
    write_html,
)
from medaccel.restoration.evaluation.metrics import body_mask, oracle
from medaccel.restoration.evaluation.noise import analyse_noise
from medaccel.restoration.evaluation.study_scores import StudyEvaluator, summarize
from medaccel.restoration.methods.names import LABELS
from medaccel.restoration.report.figures import RestorationExample
from medaccel.restoration.report.scores import RestorationResults, build_page
from medaccel.restoration.report.text import finding
from medaccel.studies.statistics import ratio_score
from tests.restoration.test_evaluation import SimulatedStudy

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])


class Reader(HTMLParser):
    """Notes everything that a browser would load, and whether every tag is closed."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.images: list[bytes] = []
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.sources.append(value or "")
            if tag == "img" and name == "src":
                self.images.append(base64.b64decode((value or "").split(",")[1]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def _pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png))[..., :3]


@pytest.fixture(scope="module")
def results() -> RestorationResults:
    """Two small simulated studies with all that a report can show."""
    generator = np.random.default_rng(0)
    per_study: dict[str, list[dict[str, float]]] = {}
    examples, noise = [], {}
    for name in ("first", "second"):
        truth = np.zeros((26, 20, 30))
        truth[4:-4, 4:-4] = 1.0
        lesions = np.zeros(truth.shape, dtype=np.int16)
        lesions[8:11, 8:11, 8:11], lesions[16, 14, 20] = 1, 2
        truth[lesions > 0] = 5.0
        parts = generator.normal(0, 0.3, (3, *truth.shape))
        exposures = {30 * (n + 1): truth + parts[: n + 1].mean(axis=0) for n in range(3)}
        study = SimulatedStudy(name, (4.0, 4.0, 4.0), exposures, truth, lesions)
        image, target = exposures[60], exposures[90]
        restored = {
            "identity": image,
            "gaussian1": 0.9 * image + 0.1 * truth,
            "gaussian3": 0.9 * image + 0.1 * truth,
            "gaussian_mix": 0.8 * image + 0.2 * truth,
            "oracle": oracle(image, truth, 60, 90),
            "noise_free": truth,
        }
        for method, volume in restored.items():
            per_study.setdefault(method, []).append(StudyEvaluator(study, 60, 90).evaluate(volume))
        fitted = {key: restored[key] for key in ("gaussian1", "gaussian_mix")}
        examples.append(RestorationExample(name, AFFINE, image, target, fitted, truth, lesions))
        noise[name] = analyse_noise(image, target, body_mask(target, study.spacing), study.spacing)
    return RestorationResults(
        60, 90, ("first", "second"), per_study, "cubes made by hand",
        examples=examples[:1],
        noise=noise,
        within_patient={"gaussian1": {"mse": ratio_score([[1.0, 2.0, 3.0]], [[2.0, 2.5, 4.0]])}},
        config="epochs: 3\nseed: 0 # <script>\n",
        notes=["The truth of a real study is its denoised image."],
    )  # fmt: skip


@pytest.fixture(scope="module")
def html(results: RestorationResults, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_html(path, build_page(results))
    return path.read_text(encoding="utf-8")


def test_the_report_loads_nothing_from_outside(html: str):
    reader = _read(html)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in reader.sources)
    assert not reader.tags & {"script", "link", "iframe", "object"}
    assert "url(" not in html
    assert "@import" not in html


def test_every_figure_is_a_png_inside_the_file(html: str, results: RestorationResults):
    # Projections, coronal, axial; two noise analyses.
    images = _read(html).images
    assert len(images) == 3 + 2
    assert all(_pixels(image).std() > 0.02 for image in images)


def test_both_tables_have_every_row(html: str, results: RestorationResults):
    for anchor in ("against-the-90-s-image", "against-the-noise-free-truth"):
        section = html.split(f'<section id="{anchor}">')[1].split("</section>")[0]
        for method in results.per_study:
            assert f'<th scope="row">{LABELS[method]}</th>' in section


@pytest.mark.parametrize(
    "text",
    ["The limit:", "blind spot", "Gaussians in sequence are one Gaussian", "33.3 %", "66.7 %", "−128.6",
     "Kruzhilov", "simulated exposures", "epochs: 3", "The truth of a real study is its denoised image.",
     "Bland–Altman", "within-patient 95 % intervals", "Lost", "Created", "bootstrap",
     "torch", "monai", "Python", "platform"],
)  # fmt: skip
def test_the_report_says(html: str, text: str):
    assert text in html


def test_text_is_escaped_and_markup_is_not(html: str):
    assert "# &lt;script&gt;" in html
    page = Page("A < B", [Markup("<b>bold</b>")], [])
    assert "<title>A &lt; B</title>" in render(page)
    assert "<p><b>bold</b></p>" in render(page)


def test_numbers_of_the_table_are_those_of_the_summary(html: str, results: RestorationResults):
    mix = next(row for row in summarize(results.per_study) if row.method == "gaussian_mix")
    score = mix.metrics["score_mse"]
    assert f"+{score.mean:.1f}" in html
    assert f"[+{score.low:.1f}, +{score.high:.1f}]" in html
    assert f"removes {score.mean:.1f} % (95 % interval" in html


def test_an_existing_report_is_kept_unless_forced(results: RestorationResults, tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(FileExistsError):
        write_html(path, Page("new", [], []))
    assert path.read_text() == "old"
    write_html(path, Page("new", [], []), force=True)
    assert "<h1>new</h1>" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_study_gives_a_report_without_the_truth(results: RestorationResults):
    real = {
        method: [{k: (math.nan if "truth" in k or "lesion" in k or "ceiling" in k else v) for k, v in row.items()}
                 for row in rows]
        for method, rows in results.per_study.items() if method not in ("oracle", "noise_free")
    }  # fmt: skip
    page = build_page(
        RestorationResults(60, 90, ("first", "second"), real, "one patient", simulated=False, config="a: 1")
    )
    titles = [section.title for section in page.sections]
    assert "Against the noise-free truth" not in titles
    assert [section.key for section in page.sections] == ["target", "each_study", "published", "run"]
    assert page.facts["Test studies"] == "2, measured exposures"
    assert not any("oracle" in paragraph for paragraph in page.summary)
    _read(render(page))


def _summary(results: RestorationResults, **scores: float) -> list[str]:
    per_study = {m: [dict(row) for row in rows] for m, rows in results.per_study.items()}
    for method, score in scores.items():
        for row in per_study[method]:
            row["score_mse"] = score
    return finding(summarize(per_study), {}, data="cubes", simulated=True, input_seconds=60, target_seconds=90)


def test_the_finding_names_the_best_method_and_its_share(results: RestorationResults):
    text = " ".join(_summary(results, gaussian1=12.0, gaussian3=12.1, gaussian_mix=16.7, oracle=33.0))
    assert "Gaussian mix, the best on MSE, removes 16.7 % (95 % interval 16.7 to 16.7)" in text
    assert "50 % of the limit, as good as a scan of 120 s" in text
    assert "as they must, being one Gaussian" in text
    assert "more than two points off" not in text


def test_the_finding_says_when_nothing_helped_or_a_fit_went_wrong(results: RestorationResults):
    text = " ".join(_summary(results, gaussian1=-3.0, gaussian3=-1.0, gaussian_mix=-2.0, oracle=29.0))
    assert "Gaussian, 3 layers, the best on MSE, does not help on MSE: it scores −1.0 %" in text
    assert "one of the fits has not converged" in text
    assert "more than two points off the limit" in text


def test_results_that_do_not_fit_together_are_refused(results: RestorationResults):
    with pytest.raises(ValueError, match=r"per_study has rows \{'identity': 2.* for 3 studies"):
        RestorationResults(60, 90, ("a", "b", "c"), results.per_study, "")


def test_the_best_is_marked_among_methods_not_among_references():
    column = Column("score", best="max")
    rows = [Row("a", [1.0]), Row("b", [Interval(3.01, 1, 5)]), Row("c", [2.96]), Row("truth", [9.0], True)]
    rows.append(Row("undefined", [math.nan]))
    assert not any(row["cells"][0]["best"] for row in Table("", [column], rows[1:]).formatted())
    marks = [row["cells"][0]["best"] for row in Table("", [column], rows).formatted()]
    assert marks == [False, True, True, False, False]  # 3.01 and 2.96 look the same: 3.0


@pytest.mark.parametrize(("best", "marked"), [("min", 0), ("zero", 1), (None, None)])
def test_what_counts_as_best_is_the_columns(best, marked):
    rows = [Row("a", [-5.0]), Row("b", [1.0]), Row("c", [3.0])]
    marks = [row["cells"][0]["best"] for row in Table("", [Column("x", best=best)], rows).formatted()]
    assert [n for n, mark in enumerate(marks) if mark] == ([] if marked is None else [marked])


@pytest.mark.parametrize(
    ("cell", "column", "expected"),
    [
        (11.84, Column("x", signed=True), ("+11.8", "")),
        (-0.04, Column("x", signed=True), ("0.0", "")),
        (-58.6, Column("x"), ("−58.6", "")),
        (math.nan, Column("x"), ("–", "")),
        (math.inf, Column("x"), ("∞", "")),
        (12345.0, Column("x", digits=0), ("12\u202f345", "")),
        (Interval(1.0, 0.5, 2.0), Column("x"), ("1.0", "[0.5, 2.0]")),
        (Interval(1.0, math.nan, math.nan), Column("x"), ("1.0", "")),
        ("60 s", Column("x"), ("60 s", "")),
    ],
)
def test_cells_read_as_numbers_do_in_print(cell, column: Column, expected: tuple[str, str]):
    assert format_cell(cell, column) == expected


def test_a_row_that_does_not_fit_its_table_is_refused():
    with pytest.raises(ValueError, match="row 'a' has 2 cells"):
        Table("scores", [Column("x")], [Row("a", [1.0, 2.0])])


def test_every_kind_of_block_is_rendered():
    png = figures.line_plot({"loss": [1.0, 0.5]}, x_label="epoch", y_label="loss")
    table = Table("cap", [Column("x", "mm")], [Row("a", [1.0])])
    blocks = [Text("one"), Note("two"), Code("three", "four"), table, Figure(png, "five", "six")]
    html = render(Page("t", ["s"], [Section("First part", blocks)], {"fact": "value"}))
    _read(html)
    assert 'id="first-part"' in html
    for text in ("one", "two", "three", "four", "cap", "five", 'alt="six"', "value"):
        assert text in html


def test_versions_name_packages_that_are_missing():
    found = versions(("torch", "no-such-package"))
    assert re.match(r"\d+\.\d+", found["torch"])
    assert found["no-such-package"] == "not installed"
    assert set(found) == {"torch", "no-such-package", "Python", "platform"}


def _marked_volume() -> np.ndarray:
    """Makes a canonical 10×8×12 volume with a mark at the patient's right front of the head."""
    volume = np.zeros((10, 8, 12), dtype=np.float32)
    volume[9, 7, 11] = 1.0
    return volume


def test_pictures_have_the_head_up_and_the_patients_right_on_the_left():
    volume, spacing = _marked_volume(), (2.0, 3.0, 5.0)
    for part in (figures.coronal_slice(volume, spacing, 7), figures.coronal_projection(volume, spacing)):
        assert part.pixels.shape == (12, 10)
        assert part.pixels[0, 0] == 1
        assert part.spacing == (5.0, 2.0)
        assert part.edges == ("R", "L", "H", "F")
    axial = figures.axial_slice(volume, spacing, 11)
    assert axial.pixels.shape == (8, 10)
    assert axial.pixels[0, 0] == 1
    assert axial.spacing == (3.0, 2.0)


def test_a_volume_stored_in_another_orientation_gives_the_same_picture():
    # Stored k, j, i with i and j counted backwards, as a sagittal LP series may be.
    stored = _marked_volume()[::-1, ::-1].transpose(2, 1, 0)
    affine = np.array([[0, 0, -2.0, 18], [0, -3.0, 0, 21], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    volume, spacing = figures.to_canonical(stored, affine)
    assert spacing == (2.0, 3.0, 5.0)
    assert np.array_equal(volume, _marked_volume())


def test_pictures_keep_the_proportions_of_the_patient():
    # 40 mm across and 120 mm tall, from voxels of 4 × 3 mm.
    part = figures.Slice(np.ones((40, 10)), (3.0, 4.0), ("R", "L", "H", "F"))
    png = figures.image_grid([figures.ImageRow([part], [""], 0, 1, "SUV")], width=3.0)
    dark = _pixels(png).max(axis=2) < 0.05
    dark[:, int(2.2 * figures.DPI) :] = False  # the colour bar
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    ratio = (rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1)
    assert ratio == pytest.approx(3, rel=0.05)


def test_uptake_is_black_on_white():
    part = figures.Slice(np.array([[0.0, 7.0]]), (10.0, 10.0), ("R", "L", "H", "F"))
    pixels = _pixels(figures.image_grid([figures.ImageRow([part], [""], 0, 7, "SUV")], width=3.0))
    middle = pixels[pixels.shape[0] // 2]
    assert middle[int(0.35 * figures.DPI)].min() > 0.95
    assert middle[int(1.8 * figures.DPI)].max() < 0.05


def test_the_same_figure_is_the_same_bytes():
    draw = [figures.line_plot({"a": [3.0, 2.0]}, x_label="x", y_label="y", log=True) for _ in range(2)]
    assert draw[0] == draw[1]


def test_figures_without_content_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        figures.image_grid([])
    with pytest.raises(ValueError, match="at least one"):
        figures.line_plot({"a": []}, x_label="", y_label="")
    with pytest.raises(ValueError, match="at least one"):
        figures.histogram_plot([], x_label="")
    part = figures.Slice(np.ones((2, 2)), (1.0, 1.0), ("", "", "", ""))
    uneven = [figures.ImageRow([part], ["a"], 0, 1, ""), figures.ImageRow([part, None], ["a", "b"], 0, 1, "")]
    with pytest.raises(ValueError, match=r"image rows have \[1, 2\] pictures"):
        figures.image_grid(uneven)


def test_importing_the_report_loads_no_matplotlib():
    import subprocess
    import sys

    code = (
        "import sys, medaccel.report.html, medaccel.report.figures, medaccel.restoration.report.scores as r;"
        "print([m for m in ('matplotlib', 'scipy', 'skimage', 'jinja2', 'monai') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
