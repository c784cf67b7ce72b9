# SPDX-License-Identifier: Apache-2.0
"""Lets model observers look for faint lesions in phantoms, in many realisations of the noise, before and after
restoration.

Each phantom is simulated with its hot lesions and without them (the same person, the same attenuation), several
times each. The lesions keep their places, shapes and sizes, but are made faint, so that they are found sometimes
and missed sometimes: a contrast of CONTRAST·(10 mm/diameter)^1.5 of the host's uptake, as detectability in noise
goes with contrast · diameter^1.5. The observers (`evaluation.observer`) compare an image's neighbourhood of a
lesion with the same neighbourhood in the person without it. They know what the lesion looks like without noise in
an unrestored image.

The folder holds <phantom>.json with the lesions, and <phantom>_<present|absent>_<n>.json with the observers' sums
of each realisation, so that an interrupted work goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medaccel.data.files import read_json
from medaccel.phantoms.pet import DEFAULT_SHAPE, DEFAULT_SPACING, Phantom, make_phantom
from medaccel.restoration.evaluation.comparison import PairedComparison, compare_methods
from medaccel.restoration.evaluation.lesions import LARGE
from medaccel.restoration.evaluation.metrics import Array
from medaccel.restoration.evaluation.observer import (
    Observed,
    channel_width,
    hotelling_templates,
    laguerre_gauss,
    npwe_template,
)
from medaccel.restoration.methods.base import Method, RestorationRequest
from medaccel.restoration.methods.names import IDENTITY
from medaccel.restoration.simulation.config import SimulatorConfig
from medaccel.restoration.simulation.simulator import Projections, draw_counts, expected_projections, reconstruct
from medaccel.studies.statistics import Statistic, mean_statistic
from medaccel.studies.tables import write_json

# The input's AUC comes out at 0.8 (NPWE) and 0.9 (CHO), from 60 s.
CONTRAST = 1.0
TARGET = "target"  # the longer exposure itself, among the methods
OBSERVERS = ("npwe", "cho")
GROUPS = ("small", "large")
_REACH_MM = 24.0  # half the side of a lesion's neighbourhood
_KINDS = ("present", "absent")


@dataclass(frozen=True)
class Template:
    """Holds what the observers know of one lesion: its neighbourhood, and templates on it.

    Attributes:
        box: the neighbourhood in a volume that is padded by `_REACH_MM`.
        npwe: (i, j, k), template of the non-prewhitening observer.
        channels: (channels, i, j, k).
        signal: (channels,), the lesion in them.
    """

    box: tuple[slice, slice, slice]
    npwe: NDArray[np.float64]
    channels: NDArray[np.float64]
    signal: NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """Holds the observers' sums for each lesion.

    Attributes:
        seconds, target_seconds: exposures of input and target.
        phantoms, realisations: their numbers; as many realisations without the lesions.
        lesions: phantom, label, diameter (mm), contrast and organ of each lesion.
        sums: observer: method: a pair of sums for each lesion.
        left_out: methods that were not asked.
    """

    seconds: int
    target_seconds: int
    phantoms: int
    realisations: int
    lesions: list[dict[str, Any]]
    sums: dict[str, dict[str, list[Observed]]]
    left_out: tuple[str, ...] = ()

    def chosen(self, group: str) -> list[int]:
        """Returns the lesions of a group: "small" ones are below 10 mm."""
        return [n for n, one in enumerate(self.lesions) if (one["diameter_mm"] >= LARGE) == (group == "large")]

    def values(self, observer: str, measure: str, group: str) -> dict[str, list[float]]:
        """Returns "snr" or "auc" of each lesion of a group, by method."""
        return {
            method: [getattr(found[n], measure) for n in self.chosen(group)]
            for method, found in self.sums[observer].items()
        }

    def statistic(self, observer: str, measure: str, group: str) -> dict[str, Statistic]:
        """Returns the mean over lesions and its bootstrap interval, by method."""
        return {name: mean_statistic(found) for name, found in self.values(observer, measure, group).items()}

    def comparisons(self, observer: str, group: str) -> list[PairedComparison]:
        """Compares the SNR of each lesion with its SNR in the input; empty without lesions."""
        values = self.values(observer, "snr", group)
        return compare_methods(values, IDENTITY) if self.chosen(group) and len(values) > 1 else []

    def rows(self) -> list[dict[str, Any]]:
        """Returns a flat row for each observer, group and method, for CSV and JSON."""
        rows = []
        for observer in OBSERVERS:
            for group in GROUPS:
                compared = {c.method: c for c in self.comparisons(observer, group)}
                snr, auc = (self.statistic(observer, measure, group) for measure in ("snr", "auc"))
                for method in self.sums[observer]:
                    row: dict[str, Any] = {
                        "seconds": self.seconds,
                        "observer": observer,
                        "group": group,
                        "method": method,
                        "lesions": snr[method].count,
                    }
                    for key, value in (("snr", snr[method]), ("auc", auc[method])):
                        row |= {key: value.mean, f"{key}_low": value.low, f"{key}_high": value.high}
                    found = compared.get(method)
                    row |= {
                        "snr_minus_input": found.difference.mean if found else math.nan,
                        "snr_minus_input_low": found.difference.low if found else math.nan,
                        "snr_minus_input_high": found.difference.high if found else math.nan,
                        "wilcoxon_holm": found.wilcoxon_holm if found else math.nan,
                    }
                    rows.append(row)
        return rows


def detect(
    methods: Mapping[str, Method],
    folder: Path,
    *,
    seeds: Sequence[int],
    realisations: int,
    seconds: int,
    target_seconds: int,
    simulator: SimulatorConfig,
    shape: Sequence[int] = DEFAULT_SHAPE,
    spacing: Sequence[float] = DEFAULT_SPACING,
    progress: bool = True,
) -> Detection:
    """Simulates and restores phantoms with and without lesions, and lets the observers look.

    Args:
        methods: fitted methods by name; those that draw samples are left out, as they would take hours.
        folder: holds the sums; made if missing.
        seeds: seeds of phantoms of the shifted generator.
        realisations: number of images of each phantom with its lesions, and of as many without.
        seconds, target_seconds: exposures of input and target.
        simulator: the scanner.
        shape, spacing: grid of the phantoms; spacing in mm.
        progress: show a bar.

    Raises:
        ValueError: no phantom has a hot lesion.
    """
    asked = {name: method for name, method in methods.items() if not method.samples}
    folder.mkdir(parents=True, exist_ok=True)
    lesions: list[dict[str, Any]] = []
    signals: list[list[float]] = []
    names = [IDENTITY, *asked, TARGET]
    sums: dict[str, list[dict[str, NDArray[np.float64]]]] = {name: [] for name in names}
    with tqdm(
        desc="observers", total=2 * realisations * len(seeds), unit="image", disable=not progress, leave=False
    ) as bar:
        for seed in seeds:
            pair = _Pair(seed, folder, asked, seconds, target_seconds, simulator, shape, spacing)
            record = pair.lesions()
            rows: dict[str, list[dict[str, Any]]] = {}
            for kind in _KINDS:
                rows[kind] = []
                for n in range(realisations):
                    rows[kind].append(pair.sums(kind, n, names, len(record["lesions"])))
                    bar.update()
            lesions += [{"phantom": pair.name, **one} for one in record["lesions"]]
            signals += record["signals"]
            for name in names:
                for n in range(len(record["lesions"])):
                    sums[name].append(
                        {
                            f"{kind}_{what}": np.array([row[name][what][n] for row in rows[kind]])
                            for kind in _KINDS
                            for what in ("npwe", "channels")
                        }
                    )
    if not lesions:
        raise ValueError(f"the phantoms of seeds {list(seeds)} have no hot lesion; expected other ones")
    found: dict[str, dict[str, list[Observed]]] = {observer: {} for observer in OBSERVERS}
    for name, by_lesion in sums.items():
        found["npwe"][name] = [Observed(one["present_npwe"], one["absent_npwe"]) for one in by_lesion]
        found["cho"][name] = _hotelling(np.array(signals), by_lesion)
    left_out = tuple(name for name in methods if name not in asked)
    return Detection(seconds, target_seconds, len(seeds), realisations, lesions, found, left_out)


def _hotelling(
    signals: NDArray[np.float64], by_lesion: Sequence[Mapping[str, NDArray[np.float64]]]
) -> list[Observed]:
    """Returns the sums of the channelized Hotelling observer in one method's images."""
    outputs = [[one[f"{kind}_channels"] for kind in _KINDS] for one in by_lesion]
    residuals = [np.concatenate([rows - rows.mean(axis=0) for rows in kinds]) for kinds in outputs]
    templates = hotelling_templates(signals, residuals)
    return [
        Observed(*(rows @ template for rows in kinds)) for kinds, template in zip(outputs, templates, strict=True)
    ]


