# SPDX-License-Identifier: Apache-2.0
"""Tests the command line: help with examples, configuration files, exit codes."""

import collections
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medaccel.cli import main
from medaccel.ops._registry import OPS
from medaccel.ops.gaussian import native


def image(path: Path) -> Path:
    data = np.random.default_rng(0).random((12, 10, 8)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([2.0, 2.0, 4.0, 1.0])), path)
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["smooth"],
        ["info"],
        ["restoration", "run"],
        ["restoration", "score"],
        ["restoration", "apply"],
        ["pretraining", "run"],
        ["segmentation", "run"],
        ["segmentation", "apply"],
        ["demo"],
    ],
)
def test_help_has_examples_one_a_line(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    examples = text[text.index("examples:") :].splitlines()[1:]
    assert all(line.strip().startswith(("medaccel ", "torchrun ", "--")) for line in examples if line.strip())
    assert "--config" in text


def test_doctor_prints_the_table(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    assert "gaussian_filter" in capsys.readouterr().out


def test_verify_checks_the_kernels_and_writes_its_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "verify.json"
    assert main(["verify", "--devices", "[cpu]", "--speed", "false", "--json", str(target)]) == 0
    outcome = json.loads(target.read_text())
    assert outcome["passed"] is True
    counts = collections.Counter((check["op"], check["dtype"]) for check in outcome["checks"])
    assert set(counts) == {(op, dtype) for op in OPS for dtype in ("float64", "float32", "bfloat16", "float16")}
    assert counts["gaussian_filter", "float32"] == 9 * 5 + 3  # cases, borders; scalars as numbers
    assert min(counts.values()) >= 3
    assert "all held" in capsys.readouterr().out


def test_verify_fails_where_a_kernel_gives_wrong_numbers(monkeypatch: pytest.MonkeyPatch):
    kernel = native.gaussian_filter
    monkeypatch.setattr(native, "gaussian_filter", lambda *a, **k: kernel(*a, **k) * 1.001)
    assert main(["verify", "--devices", "[cpu]", "--speed", "false"]) == 1


def test_smooth_takes_flags_and_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, target = image(tmp_path / "in.nii.gz"), tmp_path / "out.nii.gz"
    command = ["smooth", str(source), str(target), "--fwhm", "5", "--quiet"]
    assert main(command) == 0
    first = target.read_bytes()
    assert main(command) == 1
    assert str(target) in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert target.read_bytes() == first


def test_a_configuration_file_is_read_and_overridden(tmp_path: Path):
    source, config = image(tmp_path / "in.nii.gz"), tmp_path / "smooth.yaml"
    config.write_text("sigma: 3.0\nunit: voxel\n")
    results = []
    for name, more in (("a", ["--sigma", "0"]), ("b", [])):
        target = tmp_path / f"{name}.nii.gz"
        assert main(["smooth", "--config", str(config), str(source), str(target), "--quiet", *more]) == 0
        results.append(nibabel.load(target).get_fdata())
    assert np.array_equal(results[0], nibabel.load(source).get_fdata())
    assert not np.allclose(results[0], results[1])


def test_a_missing_file_is_a_sentence_and_exit_code_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["smooth", str(tmp_path / "none.nii"), str(tmp_path / "out.nii"), "--sigma", "1"]) == 1
    assert "none.nii" in capsys.readouterr().err


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["frobnicate"])
    assert end.value.code == 2
    assert "smooth" in capsys.readouterr().err
