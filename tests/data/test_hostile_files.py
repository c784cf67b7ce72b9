# SPDX-License-Identifier: Apache-2.0
"""Files that are broken, or made to do harm: each is refused in a sentence with its name, before memory is taken."""

from __future__ import annotations

import collections
import gzip
import os
import random
import socket
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from medaccel.data import read_nifti, read_pet_series, voxel_spacing
from medaccel.data.ct import Scan, find_scans, read_scan, sift
from medaccel.data.files import check_input, read_json
from medaccel.data.metaimage import read_metaimage
from tests.data.dicom_series import write_series

AFFINE = np.array([[-2.0, 0, 0, 10], [0, -3, 0, 20], [0, 0, 4, -30], [0, 0, 0, 1]])
MOST_MEMORY = 32e6  # bytes that reading a small or a broken file may take


def voxels(shape: tuple[int, ...] = (9, 8, 7)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def nifti(kind: type = nib.Nifti1Image, **fields: Any) -> bytearray:
    """Returns a file's bytes, with header fields overwritten."""
    image = kind(voxels(), AFFINE)
    image.set_qform(AFFINE, code=1)
    content = bytearray(image.to_bytes())
    dtype = nib.nifti1.header_dtype if kind is nib.Nifti1Image else nib.nifti2.header_dtype
    header = np.frombuffer(content, dtype, count=1)
    with np.errstate(all="ignore"):
        for name, value in fields.items():
            header[name] = value
    return content


@contextmanager
def little_memory(most: float = MOST_MEMORY) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak / 1e6:.0f} MB"


# --- More than a file says, or more than it can hold ---


def bomb(path: Path, promised: tuple[int, int, int], unpacked: int) -> Path:
    content = bytes(nifti(dim=[3, *promised, 1, 1, 1, 1]))[:352]
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(content)
        for _ in range(unpacked >> 20):
            file.write(bytes(1 << 20))
    return path


def test_no_more_is_unpacked_than_the_header_promises(tmp_path: Path):
    path = bomb(tmp_path / "a.nii.gz", (9, 8, 7), 256 << 20)
    assert path.stat().st_size < 1e6
    with little_memory(), pytest.raises(ValueError, match=r"a\.nii\.gz: unpacks to more than the \d+ bytes that its"):
        read_nifti(path)


@pytest.mark.parametrize("shape", [(2000, 2000, 2000), (32767, 32767, 32767), (1200, 1000, 1000)])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_a_file_can_not_hold_is_refused_before_memory_is_taken(
    tmp_path: Path, name: str, shape: tuple[int, int, int]
):
    content = nifti(dim=[3, *shape, 1, 1, 1, 1])
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with (
        little_memory(),
        pytest.raises(ValueError, match=rf"{name}: truncated file or broken header: shape .* needs"),
    ):
        read_nifti(tmp_path / name)


def test_more_than_there_is_memory_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("medaccel.data.nifti.available_memory", lambda: 1000.0)
    (tmp_path / "a.nii").write_bytes(nifti())
    with pytest.raises(
        ValueError, match=r"a\.nii: shape \(9, 8, 7\) of int16 needs .* GB of memory, and .* are free"
    ):
        read_nifti(tmp_path / "a.nii")


def test_one_such_scan_ends_no_run(tmp_path: Path):
    for name in ("b", "c"):
        (tmp_path / f"{name}.nii").write_bytes(nifti())
    bomb(tmp_path / "a.nii.gz", (9, 8, 7), 64 << 20)
    os.mkfifo(tmp_path / "d.nii.gz")
    (tmp_path / "e.nii").symlink_to(tmp_path / "nowhere.nii")
    (tmp_path / "f.nii").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path)  # a folder within itself
    kept, skipped = sift(find_scans(tmp_path).scans, read_scan, limit=0.7)
    assert [scan.path.name for scan in kept] == ["b.nii", "c.nii"]
    assert [skip.path.name for skip in skipped] == ["a.nii.gz", "d.nii.gz", "e.nii", "f.nii"]
    assert all(skip.path.name in skip.reason for skip in skipped)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("offset", [np.inf, -np.inf, np.nan, -352.0, 0.0, 1.0, 351.0, 352.5, 1e9, 3e38])
def test_voxels_begin_where_they_can(tmp_path: Path, name: str, offset: float):
    content = nifti(vox_offset=offset)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with (
        little_memory(),
        pytest.raises(ValueError, match=rf"{name}: (broken NIfTI header: vox_offset|truncated file)"),
    ):
        read_nifti(tmp_path / name)


