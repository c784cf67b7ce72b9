# SPDX-License-Identifier: Apache-2.0
"""Writes files so that a reader finds either the old content or the new, never a part; checks whether files may be
read."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# A full disk raises one of these: no space, over the quota, over the file-size limit, a failing device.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_input(path: str | os.PathLike[str]) -> Path:
    """Returns `path` if it is a regular file, or a link to one.

    Opening a pipe waits for someone to write, and reading a device may never end.

    Raises:
        FileNotFoundError: the file does not exist, or is a link that leads nowhere.
        PermissionError: the file may not be read, or its folder not be entered.
        ValueError: the path is a folder, pipe, socket or device, or a link to one; or a link to itself.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        raise PermissionError(errno.EACCES, "no permission to enter its folder", str(path)) from None
    except (FileNotFoundError, NotADirectoryError):
        why = "a link that leads nowhere" if os.path.islink(path) else "no such file"
        raise FileNotFoundError(f"{path}: {why}") from None
    except ValueError as error:  # the path holds a NUL
        raise ValueError(f"{str(path)!r} is no name of a file ({error})") from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path}: a link that leads back to itself; expected a file") from None
    if not stat.S_ISREG(mode):
        leads = "is a link to" if os.path.islink(path) else "is"
        raise ValueError(f"{path}: {leads} {_KINDS.get(stat.S_IFMT(mode), 'no file')}; expected a regular file")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, "no permission to read it", str(path))
    return path


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a UTF-8 JSON file.

    Raises:
        OSError: `check_input` refuses the path.
        ValueError: `check_input` refuses the path; the file isn't JSON, is cut short, or is nested too deeply.
    """
    try:
        return json.loads(check_input(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def is_full_disk(error: Exception) -> bool:
    """Tells whether an error says that the disk, or the quota, has no room for a file."""
    return isinstance(error, OSError) and error.errno in _WRITE_ERRORS - {errno.EIO}


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Returns the file that `path` means (links followed), or raises an error if it can't be written.

    Commands call it before hours of work; `atomic_path` calls it too.

    Raises:
        FileExistsError: the file exists and `force` is False.
        IsADirectoryError: `path` is a folder.
        FileNotFoundError, NotADirectoryError: its folder does not exist, or is a file.
        PermissionError: its folder is not writable.
        ValueError: `path` is a device or a pipe, which replacing would destroy.
    """
    target = Path(os.path.realpath(path))
    folder = target.parent
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, "the output's folder does not exist", str(folder))
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the output's folder is a file", str(folder))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the output must be a file, but this is a folder", str(target))
    if target.exists():
        if not target.is_file():
            raise ValueError(f"{target}: the output must be a regular file, but this is a device or a pipe")
        if not force:
            raise FileExistsError(errno.EEXIST, "the file exists (--force or force=True overwrites)", str(path))
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, "the output's folder is not writable", str(folder))
    return target


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder; when the block ends well, it becomes `path`.

        with atomic_path("metrics.csv", force=True) as temporary:
            table.to_csv(temporary)

    The temporary file's name ends like `path` (".nii.gz"), since libraries choose the format by that. On any failure
    in the block, a full disk or Ctrl-C included, it is removed and `path` stays as it was.

    Raises:
        OSError: `check_output` refuses the path, or writing failed: the message names `path`.
    """
    target = check_output(path, force=force)
    suffix = "".join(target.suffixes[-2:]) if target.suffix == ".gz" else target.suffix
    temporary = target.with_name(f".tmp-{secrets.token_hex(6)}{suffix}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        _sync(temporary)
        check_output(path, force=force)  # another process may have written it meanwhile
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in _WRITE_ERRORS:
            kept = "the old file is unchanged" if target.exists() else "nothing was written"
            raise OSError(error.errno, f"writing failed ({error.strerror}); {kept}", str(path)) from error
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    with suppress(OSError):  # some network folders can't be synced; the file itself is
        _sync(target.parent)


def check_output_folder(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Does the work of `check_output` for a folder that is to be made: it may exist if it is empty, or with
    `force`."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        if any(target.iterdir()) and not force:
            raise FileExistsError(
                errno.EEXIST, "the folder is not empty (--force or force=True replaces it)", str(path)
            )
        for folder in (target, target.parent):  # tries an unused name: may anything be written there
            check_output(folder / f".tmp-{secrets.token_hex(6)}")
    elif target.exists():
        raise NotADirectoryError(errno.ENOTDIR, "the output must be a folder, but this is a file", str(path))
    else:
        check_output(target)
    return target


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, force: bool = False, private: bool = False) -> Iterator[Path]:
    """Yields a temporary empty folder beside `path`; when the block ends well, it becomes `path`.

    On any failure in the block it is removed and `path` stays as it was. A folder that is replaced is moved
    aside first and removed last: it is never mixed with the new one. A `private` folder is the owner's alone.

    Raises:
        FileExistsError: the folder is not empty and `force` is False.
        OSError: `check_output` refuses the path, or writing failed: the message names `path`.
    """
    target = check_output_folder(path, force=force)
    temporary = target.with_name(f".tmp-{secrets.token_hex(6)}")
    old = target.with_name(f".old-{secrets.token_hex(6)}")
    try:
        temporary.mkdir(mode=0o700 if private else 0o777)
        yield temporary
        for written in temporary.iterdir():
            _sync(written)
        _sync(temporary)
        check_output_folder(path, force=force)  # another process may have written it meanwhile
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise
    except OSError as error:
        if error.errno in _WRITE_ERRORS:
            raise OSError(
                error.errno, f"writing failed ({error.strerror}); nothing was written", str(path)
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):
        _sync(target.parent)


def write_bytes(path: str | os.PathLike[str], content: bytes, *, force: bool = False) -> None:
    """Writes a file atomically; raises the errors of `atomic_path`."""
    with atomic_path(path, force=force) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str, *, force: bool = False) -> None:
    """Writes a UTF-8 text file atomically, line ends as given; raises the errors of `atomic_path`."""
    write_bytes(path, text.encode(), force=force)


def beside(path: Path, ending: str) -> Path:
    """Returns the path `pet<ending>` beside `pet.nii`, `pet.nii.gz` or the folder `pet`."""
    name = path.name
    for suffix in (".nii", ".nii.gz"):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return path.with_name(name + ending)


def _sync(path: Path) -> None:
    """Waits until the disk has the content: otherwise a power cut may keep a rename but lose the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
