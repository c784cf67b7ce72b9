# SPDX-License-Identifier: Apache-2.0
"""A file of tensors is what was stored, or refused: a flipped byte is never a wrong weight."""

from __future__ import annotations

import os
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from medaccel.data.tensors import check_tensors, load_tensors

CONTENT = {"weights": torch.arange(400.0), "bias": torch.arange(5), "step": 7, "names": ["a", "b"]}


def stored(path: Path, content: object = CONTENT, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


def same(found: dict[str, object]) -> bool:
    return all(
        torch.equal(value, found[key]) if isinstance(value, torch.Tensor) else value == found[key]  # type: ignore[arg-type]
        for key, value in CONTENT.items()
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "format of 2019"])
@pytest.mark.parametrize("mapped", [True, False])
def test_what_is_whole_is_read(tmp_path: Path, zipped: bool, mapped: bool):
    path = stored(tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    if zipped:
        check_tensors(path)
        assert same(load_tensors(path, mmap=mapped))
    else:
        assert same(load_tensors(path))


def test_any_flipped_byte_is_told_or_changes_nothing(tmp_path: Path):
    """One bit of every third byte, and of all of the directory; torch itself takes nearly all for good."""
    path = stored(tmp_path / "a.pt")
    whole = path.read_bytes()
    rng = random.Random(0)
    told = unchanged = 0
    positions = sorted({*range(0, len(whole), 3), *range(whole.index(b"PK\1\2"), len(whole))})
    for position in positions:
        content = bytearray(whole)
        content[position] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of a pickle protocol that there is none of
                unchanged += same(load_tensors(path))
        except ValueError as error:
            told += "a.pt: not a file of tensors that can be read" in str(error)
    assert told + unchanged == len(positions)
    assert told > 0.7 * len(positions)


def test_a_tensor_that_the_directory_calls_a_folder_is_not_taken(tmp_path: Path):
    """torch reads nothing of it then, and returns memory that nobody wrote."""
    path = stored(tmp_path / "a.pt")
    content = bytearray(path.read_bytes())
    name = content.rindex(b"a/data/0PK")  # place in the directory's entry, whose attributes are 8 bytes before
    content[name - 8] |= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt: not .* that can be read \(damaged: a/data/0 is a folder in it\)"):
        load_tensors(path)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_truncated_file_is_told(tmp_path: Path, kept: float):
    path = stored(tmp_path / "a.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    for read in (load_tensors, check_tensors):
        with pytest.raises(ValueError, match=r"a\.pt: not a file of tensors that can be read"):
            read(path)


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(64 << 20))
    with pytest.raises(ValueError, match=r"a\.pt: .*it unpacks to far more than it holds"):
        load_tensors(tmp_path / "a.pt")


def test_code_is_named_and_never_run(tmp_path: Path):
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(ValueError, match=r"a\.pt: not a checkpoint that can be read \(it holds posix\.mkdir, where"):
        load_tensors(stored(tmp_path / "a.pt", Runs()), what="a checkpoint")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file_is_never_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: is a pipe; expected a regular file"):
        load_tensors(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match=r"b\.pt: no such file"):
        load_tensors(tmp_path / "b.pt")