def test_gzip_in_several_members_is_read_and_what_follows_is_told(tmp_path: Path):
    content, path = bytes(nifti()), tmp_path / "a.nii.gz"
    halves = gzip.compress(content[:500]) + gzip.compress(content[500:])
    for tail in (b"", bytes(512)):  # tapes and block devices fill up with zeros
        path.write_bytes(halves + tail)
        np.testing.assert_array_equal(np.asarray(read_nifti(path).dataobj), voxels())
    for tail in (b"trailing", gzip.compress(content)[:40]):
        path.write_bytes(halves + tail)
        with pytest.raises(ValueError, match=r"a\.nii\.gz: truncated or corrupt gzip file"):
            read_nifti(path)


@pytest.mark.parametrize("size", [1e6, 1e3, 50.0])
def test_a_scan_larger_than_a_body_is_refused(tmp_path: Path, size: float):
    """Brought to 1.5 mm, it would ask for terabytes."""
    image = nib.Nifti1Image(voxels((70, 70, 70)), np.diag([size, size, size, 1.0]))
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii: is .* mm large by its header; expected a scan of a body, in mm"):
        read_scan(Scan(tmp_path / "a.nii", "nifti"))


# --- What is no file ---


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 108 characters
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _circle(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (_pipe, "is a pipe; expected a regular file"),
    "a socket": (_socket, "is a socket; expected a regular file"),
    "a folder": (Path.mkdir, "is a folder; expected a regular file"),
    "zero": (lambda path: path.symlink_to("/dev/zero"), "is a link to a device; expected a regular file"),
    "stdin": (lambda path: path.symlink_to("/dev/stdin"), "is a link to"),
    "nowhere": (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
    "a circle": (_circle, "a link that leads back to itself"),
    "nothing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(
    ("reader", "name"),
    [(read_nifti, "a.nii.gz"), (read_nifti, "a.nii"), (read_metaimage, "a.mhd"), (read_json, "a.json")],
)
def test_what_is_no_file_is_never_opened(tmp_path: Path, reader: Callable[[Path], Any], name: str, kind: str):
    make, message = NO_FILES[kind]
    make(tmp_path / name)
    if kind == "stdin" and not os.path.exists("/dev/stdin"):
        pytest.skip("this process has no standard input")
    if kind == "stdin" and (tmp_path / name).is_file():
        pytest.skip("standard input is a file here")
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}: {message}"):
        reader(tmp_path / name)


def test_the_voxels_of_a_metaimage_are_no_pipe_either(tmp_path: Path):
    path = metaimage(tmp_path / "a.mhd")
    raw = path.with_suffix(".raw")
    raw.unlink()
    os.mkfifo(raw)
    with pytest.raises(ValueError, match=r"a\.mhd: can't be read as MetaImage \(.*a\.raw: is a pipe"):
        read_metaimage(path)
    for name in ("/etc/passwd", "../a.raw", "LIST", "slice%03d.raw 1 7 1"):
        path.write_text(path.read_text().replace("a.raw", name))
        with pytest.raises(ValueError, match=r"expected LOCAL, or one file in the same folder"):
            read_metaimage(path)
        path.write_text(path.read_text().replace(name, "a.raw"))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.nii").write_bytes(nifti())
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may read everything
    with pytest.raises(PermissionError, match=r"no permission to read it: '.*a\.nii'"):
        read_nifti(tmp_path / "a.nii")


