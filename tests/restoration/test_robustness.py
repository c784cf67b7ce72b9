# SPDX-License-Identifier: Apache-2.0
"""A scoring has further tables: costs, the share over exposures, and the methods' order under other truths."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.evaluation.ranking import compare_rankings
from medaccel.restoration.methods import load_method
from medaccel.restoration.pipeline import run, score
from medaccel.restoration.report.robustness import other_truths, rank_agreements, truth_blocks
from medaccel.restoration.scoring import Scored, Scorer
from medaccel.restoration.simulation.activity import denoise_activity
from medaccel.restoration.sources import notes_on
from medaccel.restoration.study import save_study
from medaccel.studies.tables import write_json
from tests.restoration.test_classical import make_study


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("studies")
    for role, seeds in (("train", (0, 1)), ("test", (2, 3))):
        for seed in seeds:
            study = make_study(seed)
            save_study(root / role / study.name, study)
    return root


@pytest.fixture(scope="module")
def finished(made: Path, tmp_path_factory: pytest.TempPathFactory) -> RestorationConfig:
    config = RestorationConfig(
        output=tmp_path_factory.mktemp("out") / "run",
        train_studies=made / "train",
        methods=("gaussian1", "nlm", "tv"),
        settings={"gaussian1": {"epochs": 1}, "nlm": {"strengths": [1.0]}, "tv": {"rounds": 1, "strengths": [2.0]}},
    )
    run(config, say=lambda _: None)
    return config


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_scoring_has_costs_and_the_share_over_exposures(made: Path, finished: RestorationConfig):
    chosen = ScoreConfig(finished.output, test_studies=made / "test", curve_seconds=(60, 30), curve_studies=1)
    report = score(chosen, say=lambda _: None)
    folder, html = report.parent, report.read_text()
    assert "Share of the limit over exposures" in html
    assert "GiB a volume" in html
    content = json.loads((folder / "metrics.json").read_text())
    curve = content["curve"]
    assert [(row["method"], row["seconds"]) for row in curve] == [
        (name, t) for t in (30, 60) for name in finished.methods
    ]
    assert all(row["studies"] == 1 for row in curve)
    per_study = {(row["method"], row["study"]): row["share_of_limit"] for row in content["per_study"]}
    at_60 = {row["method"]: row["share_of_limit"] for row in curve if row["seconds"] == 60}
    assert at_60["nlm"] == pytest.approx(per_study["nlm", "made_2"])  # the same study and strength
    at_30 = {row["method"]: row["share_of_limit"] for row in curve if row["seconds"] == 30}
    assert at_30["nlm"] > 0.5  # with the strength that was fitted at 60 s
    assert [row["method"] for row in _rows(folder / "curve.csv")] == [row["method"] for row in curve]
    costs = {row["method"]: row for row in _rows(folder / "costs.csv")}
    assert list(costs) == list(finished.methods)
    for row in content["methods"]:
        known = row["method"] in costs
        assert (row["seconds_per_volume"] is not None) == known
        if known:
            assert row["seconds_per_volume"] == pytest.approx(float(costs[row["method"]]["seconds_per_volume"]))
            assert row["memory_gib"] is None or 0 <= row["memory_gib"] < 2
    assert "seconds_per_volume" not in _rows(folder / "metrics.csv")[0]  # it is the same at each repetition


def test_rows_of_earlier_versions_have_no_memory_and_are_kept(
    made: Path, finished: RestorationConfig, tmp_path: Path
):
    methods = {"gaussian1": load_method(finished.output / "checkpoints" / "gaussian1.pt")}
    scorer = Scorer(methods, tmp_path, progress=False)
    studies = sorted((made / "test").iterdir())
    before = scorer.score(studies, 60, 90)
    for path in (tmp_path / "rows").glob("*.json"):
        record = json.loads(path.read_text())
        del record["memory"]
        write_json(path, record)
    again = scorer.score(studies, 60, 90)
    assert again.times == before.times
    seconds, memory = again.costs()["gaussian1"]
    assert seconds == pytest.approx(np.mean(before.times["gaussian1"]))
    assert math.isnan(memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curve_seconds": [30, 90]}, r"curve_seconds holds \[90\]; expected exposures below 90 s"),
        ({"curve_seconds": [30, 30]}, "curve_seconds is"),
        ({"curve_seconds": [0]}, "curve_seconds is"),
        ({"curve_studies": 0}, "curve_studies is 0"),
        ({"curve_seconds": [45]}, "PET_45.nii.gz: missing exposure, which curve_seconds names"),
        ({"truth": "tv"}, "truth is 'tv' without dicom"),
        ({"truth": "median"}, "truth is 'median'; expected one of nlm, gaussian, tv"),
        ({"observer_phantoms": -1}, "observer_phantoms is -1"),
        ({"observer_phantoms": 1, "observer_realisations": 2}, "observer_realisations 2"),
        ({"observer_phantoms": 1}, "observer_phantoms is given with dicom or test_studies"),
    ],
)
def test_options_that_can_not_be_are_refused_before_anything_is_made(
    options: dict[str, Any], message: str, made: Path, finished: RestorationConfig
):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        score(ScoreConfig(finished.output, test_studies=made / "test", name="refused", **options))
    assert not (finished.output / "scored" / "refused").exists()


def test_scorings_from_before_the_options_existed_go_on(tmp_path: Path):
    before = {
        "dicom",
        "realisations",
        "test_studies",
        "test_phantoms",
        "methods",
        "samples",
        "sampled_studies",
        "name",
    }
    assert set(ScoreConfig(run=tmp_path).plain()) == before
    chosen = ScoreConfig(run=tmp_path, dicom=tmp_path, truth="tv", curve_seconds=(10,))
    assert set(chosen.plain()) == before | {"truth", "curve_seconds"}
    assert chosen.label == "patient_tv"
    assert ScoreConfig(run=tmp_path, dicom=tmp_path).label == "patient"


@pytest.mark.parametrize(
    ("truth", "words"), [("nlm", "non-local means"), ("gaussian", "a Gaussian"), ("tv", "total variation")]
)
def test_the_report_says_what_made_the_truth(truth: Any, words: str, tmp_path: Path):
    (note,) = notes_on(ScoreConfig(run=tmp_path, dicom=tmp_path, truth=truth))
    assert f"denoised by {words}" in note
    assert notes_on(ScoreConfig(run=tmp_path)) == []


# Total variation takes contrast from a ball, the more the smaller it is.
@pytest.mark.parametrize(("method", "kept"), [("nlm", 0.1), ("tv", 0.2)])
def test_a_truth_without_noise_keeps_the_hot_ball_and_loses_the_noise(method: str, kept: float):
    radius = np.sqrt(sum((n - 20) ** 2 for n in np.indices((40, 40, 40))))
    truth = np.where(radius < 5, 8.0, np.where(radius < 17, 1.0, 0.0)).astype(np.float32)
    noisy = np.random.default_rng(0).poisson(truth * 40) / 40
    denoised = denoise_activity(noisy, (4.0, 4.0, 4.0), method)
    inside, flat = radius < 3, (radius > 8) & (radius < 14)
    assert denoised.dtype == np.float32
    assert denoised.min() >= 0
    assert denoised[inside].mean() == pytest.approx(8, rel=kept)
    assert denoised[flat].std() < 0.6 * noisy[flat].std()


def test_the_same_order_has_tau_one_and_the_reverse_minus_one():
    values = {"a": 0.9, "b": 0.8, "c": 0.5, "only here": 1.0}
    same = compare_rankings("nlm", values, "tv", {"a": 0.5, "b": 0.4, "c": 0.1, "only there": 3.0})
    assert (same.tau, same.same_order, same.same_best, same.swapped, same.methods) == (1, True, True, (), 3)
    turned = compare_rankings("nlm", values, "tv", {"a": 0.1, "b": 0.4, "c": 0.5})
    assert (turned.tau, turned.same_order, turned.same_best) == (-1, False, False)
    assert turned.swapped == (("a", "b"), ("a", "c"), ("b", "c"))
    # One of six pairs of four changes places: τ = (5 − 1)/6.
    four = compare_rankings("x", dict(zip("abcd", (4, 3, 2, 1))), "y", dict(zip("abcd", (4, 3, 1, 2))))  # noqa: B905
    assert four.tau == pytest.approx(4 / 6)
    assert (four.same_best, four.swapped) == (True, (("c", "d"),))
    assert math.isnan(compare_rankings("x", {"a": 1, "b": 1}, "y", {"a": 1, "b": 2}).tau)
    with pytest.raises(ValueError, match="1 methods in common"):
        compare_rankings("x", {"a": 1}, "y", {"a": 1})


def test_other_truths_of_the_same_patient_are_found_and_compared(tmp_path: Path):
    def scoring(name: str, shares: dict[str, float], frozen: str = "abc", **options: Any) -> ScoreConfig:
        folder = tmp_path / "scored" / name
        folder.mkdir(parents=True)
        chosen = ScoreConfig(run=tmp_path, dicom=tmp_path / "pet", **options)
        write_json(folder / "scoring.json", {"options": chosen.plain(), "frozen": frozen})
        rows = [{"seconds": 60, "method": m, "share_of_limit": share} for m, share in shares.items()]
        write_json(folder / "metrics.json", {"methods": rows})
        return chosen

    chosen = scoring("patient", {"nlm": 0.7, "tv": 0.6, "unet": 0.8})
    scoring("patient_tv", {"nlm": 0.5, "tv": 0.65, "unet": 0.7, "identity": 0.0}, truth="tv")
    scoring("patient_gaussian", {"nlm": 0.5, "tv": 0.4, "unet": 0.6}, truth="gaussian")
    scoring("other_choices", {"nlm": 0.1, "tv": 0.4}, frozen="def", truth="tv")
    scoring("fewer", {"nlm": 0.1, "tv": 0.4}, truth="tv", realisations=2)
    damaged = tmp_path / "scored" / "damaged"
    damaged.mkdir()
    for name in ("scoring.json", "metrics.json"):
        (damaged / name).write_text("{")
    others = other_truths(tmp_path / "scored" / "patient", chosen, "abc")
    assert [other.truth for other in others] == ["gaussian", "tv"]
    shares = {"identity": 0.0, "unet": 0.8, "nlm": 0.7, "tv": 0.6}
    one = Scored(60, 90, rows={name: [{"share_of_limit": share}] for name, share in shares.items()})
    found = {agreement.second: agreement for agreement in rank_agreements(one, chosen, others)}
    assert found["gaussian"].same_order
    assert found["tv"].swapped == (("nlm", "tv"),)
    table, text = truth_blocks(one, chosen, others)
    assert [column.header for column in table.columns] == ["non-local means", "a Gaussian of 6 mm", "total variation"]
    assert "by a Gaussian of 6 mm the order of the methods is the same (Kendall's τ 1.00, 3 methods)" in text.text
    assert "does not hold, and the best one stays: Non-local means and Total variation change places" in text.text
    assert truth_blocks(one, chosen, []) == []
    assert truth_blocks(dataclasses.replace(one, seconds=30), chosen, others) == []
