# SPDX-License-Identifier: Apache-2.0
"""`medaccel restoration run`: studies, fits, scores, report, in one resumable folder.

config.yaml          the options; a second run with the same ones resumes, with others it is refused
studies/train|test/  simulated studies (in the layout of `medaccel.restoration.study`)
checkpoints/         one file a fitted method
scores/              one file a test study: every method's metrics
metrics.json|csv     the tables; metrics_per_study.csv, noise.csv
figures/, report.html
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from medaccel.data import open_series, read_pet_series, voxel_spacing
from medaccel.data.files import write_bytes, write_text
from medaccel.report.html import Figure, Page, versions, write_html
from medaccel.restoration import metrics
from medaccel.restoration.config import RunConfig
from medaccel.restoration.evaluation import StudyEvaluator, SummaryRow, summarize
from medaccel.restoration.methods.gaussian import GaussianMethod, fit, restore
from medaccel.restoration.generate import simulate_study, write_studies
from medaccel.restoration.noise import NoiseAnalysis, analyse_noise
from medaccel.restoration.report import FittedMethod, RestorationResults, build_page
from medaccel.restoration.report_figures import Example
from medaccel.restoration.simulator import Progress, SimulatorConfig
from medaccel.restoration.statistics import Statistic, within_patient
from medaccel.restoration.study import Study, find_studies, is_complete, load_study, save_study

TEST_SEED = 1000  # test phantoms are drawn from here on: another generator, and other seeds as well
GENERATED = ("studies", "checkpoints", "scores", "figures")


def run(config: RunConfig, *, force: bool = False, say: Callable[[str], None] = print) -> Path:
    """Fits the methods, scores them on held-out studies and writes the report.

    Args:
        config: the options.
        force: start clean where the folder holds a run with other options, or a finished one.
        say: told what happens, a line at a time.

    Returns:
        The path of report.html.

    Raises:
        ValueError, OSError: bad options or data, an unwritable folder, a folder that holds something else.
    """
    folder = config.output
    _check_sources(config)
    _open_folder(folder, config, force, say)
    train = _training_studies(config, say)
    methods: dict[str, GaussianMethod] = {}
    fitted: dict[str, FittedMethod] = {}
    for name in config.methods:
        checkpoint = folder / "checkpoints" / f"{name}.pt"
        say(f"{name}: {'fitted before' if checkpoint.exists() else 'fitting'} ({len(train)} training studies)")
        methods[name], fitted[name] = fit(
            name,
            train,
            config.input_seconds,
            config.target_seconds,
            epochs=config.epochs,
            seed=config.seed,
            checkpoint=checkpoint,
        )
    del train
    paths = _test_studies(config, say)
    scored = [_score(path, config, methods, folder / "scores") for path in tqdm(paths, desc="scoring", unit="study")]
    names = [name for name, _ in scored]
    per_study = {method: [rows[method] for _, rows in scored] for method in scored[0][1]}
    example = load_study(paths[0], (config.input_seconds, config.target_seconds))
    noise = _noise(example, config)
    results = RestorationResults(
        input_seconds=config.input_seconds,
        target_seconds=config.target_seconds,
        studies=names,
        per_study=per_study,
        data=_describe_data(config),
        simulated=config.test_studies is None or example.noise_free is not None,
        examples=[_example(example, config, methods)],
        noise={example.name: noise},
        fitted=fitted,
        within_patient=_within_patient(paths, config, methods) if config.dicom is not None else {},
        config=_yaml(config),
        notes=_notes(example, config),
    )
    table = summarize(per_study)
    page = build_page(results)
    _write_results(folder, config, results, table, noise)
    _write_figures(folder / "figures", page)
    report = folder / "report.html"
    write_html(report, page, force=True)
    say(_printed(table))
    say(f"report: {report.resolve()}")
    return report


def _check_sources(config: RunConfig) -> None:
    """Fails now what would otherwise fail after the fits: options and folders that can't be used."""
    _simulator(config)
    chosen = [folder for folder in (config.train_studies, config.test_studies) if folder is not None]
    found = [{path.resolve() for path in find_studies(folder)} for folder in chosen]
    if len(found) == 2 and found[0] & found[1]:
        shared = min(found[0] & found[1])
        raise ValueError(f"{shared} is among the training and the test studies; a study can't be both")
    if config.dicom is not None:
        open_series(config.dicom)


# --- the run's folder ----------------------------------------------------------------------------------------
def _yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True)


