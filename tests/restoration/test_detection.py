# SPDX-License-Identifier: Apache-2.0
"""Faint lesions are looked for with and without restoration, at matched places, and an interrupted search goes on."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from medaccel.phantoms.pet import make_phantom
from medaccel.restoration import detection
from medaccel.restoration.detection import TARGET, Detection, _padded, detect, faint_lesions, make_template
from medaccel.restoration.evaluation.observer import Observed
from medaccel.restoration.methods.base import Method, Restoration, RestorationRequest, RestorationTask
from medaccel.restoration.report.detectability import detection_blocks
from medaccel.restoration.simulation.config import SimulatorConfig
from tests.restoration.made import Drawer, Smoother

GRID: dict[str, Any] = {"shape": (50, 37, 30), "spacing": (6.0, 6.0, 6.0)}
SCANNER = SimulatorConfig(n_angles=24, iterations=1, fine_factor=1)


class Eraser(Smoother):
    """Makes every image the same: no lesion can be found in it."""

    name = "eraser"

    def restore(self, request: RestorationRequest) -> Restoration:
        return Restoration(np.full_like(request.volume, 1.0))


class Truthful(Smoother):
    """Returns the image as it came."""

    name = "truthful"

    def restore(self, request: RestorationRequest) -> Restoration:
        return Restoration(request.volume)


def _detect(folder: Path, methods: dict[str, Method], **options: Any) -> Detection:
    given: dict[str, Any] = {"seeds": [3], "realisations": 3, "seconds": 60, "target_seconds": 90}
    return detect(methods, folder, simulator=SCANNER, progress=False, **(given | GRID | options))


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Method], Detection]:
    folder = tmp_path_factory.mktemp("observers")
    kinds: list[type[Method]] = [Truthful, Eraser, Drawer]
    methods = {kind.name: kind(RestorationTask()) for kind in kinds}
    return folder, methods, _detect(folder, methods)


def test_the_same_person_without_lesions_differs_only_at_them():
    marked = make_phantom(3, "shifted", **GRID)
    clean = make_phantom(3, "shifted", **GRID, lesions=False)
    assert clean.lesion_table == []
    assert not clean.lesions.any()
    away = ndimage.distance_transform_edt(marked.lesions == 0, sampling=GRID["spacing"]) > 12
    np.testing.assert_array_equal(marked.activity[away], clean.activity[away])
    np.testing.assert_array_equal(marked.ct[away], clean.ct[away])
    assert (marked.activity != clean.activity).any()


def test_faint_lesions_have_the_contrast_that_is_asked_for_and_cold_ones_none():
    marked, clean = (make_phantom(3, "shifted", **GRID, lesions=kept) for kept in (True, False))
    added, found, owner = faint_lesions(marked, clean, contrast=0.8)
    hot = [row for row in marked.lesion_table if row["kind"] == "hot"]
    assert [one["label"] for one in found] == [row["label"] for row in hot]
    assert added.min() >= 0
    for one in found:
        core = marked.lesions == one["label"]
        assert one["contrast"] == pytest.approx(0.8 * (10 / one["diameter_mm"]) ** 1.5, abs=1e-3)
        # Lumps and partly covered voxels leave the largest voxel near the contrast that the lesion has.
        share = added[core].max() / clean.activity[core].mean()
        assert 0.25 * one["contrast"] < share < 1.6 * one["contrast"]
    cold = [row["label"] for row in marked.lesion_table if row["kind"] == "cold"]
    assert cold
    assert not added[np.isin(owner, cold)].any()
    twice = faint_lesions(marked, clean, contrast=1.6)[0]
    np.testing.assert_allclose(twice, 2 * added, rtol=1e-5, atol=1e-6)


def test_a_template_sees_its_own_lesion_alone():
    marked, clean = (make_phantom(3, "shifted", **GRID, lesions=kept) for kept in (True, False))
    added, found, owner = faint_lesions(marked, clean)
    for lesion in found:
        template = make_template(added, owner, lesion, GRID["spacing"])
        own = np.where(owner == lesion["label"], added, 0)
        assert template.npwe.shape == template.channels.shape[1:]
        inside = _padded(own, GRID["spacing"])[template.box]
        np.testing.assert_allclose(np.tensordot(template.channels, inside, 3), template.signal)
        assert np.sum(template.npwe * inside) > 0
        assert template.signal[0] > 0


def test_a_lesion_is_found_in_the_image_as_well_as_it_was_and_not_at_all_where_it_is_erased(
    looked: tuple[Path, dict[str, Method], Detection],
):
    _, methods, found = looked
    assert found.left_out == ("drawer",)
    assert list(found.sums["npwe"]) == ["identity", "truthful", "eraser", TARGET]
    for observer, by_method in found.sums.items():
        for same, before in zip(by_method["truthful"], by_method["identity"], strict=True):
            assert (same.snr, same.auc) == (before.snr, before.auc), observer
        assert {one.auc for one in by_method["eraser"]} == {0.5}
    assert len(found.lesions) == len(found.chosen("small")) + len(found.chosen("large"))
    assert found.values("npwe", "snr", "large")["eraser"] == [0.0] * len(found.chosen("large"))
    (row,) = [r for r in found.rows() if (r["observer"], r["group"], r["method"]) == ("cho", "large", "truthful")]
    assert (row["snr_minus_input"], row["wilcoxon_holm"]) == (0, 1)
    assert len(methods) == 3


def test_what_is_on_disk_is_not_simulated_again_and_what_is_damaged_is(
    looked: tuple[Path, dict[str, Method], Detection], monkeypatch: pytest.MonkeyPatch
):
    folder, methods, before = looked
    damaged = folder / "shifted_0003_present_1.json"
    content = damaged.read_text()
    record = json.loads(content)
    for text in ("{", "[]", json.dumps(record | {"truthful": {"npwe": [1.0]}}), json.dumps({"identity": {}})):
        damaged.write_text(text)
        again = _detect(folder, methods)
        assert json.dumps(again.rows()) == json.dumps(before.rows())
        assert json.loads(damaged.read_text()) == record
    monkeypatch.setattr(detection, "expected_projections", lambda *given: pytest.fail("simulated again"))
    assert json.dumps(_detect(folder, methods).rows()) == json.dumps(before.rows())


def test_the_report_shows_both_observers_and_what_was_left_out():
    sums = {
        observer: {
            name: [Observed(np.array([2.0, 3.0, 4.0]) + add, np.array([1.0, 2.0, 2.5])) for _ in range(3)]
            for name, add in (("identity", 0.0), ("nlm", 1.0), (TARGET, 2.0))
        }
        for observer in ("npwe", "cho")
    }
    lesions = [{"diameter_mm": d} for d in (7.0, 10.0, 20.0)]
    found = Detection(60, 90, 1, 3, lesions, sums, ("diffusion_sdedit",))
    small, large, note, left_out = detection_blocks(found)
    assert [small.caption[:7], large.caption[:7]] == ["1 faint", "2 faint"]
    assert [row.label for row in large.rows] == ["Identity (the input)", "Non-local means", "Target (90 s)"]
    assert [row.reference for row in large.rows] == [True, False, True]
    gained = large.rows[1].cells[2]
    assert gained.value == pytest.approx(1 / math.sqrt((1 + 1.75 / 3) / 2), rel=0.01)
    assert "Laguerre-Gauss" in note.text
    assert "Diffusion, SDEdit" in left_out.text
    only_large = dataclasses.replace(found, lesions=[{"diameter_mm": 12.0}] * 3)
    assert len(detection_blocks(only_large)) == 3