class _Pair:
    """Makes one phantom with faint lesions and without any, as needed: what is on disk needs no simulation."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        methods: Mapping[str, Method],
        seconds: int,
        target_seconds: int,
        simulator: SimulatorConfig,
        shape: Sequence[int],
        spacing: Sequence[float],
    ) -> None:
        self.seed, self.folder, self.methods = seed, folder, methods
        self.seconds, self.target_seconds, self.simulator = seconds, target_seconds, simulator
        self.shape, self.spacing = shape, tuple(float(s) for s in spacing)
        self.name = f"shifted_{seed:04d}"
        self._made: tuple[Phantom, list[dict[str, Any]], dict[str, Projections], list[Template]] | None = None

    def lesions(self) -> dict[str, Any]:
        """Returns the lesions and their expected channel outputs, from the phantom's file if it exists."""
        file = self.folder / f"{self.name}.json"
        kept = _read(file)
        if kept is not None and len(kept.get("lesions", "")) == len(kept.get("signals", ())):
            return kept
        _, lesions, _, templates = self._make()
        record = {"lesions": lesions, "signals": [template.signal.tolist() for template in templates]}
        write_json(file, record)
        return record

    def sums(self, kind: str, number: int, names: Sequence[str], lesions: int) -> dict[str, Any]:
        """Returns the observers' sums of one realisation by method, from its file if it has them all."""
        file = self.folder / f"{self.name}_{kind}_{number}.json"
        kept = _read(file)
        if kept is not None and all(_whole(kept.get(name), lesions) for name in names):
            return kept
        phantom, _, projections, templates = self._make()
        # Realisations with and without the lesions are independent, and no test study has their noise.
        seed = 1_000_000 + 1000 * self.seed + 2 * number + _KINDS.index(kind)
        durations = (self.seconds, self.target_seconds)
        counts = draw_counts(projections[kind], durations, seed)
        rates = {t: counts[t].astype(np.float32) / np.float32(t) for t in durations}
        images = reconstruct(projections[kind], rates, self.simulator)
        request = RestorationRequest(images[self.seconds], phantom.spacing, self.seconds, phantom.ct)
        volumes = {IDENTITY: images[self.seconds], TARGET: images[self.target_seconds]}
        volumes |= {name: method.restore(request).volume for name, method in self.methods.items()}
        record = {name: _look(volumes[name], templates, phantom.spacing) for name in names}
        write_json(file, record)
        return record

    def _make(self) -> tuple[Phantom, list[dict[str, Any]], dict[str, Projections], list[Template]]:
        if self._made is None:
            marked = make_phantom(self.seed, "shifted", self.shape, self.spacing)
            clean = make_phantom(self.seed, "shifted", self.shape, self.spacing, lesions=False)
            added, lesions, owner = faint_lesions(marked, clean)
            projections = {
                kind: expected_projections(activity, clean.attenuation, clean.spacing, self.simulator)
                for kind, activity in (("present", clean.activity + added), ("absent", clean.activity))
            }
            images = [
                reconstruct(
                    projections[kind], {0: projections[kind].trues + projections[kind].background}, self.simulator
                )
                for kind in _KINDS
            ]
            signal = images[0][0] - images[1][0]
            templates = [make_template(signal, owner, lesion, clean.spacing) for lesion in lesions]
            self._made = clean, lesions, projections, templates
        return self._made


