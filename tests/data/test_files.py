# SPDX-License-Identifier: Apache-2.0
"""A file is whole and new, or what it was before; nothing is left beside it."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medaccel.data import atomic_path, check_output, write_bytes, write_text
from tests.interrupts import heed_sigint


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` fail as on a full disk: the kernel refuses them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_text_arrives_as_given(tmp_path: Path) -> None:
    write_text(tmp_path / "metrics.csv", "σ,1\r\n")
    assert (tmp_path / "metrics.csv").read_bytes() == "σ,1\r\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    with pytest.raises(FileExistsError, match=r"--force.*metrics\.json"):
        write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new", force=True)
    assert path.read_text() == "new"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "report.html"

    def write_while_another_does() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("mine")
            path.write_text("theirs")

    with pytest.raises(FileExistsError):
        write_while_another_does()
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_the_old_file_survives_a_failure_half_way(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic_path(path, force=True) as temporary:
            temporary.write_text("ne")
            raise failure

    with pytest.raises(failure):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with (
        file_size_limit(10_000),
        pytest.raises(OSError, match=r"writing failed.*the old file is unchanged.*metrics\.json") as error,
    ):
        write_bytes(path, bytes(20_000), force=True)
    assert error.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with file_size_limit(10_000), pytest.raises(OSError, match="nothing was written"):
        write_bytes(tmp_path / "metrics.json", bytes(20_000))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_another_process_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    code = (
        "import sys, time\n"
        "from medaccel.data.files import atomic_path\n"
        "with atomic_path(sys.argv[1], force=True) as temporary:\n"
        "    temporary.write_text('ne')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=heed_sigint,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_ends_as_the_file_does(tmp_path: Path) -> None:
    for name, suffix in {"a.nii.gz": ".nii.gz", "a.b.png": ".png", "config": ""}.items():
        with atomic_path(tmp_path / name) as temporary:
            assert temporary.parent == tmp_path
            assert "".join(temporary.name.split("-", 1)[1].partition(".")[1:]) == suffix


def test_permissions_of_the_old_file_are_kept_and_new_ones_are_usual(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("")
    old.chmod(0o640)
    umask = os.umask(0o022)
    try:
        write_text(old, "1", force=True)
        write_text(new, "1")
    finally:
        os.umask(umask)
    assert [oct(path.stat().st_mode & 0o777) for path in (old, new)] == ["0o640", "0o644"]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new", force=True)
    assert link.is_symlink()
    assert target.read_text() == "new"


@contextmanager
def as_nobody() -> Iterator[None]:
    """File permissions don't bind root: step down to a user whom they bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unwritable_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: its parents are closed to others
        folder = Path(name)
        folder.chmod(0o555)
        with as_nobody(), pytest.raises(PermissionError, match=f"not writable: '{name}'"):
            write_text(folder / "metrics.json", "new")
        folder.chmod(0o755)


def test_outputs_that_cannot_be_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IsADirectoryError, match="must be a file"):
        check_output(tmp_path, force=True)
    with pytest.raises(FileNotFoundError, match=r"folder does not exist.*nowhere"):
        check_output(tmp_path / "nowhere" / "a.csv")
    with pytest.raises(NotADirectoryError, match="folder is a file"):
        check_output(tmp_path / "file" / "a.csv")


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(ValueError, match=r"/dev/null: .*a device or a pipe"):
        check_output("/dev/null", force=True)


def test_two_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    with atomic_path(path, force=True) as first, atomic_path(path, force=True) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
