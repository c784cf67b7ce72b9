# SPDX-License-Identifier: Apache-2.0
"""Tests the package's weights: found, verified, fetched from elsewhere, and used by `restoration apply`."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import medaccel.weights as weights
from medaccel.cli import main
from medaccel.data import make_nifti, save_nifti
from medaccel.restoration.methods import load_method

CONTENT = b"weights" * 1000


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue with one file that is fetched; returns a folder that holds the file, as a mirror does."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "big.pt").write_bytes(CONTENT)
    entry = {
        "file": "big.pt",
        "bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "purpose": "a test",
        "card": "pet_restoration.md",
        "url": "https://weights.invalid/big.pt",
    }
    path = tmp_path / "catalogue.json"
    path.write_text(json.dumps({"big": entry}))
    found = weights.catalogue(path)
    monkeypatch.setattr(weights, "catalogue", lambda: found)
    monkeypatch.setenv("MEDACCEL_WEIGHTS", str(tmp_path / "cache"))
    return mirror


@pytest.fixture
def server(listed: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(listed))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("name", list(weights.catalogue()))
def test_the_packages_weights_are_whole_small_and_described(name: str) -> None:
    chosen = weights.catalogue()[name]
    assert chosen.url or chosen.bytes <= 10_000_000
    assert weights.find(name).stat().st_size == chosen.bytes
    card = chosen.card_path.read_text(encoding="utf-8")
    assert all(heading in card for heading in ("## Training", "## Not for", "## Scores", "## Known failures"))
    assert load_method(weights.find(name)).fitted.parameters["training_range"]


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.delenv("MEDACCEL_WEIGHTS", raising=False)
    assert weights.cache_folder() == Path("/caches/medaccel/weights")
    monkeypatch.setenv("MEDACCEL_WEIGHTS", "/mine")
    assert weights.cache_folder() == Path("/mine")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="weights 'pet' are unknown; expected one of pet_restoration"):
        weights.find("pet")


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert weights.find(tmp_path / "x.pt") == tmp_path / "x.pt"


def test_missing_weights_say_how_to_get_them(listed: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`medaccel weights get big` fetches them"):
        weights.find("big")


def test_weights_come_from_a_file(listed: Path) -> None:
    assert weights.get("big", from_file=listed / "big.pt") == weights.find("big")
    assert weights.find("big").read_bytes() == CONTENT


def test_weights_come_from_a_mirror(server: str) -> None:
    said: list[str] = []
    assert weights.get("big", mirror=server + "/", say=said.append).read_bytes() == CONTENT
    assert said == [f"fetching {server}/big.pt (0.0 MB)"]
    # They are not fetched twice: this address doesn't answer.
    assert weights.get("big", mirror="http://127.0.0.1:9").read_bytes() == CONTENT


def test_a_file_that_is_another_is_refused_and_not_kept(listed: Path, server: str) -> None:
    (listed / "big.pt").write_bytes(CONTENT[:-1] + b"S")
    for source in ({"mirror": server}, {"from_file": listed / "big.pt"}):
        with pytest.raises(ValueError, match=r"SHA-256 is .* expected .* that of the weights 'big'"):
            weights.get("big", **source)
    (listed / "big.pt").write_bytes(2 * CONTENT)
    with pytest.raises(ValueError, match="holds more than the 7000 bytes"):
        weights.get("big", mirror=server)
    assert not list(weights.cache_folder().iterdir())


@pytest.mark.parametrize(
    ("mirror", "message"),
    [
        ("http://127.0.0.1:9", "can't be fetched"),
        ("ftp://somewhere", "expected one that begins with https, http or file"),
        ("somewhere", "expected one that begins with https, http or file"),
    ],
)
def test_an_address_that_gives_nothing_is_an_error(listed: Path, mirror: str, message: str) -> None:
    with pytest.raises((OSError, ValueError), match=message):
        weights.get("big", mirror=mirror)


def test_damaged_weights_are_found_out(listed: Path) -> None:
    place = weights.get("big", from_file=listed / "big.pt")
    place.write_bytes(b"x" + CONTENT[1:])
    with pytest.raises(ValueError, match="SHA-256 is"):
        weights.find("big")
    assert weights.get("big", from_file=listed / "big.pt", force=True).read_bytes() == CONTENT


def test_commands(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "list"]) == 0
    assert "big: a test" in capsys.readouterr().out
    assert main(["weights", "path", "big"]) == 2
    assert main(["weights", "get", "big", "--from-file", str(listed / "big.pt")]) == 0
    capsys.readouterr()
    assert main(["weights", "path", "big"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes() == CONTENT
    assert main(["weights", "path", "none"]) == 2


def _pet(path: Path) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((28, 24, 30)), 0.7)  # as wide as a scanner's
    volume = np.zeros((40, 36, 30), dtype=np.float32)
    volume[6:-6, 6:-6] = np.square(1.4 + 0.12 * noise / noise.std())
    save_nifti(path, make_nifti(volume, np.diag([4.0, 4, 4, 1])))
    return volume


def test_apply_needs_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume = _pet(tmp_path / "pet.nii.gz")
    copy = shutil.copy(weights.find(weights.RESTORATION), tmp_path / "copy.pt")
    results = []
    given = ["restoration", "apply", str(tmp_path / "pet.nii.gz")]
    for number, more in enumerate(([], ["--model", "pet_restoration"], ["--model", copy], ["--checkpoint", copy])):
        out = tmp_path / f"{number}.nii"
        arguments = [*given, str(out), "--seconds", "45", *map(str, more)]
        assert main(arguments) == 0, capsys.readouterr().err
        results.append(np.asarray(nibabel.load(out).dataobj))
    assert all(np.array_equal(results[0], other) for other in results[1:])
    inside = (slice(12, -12), slice(12, -12), slice(5, -5))
    # Half of the blend is the PET itself; the other half is nearly free of noise.
    assert results[0][inside].std() < 0.6 * volume[inside].std()
    assert results[0][inside].mean() == pytest.approx(volume[inside].mean(), rel=0.02)


def test_checkpoint_and_model_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _pet(tmp_path / "pet.nii.gz")
    arguments = ["restoration", "apply", str(tmp_path / "pet.nii.gz"), str(tmp_path / "out.nii")]
    assert main([*arguments, "--model", "pet_restoration", "--checkpoint", "x.pt"]) == 2
    assert "checkpoint and model are both given" in capsys.readouterr().err
    assert not (tmp_path / "out.nii").exists()
