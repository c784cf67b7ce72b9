# SPDX-License-Identifier: Apache-2.0
"""Study folders, and small runs on them, for several files of tests."""

from pathlib import Path

import pytest

from medaccel.restoration import methods
from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.pipeline import run, score
from medaccel.restoration.study import save_study
from tests.restoration.made import Broken, Drawer, Smoother
from tests.restoration.runs import GAUSSIANS, SETTINGS
from tests.restoration.test_gaussian_methods import make_study


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("studies")
    for role, seeds in (("train", (0, 1, 4)), ("test", (2, 3))):
        for seed in seeds:
            study = make_study(seed)
            (root / role).mkdir(exist_ok=True)
            save_study(root / role / study.name, study)
    return root / "train", root / "test"


@pytest.fixture(scope="module")
def finished(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RestorationConfig:
    config = RestorationConfig(
        output=tmp_path_factory.mktemp("out") / "run",
        train_studies=folders[0],
        methods=(*GAUSSIANS, "diffusion_sdedit", "diffusion_conditional"),
        settings=SETTINGS,
    )
    run(config)
    return config


@pytest.fixture(scope="module")
def scored(folders: tuple[Path, Path], finished: RestorationConfig) -> ScoreConfig:
    chosen = ScoreConfig(finished.output, test_studies=folders[1])
    score(chosen)
    return chosen


@pytest.fixture(scope="module")
def quick(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RestorationConfig:
    """A run that takes a second."""
    config = RestorationConfig(
        output=tmp_path_factory.mktemp("quick") / "run",
        train_studies=folders[0],
        methods=("gaussian1",),
        settings={"gaussian1": {"epochs": 1}},
    )
    run(config)
    return config


@pytest.fixture
def known_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds these methods to those that checkpoints may be of."""
    for kind in (Smoother, Drawer, Broken):
        monkeypatch.setitem(methods.METHODS, kind.name, f"{kind.__module__}:{kind.__name__}")