def test_names_that_no_file_can_have():
    with pytest.raises(ValueError, match=r"'a\\x00\.nii' is no name of a file"):
        check_input("a\0.nii")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{", b"[" * 100_000])
def test_json_that_is_none_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: not JSON \("):
        read_json(tmp_path / "a.json")


# --- Fuzzing: bounded, and the same in every run ---

EXTREMES: dict[str, list[Any]] = {
    "f": [np.nan, np.inf, -np.inf, 1e38, -1, 0, 1e-38, 352.5],
    "i": [0, -1, 1, 8, 32767, -32768, 2**31 - 1, 2**63 - 1, -(2**63), 2**62],
    "u": [0, 255],
}


def _mutated(rng: random.Random, content: bytearray, dtype: np.dtype) -> bytearray:
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind = rng.random()
        if kind < 0.5 and len(content) >= dtype.itemsize:
            header = np.frombuffer(content, dtype, count=1)
            name = rng.choice(dtype.names or ())
            if dtype[name].base.kind in EXTREMES:
                field = header[name].reshape(-1)
                value = np.array(rng.choice(EXTREMES[dtype[name].base.kind]))
                with np.errstate(all="ignore"):
                    field[rng.randrange(field.size)] = value.astype(field.dtype)
            del header
        elif kind < 0.9 and content:
            content[rng.randrange(min(len(content), 700))] = rng.randrange(256)
        elif rng.random() < 0.5:
            content = content[: rng.randrange(len(content) + 1)]
        else:
            content = content + bytes(rng.randrange(2000))
    return content


def _fuzzed(path: Path, read: Callable[[Path], Any]) -> str:
    """Tells what became of a file: "read", or the start of the sentence that refused it."""
    try:
        with warnings.catch_warnings(), little_memory():
            warnings.simplefilter("ignore")
            image = read(path)
    except (ValueError, OSError) as error:
        if path.name not in str(error):
            raise AssertionError(f"{path} isn't named") from error
        return str(error).partition(": ")[2][:20]
    values = np.asarray(image.dataobj)
    assert values.shape == image.shape
    assert values.dtype.kind in "iuf"
    assert np.isfinite(image.affine).all()
    assert all(0 < step < np.inf for step in voxel_spacing(image))
    return "read"


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_fuzzed_nifti_is_read_or_refused(tmp_path: Path, kind: type, name: str, caplog: pytest.LogCaptureFixture):
    rng, path = random.Random(f"{kind} {name}"), tmp_path / name
    dtype = nib.nifti1.header_dtype if kind is nib.Nifti1Image else nib.nifti2.header_dtype
    found: collections.Counter[str] = collections.Counter()
    for _ in range(200):
        content = _mutated(rng, nifti(kind), dtype)
        if name.endswith("gz"):
            content = bytearray(gzip.compress(bytes(content), 1))
            if rng.random() < 0.3:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        found[_fuzzed(path, lambda p: read_nifti(p, ndim=tuple(range(1, 8))))] += 1
    assert 40 < found["read"] < 180  # neither all of them nor none: the mutations bite
    assert len(found) > 4


def metaimage(path: Path, compressed: bool = False) -> Path:
    image = SimpleITK.GetImageFromArray(voxels().T.copy())
    image.SetSpacing((2.0, 3.0, 4.0))
    SimpleITK.WriteImage(image, str(path), compressed)
    return path


WORDS = b"0 -1 nan inf 1e300 99999999999 100000 True MET_FLOAT MET_STRING LIST LOCAL /dev/zero .. \xff 4".split()


@pytest.mark.parametrize(
    ("name", "compressed"), [("a.mhd", False), ("a.mhd", True), ("a.mha", False), ("a.mha", True)]
)
def test_a_fuzzed_metaimage_is_read_or_refused(tmp_path: Path, name: str, compressed: bool):
    path = metaimage(tmp_path / name, compressed)
    whole = path.read_bytes()
    rng = random.Random(f"{name} {compressed}")
    size = whole.index(b"\n", whole.index(b"ElementDataFile")) + 1
    found: collections.Counter[str] = collections.Counter()
    for _ in range(100):
        lines = whole[:size].splitlines(keepends=True)
        content = bytearray(whole)
        if rng.random() < 0.5:
            number = rng.randrange(len(lines))
            key, _, value = lines[number].rstrip().partition(b" = ")
            words = value.split(b" ")
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            lines[number] = key + b" = " + b" ".join(words) + b"\n"
            if rng.random() < 0.2:
                lines.insert(number, lines[rng.randrange(len(lines))])
            content = bytearray(b"".join(lines) + whole[size:])
        elif rng.random() < 0.8:
            content[rng.randrange(min(len(content), 600))] = rng.randrange(256)
        else:
            content = content[: rng.randrange(len(content))]
        path.write_bytes(content)
        found[_fuzzed(path, read_metaimage)] += 1
    assert 5 < found["read"] < 90
    assert sum(found.values()) == 100


@pytest.mark.filterwarnings("ignore")
def test_a_fuzzed_dicom_series_is_read_or_refused(tmp_path: Path):
    victim = sorted(write_series(tmp_path / "series").iterdir())[2]
    whole, rng = victim.read_bytes(), random.Random(0)
    found: collections.Counter[str] = collections.Counter()
    for _ in range(80):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            if rng.random() < 0.8:
                content[rng.randrange(len(content))] = rng.randrange(256)
            else:
                content = content[: rng.randrange(1, len(content) + 1)]
        victim.write_bytes(content)
        found[_fuzzed(victim.parent, read_pet_series)] += 1
    assert 5 < found["read"] < 60


@pytest.mark.parametrize("keyword", [b"SH", b"LO", b"UI"])
def test_no_memory_is_taken_for_a_length_that_a_slice_does_not_have(tmp_path: Path, keyword: bytes):
    victim = sorted(write_series(tmp_path / "series").iterdir())[2]
    content = bytearray(victim.read_bytes())
    start = content.index(keyword, 200)
    content[start : start + 2] = b"OB"  # its length has four bytes: the next ones make gigabytes of it
    content[start + 4 : start + 8] = b"\xf0\xff\xff\xff"
    victim.write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match="series/"):
        read_pet_series(victim.parent)


def test_slices_smaller_than_their_header_says_are_refused_before_memory_is_taken(tmp_path: Path):
    def huge(ds: Any, k: int) -> None:
        ds.Rows = ds.Columns = 40000

    with little_memory(), pytest.raises(ValueError, match=r"series/.*: the pixels can't be read; truncated\?"):
        read_pet_series(write_series(tmp_path / "series", huge))