def _open_folder(folder: Path, config: RunConfig, force: bool, say: Callable[[str], None]) -> None:
    """Makes the folder, or takes up the run that it holds; says which."""
    record = folder / "config.yaml"
    if record.exists():
        try:
            before = yaml.safe_load(record.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            before = {"config.yaml": f"unreadable: {error}"}
        now = json.loads(json.dumps(config.plain()))
        same = before == now
        if same and not force:
            say(f"{folder}: resuming the run that is there (the same options); --force starts clean")
        elif force:
            say(f"{folder}: starting clean (--force); what the earlier run made is removed")
            for name in GENERATED:
                shutil.rmtree(folder / name, ignore_errors=True)
        else:
            differing = [k for k in {**now, **(before or {})} if (before or {}).get(k) != now.get(k)]
            raise ValueError(
                f"{folder} holds a run with other options ({', '.join(differing)} differ); "
                "choose another --output, or --force to start clean"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run (no config.yaml); choose another --output")
    try:
        for name in ("checkpoints", "scores", "figures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"the output folder can't be made: {error.strerror}", str(folder)) from error
    write_text(record, _yaml(config), force=True)


# --- studies -------------------------------------------------------------------------------------------------
def _simulator(config: RunConfig) -> SimulatorConfig:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.simulator.items()}
    try:
        simulator = SimulatorConfig(**values)
    except TypeError as error:
        raise ValueError(f"simulator has an unknown parameter: {error}") from error
    missing = {config.input_seconds, config.target_seconds} - set(simulator.durations)
    if missing:
        raise ValueError(
            f"input_seconds and target_seconds must be among the simulated durations {simulator.durations}; "
            f"{sorted(missing)} are not (simulator.durations sets them)"
        )
    return simulator


@contextmanager
def _percent(description: str) -> Iterator[Progress]:
    """A bar for work that reports its share done and a word about itself."""
    with tqdm(total=100, desc=description, unit="%", bar_format="{desc}: {bar} {n:.0f} % {postfix}") as bar:

        def report(share: float, message: str) -> None:
            bar.n = 100 * share
            bar.set_postfix_str(message)

        yield report


def _phantoms(config: RunConfig, role: str, count: int, generator: str, first_seed: int) -> list[Path]:
    with _percent(f"{role} phantoms") as report:
        seeds = range(first_seed, first_seed + count)
        folder = config.output / "studies" / role
        return write_studies(folder, seeds, generator, config=_simulator(config), progress=report)


def _training_studies(config: RunConfig, say: Callable[[str], None]) -> list[Study]:
    durations = (config.input_seconds, config.target_seconds)
    if config.train_studies is not None:
        paths = find_studies(config.train_studies)
        say(f"training studies: {len(paths)} in {config.train_studies}")
    else:
        say(f"training studies: {config.train_phantoms} simulated phantoms (standard generator)")
        paths = _phantoms(config, "train", config.train_phantoms, "standard", config.seed)
    return [load_study(path, durations) for path in paths]


def _test_studies(config: RunConfig, say: Callable[[str], None]) -> list[Path]:
    if config.dicom is not None:
        return _real_patient(config, config.dicom, say)
    if config.test_studies is not None:
        paths = find_studies(config.test_studies)
        say(f"test studies: {len(paths)} in {config.test_studies}")
        return paths
    say(f"test studies: {config.test_phantoms} simulated phantoms (shifted generator)")
    return _phantoms(config, "test", config.test_phantoms, "shifted", config.seed + TEST_SEED)


def _real_patient(config: RunConfig, dicom: Path, say: Callable[[str], None]) -> list[Path]:
    """Simulated exposures of a measured PET: its denoised activity is the truth."""
    say(f"test studies: {config.realisations} noise realisations of the PET in {dicom} (simulated exposures)")
    simulator = _simulator(config)
    paths, image = [], None
    for index in range(config.realisations):
        path = config.output / "studies" / "test" / f"patient_{index}"
        paths.append(path)
        if is_complete(path):
            continue
        if image is None:
            image = read_pet_series(dicom, progress=True)
        with _percent(path.name) as report:
            study = simulate_study(
                path.name,
                np.maximum(np.asarray(image.dataobj, dtype=np.float32), 0),
                voxel_spacing(image),
                image.affine,
                config=simulator,
                seed=config.seed + TEST_SEED + index,
                denoise="nlm",
                origin={"dicom": dicom.name},
                progress=report,
            )
            save_study(path, study, force=True)
    return paths


def _describe_data(config: RunConfig) -> str:
    if config.dicom is not None:
        return "simulated noise realisations of one measured PET"
    if config.test_studies is not None:
        return f"the studies in {config.test_studies.name}"
    return "phantoms of the shifted generator, which no method was fitted on"


def _notes(example: Study, config: RunConfig) -> list[str]:
    notes = []
    if config.dicom is not None:
        notes.append(
            "The patient's own image is noisy, so it was denoised (non-local means) before its exposures were "
            "simulated: the denoised image is the truth here. All test studies are one patient; intervals are "
            "within-patient."
        )
    if example.noise_free is None:
        notes.append("The test studies hold no noise-free image, so nothing is compared with the truth.")
    return notes


# --- scores --------------------------------------------------------------------------------------------------
def _restored(study: Study, config: RunConfig, methods: Mapping[str, GaussianMethod]) -> dict[str, np.ndarray]:
    """Every row of the table as a volume: the references, and each method's result."""
    image = study.exposures[config.input_seconds]
    rows = {"identity": image}
    rows |= {name: restore(method, image, study.spacing) for name, method in methods.items()}
    if study.noise_free is not None:
        rows["oracle"] = metrics.oracle(image, study.noise_free, config.input_seconds, config.target_seconds)
        rows["noise_free"] = study.noise_free
    return rows


def _score(
    path: Path, config: RunConfig, methods: Mapping[str, GaussianMethod], folder: Path
) -> tuple[str, dict[str, dict[str, float]]]:
    """A study's name and its rows; kept in a file, so that a second run need not compute them again."""
    record = folder / f"{path.name}.json"
    if record.exists():
        kept = json.loads(record.read_text(encoding="utf-8"))
        return path.name, {m: {k: math.nan if v is None else v for k, v in row.items()} for m, row in kept.items()}
    study = load_study(path, (config.input_seconds, config.target_seconds))
    evaluator = StudyEvaluator(study, config.input_seconds, config.target_seconds)
    rows = {name: evaluator.evaluate(volume) for name, volume in _restored(study, config, methods).items()}
    write_text(record, _json(rows), force=True)
    return path.name, rows


def _within_patient(
    paths: Sequence[Path], config: RunConfig, methods: Mapping[str, GaussianMethod]
) -> dict[str, dict[str, Statistic]]:
    studies = [load_study(path, (config.input_seconds, config.target_seconds)) for path in paths]
    inputs = [s.exposures[config.input_seconds] for s in studies]
    targets = [s.exposures[config.target_seconds] for s in studies]
    mask = metrics.body_mask(targets[0], studies[0].spacing)
    result = {}
    for name, method in methods.items():
        restored = [restore(method, image, studies[0].spacing) for image in inputs]
        result[name] = {
            distance: within_patient(restored, inputs, targets, mask, studies[0].spacing, distance=distance)
            for distance in ("mse", "ssim")
        }
    return result


def _noise(study: Study, config: RunConfig) -> NoiseAnalysis:
    target = study.exposures[config.target_seconds]
    mask = metrics.body_mask(target, study.spacing)
    return analyse_noise(study.exposures[config.input_seconds], target, mask, study.spacing)


def _example(study: Study, config: RunConfig, methods: Mapping[str, GaussianMethod]) -> Example:
    rows = _restored(study, config, methods)
    return Example(
        name=study.name,
        affine=study.affine,
        input=rows["identity"],
        target=study.exposures[config.target_seconds],
        restored={name: rows[name] for name in methods},
        noise_free=study.noise_free,
        lesions=study.lesions,
    )


# --- results -------------------------------------------------------------------------------------------------
def _json(value: Any) -> str:
    """JSON text; a number that is not finite becomes null."""

    def clean(v: Any) -> Any:
        if isinstance(v, Mapping):
            return {str(k): clean(x) for k, x in v.items()}
        if isinstance(v, list | tuple):
            return [clean(x) for x in v]
        if isinstance(v, np.generic):
            v = v.item()
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(clean(value), indent=1, ensure_ascii=False) + "\n"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_results(
    folder: Path, config: RunConfig, results: RestorationResults, table: Sequence[SummaryRow], noise: NoiseAnalysis
) -> None:
    per_study = [
        {"study": study, "method": method, **row}
        for method, rows in results.per_study.items()
        for study, row in zip(results.studies, rows, strict=True)
    ]
    content = {
        "config_digest": config.digest(),
        "input_seconds": config.input_seconds,
        "target_seconds": config.target_seconds,
        "mse_limit": metrics.mse_limit(config.input_seconds, config.target_seconds),
        "methods": [row.flat() for row in table],
        "per_study": per_study,
        "within_patient": {m: {d: asdict(s) for d, s in row.items()} for m, row in results.within_patient.items()},
        "fitted": {name: asdict(method) for name, method in results.fitted.items()},
        "noise": noise.rows(),
        "versions": versions(),
    }
    write_text(folder / "metrics.json", _json(content), force=True)
    write_text(folder / "metrics.csv", _csv([row.flat() for row in table]), force=True)
    write_text(folder / "metrics_per_study.csv", _csv(per_study), force=True)
    write_text(folder / "noise.csv", _csv(noise.rows()), force=True)


def _write_figures(folder: Path, page: Page) -> None:
    figures = [block for section in page.sections for block in section.blocks if isinstance(block, Figure)]
    for number, figure in enumerate(figures, start=1):
        write_bytes(folder / f"figure_{number:02d}.png", figure.png, force=True)


def _printed(table: Sequence[SummaryRow]) -> str:
    columns = (  # title, width, metric, factor
        ("MSE score %", 14, "score_mse", 1),
        ("1-SSIM score %", 16, "score_ssim", 1),
        ("share of limit %", 18, "share_of_limit", 100),
        ("truth MSE score %", 19, "truth_score_mse", 1),
    )
    lines = [f"{'method':<14}" + "".join(f"{title:>{width}}" for title, width, _, _ in columns)]
    for row in table:
        cells = (f"{factor * row.metrics[key].mean:>{width}.1f}" for _, width, key, factor in columns)
        lines.append(f"{row.method:<14}" + "".join(cells))
    return "\n".join(lines)