def faint_lesions(
    marked: Phantom, clean: Phantom, contrast: float = CONTRAST
) -> tuple[Array, list[dict[str, Any]], NDArray[Any]]:
    """Returns a phantom's hot lesions as the activity to add to the same person without them, made faint.

    Args:
        marked: the person with lesions.
        clean: the person without them.
        contrast: contrast of a lesion of 10 mm, as a share of its host's uptake.

    Returns:
        The activity (i, j, k) in SUV; label, diameter, contrast, organ and centre of each hot lesion; and the label
        of the nearest lesion of each voxel, cold ones too.
    """
    from scipy import ndimage

    added = np.zeros_like(clean.activity)
    if not marked.lesion_table:
        return added, [], np.zeros(marked.lesions.shape, dtype=np.uint16)
    _, nearest = ndimage.distance_transform_edt(marked.lesions == 0, sampling=marked.spacing, return_indices=True)
    owner = marked.lesions[tuple(nearest)]
    difference = marked.activity - clean.activity
    found = []
    for row in marked.lesion_table:
        core = marked.lesions == row["label"]
        if row["kind"] != "hot" or not core.any():
            continue
        host = float(clean.activity[core].mean())
        share = contrast * (LARGE / row["diameter_mm"]) ** 1.5
        scale = share * host / (row["suv"] - host)
        own = owner == row["label"]
        added[own] = np.maximum(scale * difference[own], 0)
        found.append(
            {
                "label": row["label"],
                "diameter_mm": row["diameter_mm"],
                "contrast": round(share, 3),
                "organ": row["organ"],
                "centre": [round(float(c), 3) for c in ndimage.center_of_mass(added * core)],
            }
        )
    return added, found, owner


