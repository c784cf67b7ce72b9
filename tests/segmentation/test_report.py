# SPDX-License-Identifier: Apache-2.0
"""Tests the report on cells whose figures are known: its words and its pictures."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medaccel.data import make_nifti, save_nifti
from medaccel.phantoms.ct_dataset import write_task
from medaccel.segmentation.config import SegmentationConfig
from medaccel.segmentation.evaluation.curves import late_gain
from medaccel.segmentation.evaluation.results import Outcome, read_run
from medaccel.segmentation.pipeline import run
from medaccel.segmentation.report import examples as report_examples
from medaccel.segmentation.report import figures as report_figures
from medaccel.segmentation.report import text as words
from medaccel.studies.statistics import Comparison, Spread
from tests.segmentation.fake_cells import fake_cell, fake_pretraining

WANTED = {"task": "spleen", "fraction": 0.2, "init": "instance_pixel", "against": "random", "expected": 3.0}


def compared(difference: float, p: float) -> Comparison:
    return Comparison(difference, 1.0, 2.5, p, difference - 1, difference + 1, 6, 20, 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("spleen", "lung"):
        write_task(root / name, name, 9, spacing=(8.0, 8.0, 8.0), progress=False)
    return root


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SegmentationConfig:
    config = SegmentationConfig(
        output=tmp_path_factory.mktemp("out") / "study",
        tasks={"spleen": {"data": str(data / "spleen")}, "lung": {"data": str(data / "lung")}},
        phantoms={"pool": 2, "pool_spacing": [8.0, 8.0, 8.0]},
        inits=("random", "instance_pixel"),
        fractions=(0.34, 1.0),
        seeds=(0, 1, 2),
        primary={"fraction": 0.34, "seeds": [0, 1, 2]},
        backend="sequential",
    )
    again(config)
    return config


def again(config: SegmentationConfig) -> str:
    """Returns the text of the report, without its markup, in one line."""
    path = run(config, run_cell=fake_cell, pretrain=fake_pretraining, say=lambda line: None)
    return plain(path.read_text(encoding="utf-8"))


def plain(text: str) -> str:
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


@pytest.mark.parametrize(
    ("difference", "p", "verdict", "met"),
    [
        (4.2, 0.01, "there is a gain", "was met"),
        (1.5, 0.01, "there is a gain", "was not met"),
        (4.2, 0.2, "a gain is not shown (p is not below 0.05)", "was met"),
        (-0.5, 0.01, "there is no gain", "was not met"),
        (2.0, float("nan"), "a gain is not shown", "was not met"),
    ],
)
def test_the_primary_comparison_is_stated_as_it_is(difference: float, p: float, verdict: str, met: str):
    sentence = words.primary_sentence(
        WANTED, Spread(80 + difference, 1, 6), Spread(80, 2, 6), compared(difference, p)
    )
    assert f": {verdict}" in sentence
    assert sentence.endswith(f"Expected was +3.0 or more, which {met}.")
    assert "named before the study was run (spleen, 20 % of the labels, instance_pixel against random)" in sentence
    assert "over 6 runs and 20 test cases" in sentence
    assert "higher in 5 of 6 runs" in sentence


def test_the_first_lines_are_the_primary_comparison(finished: SegmentationConfig):
    text = plain((finished.output / "report.html").read_text(encoding="utf-8"))
    metrics = json.loads((finished.output / "metrics.json").read_text())["primary"]["result"]
    first = text.index("Primary comparison, named before")
    assert first < 400
    assert f"difference +{metrics['difference']:.1f} points (paired t(2)" in text[first : first + 600]
    assert "simulated" not in text[:1000]  # the tasks were given, as real ones are


def test_every_cell_is_in_the_table_as_it_is(finished: SegmentationConfig):
    text = plain((finished.output / "report.html").read_text(encoding="utf-8"))
    cells = finished.cells()
    outcome = Outcome(cells, {cell.name: finished.output / "cells" / cell.name for cell in cells})
    for group in outcome.groups.values():
        values = " ".join(f"{run.mean('dice'):.1f}" for run in group.runs.values())
        assert f"{100 * group.fraction:g} %, {group.init} {values}" in text
    assert outcome.has_lesions("lung")
    assert not outcome.has_lesions("spleen")
    assert text.count("Lesions found") == 1
    assert "50.0 ± 0.0 1.00 ± 0.00" in text  # one of two lesions, and one false positive per scan


def test_means_over_runs_are_those_of_the_results(finished: SegmentationConfig):
    groups = json.loads((finished.output / "metrics.json").read_text())["groups"]
    group = next(g for g in groups if (g["task"], g["init"], g["fraction"]) == ("spleen", "instance_pixel", 1.0))
    per_run, errors, differences = [], [], []
    for seed in range(3):
        rows = {}
        for init in ("instance_pixel", "random"):
            path = finished.output / "cells" / f"spleen-{init}-100-seed{seed}" / "result.json"
            rows[init] = json.loads(path.read_text())["rows"]
        per_run.append(100 * np.mean([row["dice"] for row in rows["instance_pixel"]]))
        errors.append(np.mean([abs(row["volume_error_ml"]) for row in rows["instance_pixel"]]))
        differences.append(per_run[-1] - 100 * np.mean([row["dice"] for row in rows["random"]]))
    assert group["dice"]["mean"] == pytest.approx(np.mean(per_run))
    assert group["dice"]["sd"] == pytest.approx(np.std(per_run, ddof=1))
    assert group["volume_error_ml"]["mean"] == pytest.approx(np.mean(errors))
    assert group["dice_against_random"]["difference"] == pytest.approx(np.mean(differences))
    assert group["volumes"]["bias_ml"] < 0


def test_phantoms_are_called_simulated(tmp_path: Path):
    config = SegmentationConfig(
        output=tmp_path / "study",
        tasks={"spleen": {}},
        phantoms={"cases": 9, "spacing": [8.0, 8.0, 8.0]},
        inits=("random",),
        fractions=(1.0,),
        seeds=(0,),
        primary={"none": True},
        backend="sequential",
    )
    text = again(config)
    assert "No primary comparison was asked for." in text
    assert "The scans of spleen are simulated (phantoms)" in text


@pytest.mark.slow
def test_examples_have_contours_and_the_illustration_its_dice(
    finished: SegmentationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The network is replaced by one that finds the right half of the bright voxels."""

    def right_half(checkpoint: Path, scan: Any) -> np.ndarray:
        mask = (np.asarray(scan.dataobj) > 0).astype(np.uint8)
        mask[mask.shape[0] // 2 :] = 0
        return mask

    monkeypatch.setattr(report_examples, "_segmented", right_half)
    for cell in finished.cells():
        if cell.task == "spleen":
            (finished.output / "cells" / cell.name / "best.pt").touch()
    hu = np.full((8, 10, 6), -1000, dtype=np.int16)
    hu[2:6, 3:7, 1:5] = 50
    save_nifti(tmp_path / "ct.nii.gz", make_nifti(hu, np.diag([4.0, 4, 4, 1])))
    save_nifti(tmp_path / "organs.nii.gz", make_nifti((7 * (hu > 0)).astype(np.uint8), np.diag([4.0, 4, 4, 1])))
    options = {"image": str(tmp_path / "ct.nii.gz"), "task": "spleen"}
    shown = {**options, "organs": str(tmp_path / "organs.nii.gz"), "label": 7}
    text = again(replace(finished, illustration=shown))  # no other study for that
    assert text.count("contours of the truth (green) and of the prediction (red)") == 2
    assert "the network of cell spleen-instance_pixel-100-seed0. Dice 66.7 points." in text
    assert "it is no part of the study" in text
    assert "Its truth is not known." in again(replace(finished, illustration=options))
    assert "has not ended yet" in again(replace(finished, illustration={**options, "task": "lung"}))
    with pytest.warns(UserWarning, match=r"illustration\.image: .*organs\.nii\.gz: looks like a label map"):
        text = again(replace(finished, illustration={**options, "image": str(tmp_path / "organs.nii.gz")}))
    assert "The illustration is left out" in text
    save_nifti(tmp_path / "small.nii.gz", make_nifti(np.zeros((4, 4, 4), np.uint8), np.eye(4)))
    with pytest.raises(ValueError, match=r"illustration.organs has the shape \(4, 4, 4\); expected the image's"):
        again(replace(finished, illustration={**shown, "organs": str(tmp_path / "small.nii.gz")}))
    with pytest.raises(ValueError, match=r"illustration is of .*'fraction': 0.9.*; expected a cell of the study"):
        again(replace(finished, illustration={**options, "fraction": 0.9}))


def test_contours_lie_where_the_masks_are():
    """Red and green pixels of the picture are around the masks, on the viewer's side that they belong to."""
    from io import BytesIO

    from matplotlib.image import imread

    hu = np.zeros((40, 40, 5))
    truth, predicted = np.zeros((2, *hu.shape), dtype=bool)
    truth[4:14, 15:25, 2] = True  # the patient's left: i runs to the right
    predicted[26:36, 15:25, 2] = True
    example = report_figures.SegmentationExample(np.diag([2.0, 2, 5, 1]), hu, truth, {"one": predicted}, (0.0, 1.0))
    picture = imread(BytesIO(report_figures.contour_figure(example)))[..., :3]
    red = (picture[..., 0] > 0.6) & (picture[..., 1] < 0.5)
    green = (picture[..., 1] > 0.45) & (picture[..., 0] < 0.35)
    width = picture.shape[1]
    assert np.argwhere(red)[:, 1].max() < width / 2 < np.argwhere(green)[:, 1].min()


def test_what_a_pretraining_reached_is_a_row_a_task():
    content = {
        "held_out": {
            "instance": {"top1": 0.83, "chance": 1 / 64, "target": 0.8, "reached": True},
            "pixel": {"share": 0.4, "share_in_body": 0.5, "chance": 0.01, "target": 0.6, "reached": False},
        }
    }
    rows = words.pretraining_rows("instance_pixel-0", content)
    assert [label for label, _ in rows] == ["instance_pixel-0, instance", "instance_pixel-0, pixel"]
    assert rows[0][1][1:] == [0.83, 1 / 64, 0.8, "yes"]
    assert rows[1][1][1:] == [0.5, 0.01, 0.6, "no"]


def test_a_head_start_is_told_from_a_gain():
    pretrained, random = [[(10, 0.5), (20, 0.7), (30, 0.8)]], [[(10, 0.2), (20, 0.6), (30, 0.8)]]
    sentence = words.head_start(pretrained, random)
    assert "differed by +30.0 points at step 10 and by 0.0 at the last, 30" in sentence.replace("+0.0", "0.0")
    assert words.head_start(pretrained, [[(15, 0.1)]]) == ""
    assert late_gain(random[0]) == pytest.approx(0.2)
    assert np.isnan(late_gain([]))


@pytest.mark.parametrize("text", ["{", "{}", '{"cell": {"task": "spleen"}, "rows": [], "curve": []}'])
def test_a_result_that_is_none_is_refused(finished: SegmentationConfig, tmp_path: Path, text: str):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result.json: not a cell's result .*; delete it to run the cell anew"):
        read_run(tmp_path / "result.json", finished.cells()[0])


def test_a_result_of_another_cell_is_refused(finished: SegmentationConfig):
    first, second = finished.cells()[:2]
    with pytest.raises(ValueError, match=r"of the cell .*; expected"):
        read_run(finished.output / "cells" / first.name / "result.json", second)


def test_runs_that_were_tested_on_other_cases_are_not_compared(finished: SegmentationConfig, tmp_path: Path):
    cells = [cell for cell in finished.cells() if cell.task == "spleen"]
    for cell in cells:
        content = json.loads((finished.output / "cells" / cell.name / "result.json").read_text())
        if cell.init == "random" and cell.seed == 1:
            content["rows"][0]["case"] = "another"
        (tmp_path / cell.name).mkdir()
        (tmp_path / cell.name / "result.json").write_text(json.dumps(content))
    outcome = Outcome(cells, {cell.name: tmp_path / cell.name for cell in cells})
    with pytest.raises(ValueError, match="were tested on other cases; expected the same ones"):
        outcome.groups["spleen", "instance_pixel", 1.0].against(outcome.groups["spleen", "random", 1.0])