def make_template(
    signal: Array, owner: NDArray[Any], lesion: Mapping[str, Any], spacing: Sequence[float]
) -> Template:
    """Makes what the observers know of one lesion.

    Args:
        signal: the noise-free image with the lesions minus the one without them, (i, j, k).
        owner: the label of the nearest lesion of each voxel.
        lesion: one of the lesions of `faint_lesions`.
        spacing: mm.
    """
    reach = [math.ceil(_REACH_MM / s) for s in spacing]
    middle = [round(c) for c in lesion["centre"]]
    # In the padded volume, the voxel `middle` lies at `middle + reach`.
    box = tuple(slice(m, m + 2 * r + 1) for m, r in zip(middle, reach, strict=True))
    own = _padded(np.where(owner == lesion["label"], signal, 0.0), spacing)[box]
    centre = [r + c - m for r, c, m in zip(reach, lesion["centre"], middle, strict=True)]
    channels = laguerre_gauss(own.shape, centre, spacing, channel_width(lesion["diameter_mm"]))
    return Template((box[0], box[1], box[2]), npwe_template(own, spacing), channels, np.tensordot(channels, own, 3))


def _look(volume: Array, templates: Sequence[Template], spacing: Sequence[float]) -> dict[str, Any]:
    """Returns the observers' sums in one image: of each lesion one of NPWE, and its channels' outputs."""
    padded = _padded(volume, spacing)
    return {
        "npwe": [float(np.sum(template.npwe * padded[template.box])) for template in templates],
        "channels": [np.tensordot(template.channels, padded[template.box], 3).tolist() for template in templates],
    }


def _padded(volume: Array, spacing: Sequence[float]) -> NDArray[np.float64]:
    return np.pad(volume.astype(np.float64), [(math.ceil(_REACH_MM / s),) * 2 for s in spacing])


def _read(file: Path) -> dict[str, Any] | None:
    """Returns a record of this module; None if it isn't there or is damaged."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _whole(row: Any, lesions: int) -> bool:
    try:
        return len(row["npwe"]) == len(row["channels"]) == lesions
    except (TypeError, KeyError):
        return False
