# SPDX-License-Identifier: Apache-2.0
"""Reads NIfTI files whole and checked, and writes them atomically.

Arrays are (i, j, k) or (i, j, k, t) in nibabel's axis order; affines map voxel indices to RAS coordinates.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medaccel.data.files import atomic_path, check_input
from medaccel.data.nifti_remarks import geometry_remarks, scale_remarks

if TYPE_CHECKING:
    from nibabel import Nifti1Header, Nifti1Image

_SUFFIXES = (".nii", ".nii.gz")
_PAIR = (".hdr", ".img")  # one file has the header, the other one the voxels
# The keys are the lowest three bits of xyzt_units: metre and micron; 2 is mm, and a header without a unit means mm.
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}
_HEADERS = {348: 352, 540: 544}  # header size of NIfTI-1 and NIfTI-2: first byte that voxels may have
# Deflate can't do better: a file of n bytes unpacks to 1032 times as many at most.
DEFLATE_RATIO = 1032
_FARTHEST = 1e9  # largest entry of an affine, whatever its unit; single precision, which headers have, ends at 3e38
# Some writers leave so many bytes behind the voxels, such as zeros that fill a block.
_TRAILING = 1 << 20


def is_nifti_name(path: str | os.PathLike[str]) -> bool:
    """Tells whether the name ends in .nii or .nii.gz."""
    return os.fspath(path).lower().endswith(_SUFFIXES)


def is_nifti_input(path: str | os.PathLike[str]) -> bool:
    """Tells whether the name is one that `read_nifti` takes: .nii, .nii.gz, or .hdr or .img of a pair."""
    return os.fspath(path).lower().endswith((*_SUFFIXES, *_PAIR))


def read_nifti(path: str | os.PathLike[str], *, ndim: int | tuple[int, ...] = 3) -> Nifti1Image:
    """Reads a NIfTI-1 or NIfTI-2 file, .nii or .nii.gz, or a pair .hdr and .img, into memory.

    The whole file is read and, where compressed, its checksum is verified, so that a damaged file fails here
    and not in the middle of a run. No more is unpacked than the header promises, and nothing if that is more than the
    file can hold. The image has the values (scl_slope and scl_inter applied):

    - stored without a scale: the stored type (int16 stays int16);
    - stored with one: float32, and float64 where the stored type is wider than 16 bits of integer or 32 of
      float.

    The affine is the sform's, else the qform's. Without both it is made of the voxel sizes, nibabel's way (centred,
    first axis to the left).

    Args:
        path: the file; of a pair either one.
        ndim: accepted numbers of dimensions, 1 to 7. With 3, a trailing axis of size 1 is dropped.

    Raises:
        FileNotFoundError, PermissionError: the file does not exist, or may not be read.
        ValueError: the path is no NIfTI file, has a broken header, truncated or corrupt content, an unusable affine,
            complex or colour voxels, other dimensions than `ndim`, or more voxels than memory can hold, or is a
            folder, pipe or device; the scale is infinite; a pair is of Analyze, which doesn't tell left from right;
            the message names the file.

    Warns:
        UserWarning: qform and sform, or the voxel sizes, disagree; the scale is NaN; bytes lie behind the voxels.
    """
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    path = Path(path)
    if not is_nifti_input(path):
        raise ValueError(f"{path}: expected a file ending in .nii or .nii.gz (or .hdr and .img)")
    check_input(path)
    try:
        read = _read_pair if path.suffix.lower() in _PAIR else _read_checked
        found = read(path)
        image = found.image_class.from_bytes(found.content)
        values = _values(image, found.dtype)
        remarks = (*_trailing(found.behind), *scale_remarks(found.header), *geometry_remarks(image, found.header))
    except (ImageFileError, HeaderDataError, WrapStructError) as error:
        raise ValueError(f"{path}: broken NIfTI header: {error}") from error
    except MemoryError as error:
        raise ValueError(f"{path}: there is not enough memory for its voxels") from error
    except (FileNotFoundError, PermissionError):  # the other file of a pair
        raise
    except (ValueError, OSError, OverflowError, struct.error) as error:
        raise ValueError(f"{path}: {error}") from error
    accepted = (ndim,) if isinstance(ndim, int) else ndim
    if values.ndim not in accepted:
        squeezed = values.shape
        while len(squeezed) > min(accepted) and squeezed[-1] == 1:
            squeezed = squeezed[:-1]
        if len(squeezed) not in accepted:
            expected = " or ".join(f"{n}-D" for n in accepted)
            raise ValueError(f"{path}: the image has shape {values.shape}, expected a {expected} image")
        values = values.reshape(squeezed, order="F")
    check_affine(image.affine, path)
    for sentence in remarks:
        warnings.warn(f"{path}: {sentence}", stacklevel=2)
    return _image(values, image.affine, image.header)


def save_nifti(path: str | os.PathLike[str], image: Nifti1Image, *, force: bool = False) -> None:
    """Writes an image atomically as .nii or .nii.gz; the same image gives the same bytes every time.

    The voxels' type on disk is the header's (`make_nifti` sets it to the array's).

    Raises:
        ValueError: the name has another ending.
        OSError: the file exists and `force` is False, the folder is not writable, the disk is full; the old
            file stays. See `medaccel.data.atomic_path`.
    """
    path = Path(path)
    if not is_nifti_name(path):
        raise ValueError(f"{path}: the output's name must end in .nii or .nii.gz")
    with atomic_path(path, force=force) as temporary, open(temporary, "wb") as file:
        if path.name.lower().endswith(".gz"):
            # No name and no time in gzip's header; level 1 as nibabel, since noise hardly compresses better.
            with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as compressed:
                image.to_stream(compressed)
        else:
            image.to_stream(file)


def make_nifti(array: np.ndarray, affine: np.ndarray, like: Nifti1Image | None = None) -> Nifti1Image:
    """Makes an image of the array's own type.

    NIfTI or its readers lack some types: bool becomes uint8, float16 float32, int64 and uint64 int32 and
    uint32.

    Args:
        array: (i, j, k) or (i, j, k, t), real.
        affine: (4, 4), maps voxel indices to RAS, mm.
        like: an image whose header (sform and qform codes, units, description, extensions) is taken over;
            without it, both codes are 1 (scanner) and the units mm and seconds.

    Raises:
        ValueError: the voxels aren't real numbers, or are 64-bit integers that don't fit in 32 bits.
    """
    import nibabel as nib

    array = _storable(array)
    if like is not None:
        return _image(array, np.asarray(affine, np.float64), like.header)
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    return image


def resample(image: Nifti1Image, like: Nifti1Image, *, outside: float = 0.0) -> Nifti1Image:
    """Resamples an image to another's grid, trilinear, float32; returns the image itself if both have one grid.

    Args:
        image, like: the 3-D image, and the one whose grid is taken.
        outside: value beyond the image.
    """
    from nibabel.processing import resample_from_to

    if image.shape == like.shape and np.allclose(image.affine, like.affine, rtol=0, atol=1e-3):
        return image
    values = np.asanyarray(image.dataobj).astype(np.float32, copy=False)
    plain = make_nifti(values, image.affine)
    return resample_from_to(plain, (like.shape, like.affine), order=1, mode="constant", cval=outside)


def voxel_spacing(image: Nifti1Image) -> tuple[float, float, float]:
    """Returns the distance in mm between neighbours along i, j and k, from the affine and the header's unit of
    length."""
    unit = _MM_PER_UNIT.get(int(image.header["xyzt_units"]) & 7, 1.0)
    steps = np.linalg.norm(np.asarray(image.affine, np.float64)[:3, :3], axis=0) * unit
    return float(steps[0]), float(steps[1]), float(steps[2])


@dataclass(frozen=True)
class _Read:
    """Holds a file's content as far as its header promises it, the header as it is stored, and how many bytes lie
    behind the voxels."""

    content: bytes
    image_class: type[Nifti1Image]
    dtype: np.dtype
    header: Nifti1Header
    behind: int


def _read_pair(path: Path) -> _Read:
    """Reads a pair, and makes of it the content that a single file would have."""
    import nibabel as nib

    found = [path.with_suffix(s) for s in (path.suffix, *_PAIR, *(s.upper() for s in _PAIR))]
    header_file, voxel_file = (
        check_input(next((f for f in found if f.suffix.lower() == suffix and f.exists()), path.with_suffix(suffix)))
        for suffix in _PAIR
    )
    with header_file.open("rb") as file:
        start = file.read(max(_HEADERS))
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")} & set(_HEADERS)
    size = sizes.pop() if sizes else 0
    magic = start[344:348] if size == min(_HEADERS) else start[4:8]
    if not size or len(start) < size:
        raise ValueError(f"not a NIfTI header: {header_file.name}")
    if magic[:3] not in (b"ni1", b"ni2"):
        raise ValueError(
            "expected a NIfTI pair, but its header has no magic ni1 or ni2: Analyze 7.5 does not tell left from right"
        )
    image_class = nib.Nifti1Image if size == min(_HEADERS) else nib.Nifti2Image
    header = image_class.header_class.from_fileobj(io.BytesIO(start[:size]), check=False)
    have = voxel_file.stat().st_size
    dtype, promised = _checked_header(header, 0, have)
    offset = int(header["vox_offset"])
    with voxel_file.open("rb") as file:
        file.seek(offset)
        voxels = file.read(promised - offset)
    if len(voxels) < promised - offset:
        raise ValueError(_too_short(header, promised, have))
    single = header.copy()
    single["magic"], single["vox_offset"] = b"n+" + magic[2:3] + header["magic"].item()[3:], _HEADERS[size]
    return _Read(single.binaryblock + bytes(4) + voxels, image_class, dtype, header, have - promised)


def _read_checked(path: Path) -> _Read:
    """Reads a single file, and unpacks no more of it than its header says."""
    import nibabel as nib

    compressed = path.name.lower().endswith(".gz")
    with path.open("rb") as file:
        packed = file.read() if compressed else b""
        start = _gunzip(packed[:_TRAILING], max(_HEADERS.values()), whole=False) if compressed else file.read(544)
        sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")} & set(_HEADERS)
        if not sizes:
            raise ValueError("not a NIfTI file (its first four bytes are not the header's size, 348 or 540)")
        size = sizes.pop()
        image_class = nib.Nifti1Image if size == 348 else nib.Nifti2Image
        if len(start) < size:
            if compressed:
                _gunzip(packed, size)  # raises if the file was cut short
            raise ValueError(f"truncated file: the header has {size} bytes, and the file {len(start)}")
        # The header is read unchecked first: nibabel's own check mends voxel sizes of 0 to 1 mm, which is worse than
        # an error.
        header = image_class.header_class.from_fileobj(io.BytesIO(start[:size]), check=False)
        most = len(packed) * DEFLATE_RATIO if compressed else path.stat().st_size
        dtype, promised = _checked_header(header, _HEADERS[size], most)
        if not compressed:
            content = (start + file.read(max(promised - len(start), 0)))[:promised]
            return _Read(content, image_class, dtype, header, most - promised)
    # Unpacking goes on to the end of the stream, where the checksum is: nibabel stops at the last voxel.
    content = _gunzip(packed, promised + _TRAILING)
    if len(content) < promised:
        raise ValueError(_too_short(header, promised, len(content)))
    return _Read(content[:promised], image_class, dtype, header, len(content) - promised)


def _trailing(count: int) -> list[str]:
    """Returns what to say of bytes behind the last voxel; raises ValueError for more than writers leave."""
    if count > _TRAILING:
        raise ValueError(
            f"{count} bytes lie behind the last voxel: its header (dim, datatype) doesn't fit its content"
        )
    if count <= 0:
        return []
    return [f"{count} bytes lie behind the last voxel and are left out (are dim and datatype in its header right?)"]


def _gunzip(packed: bytes, limit: int, *, whole: bool = True) -> bytes:
    """Unpacks a gzip file of one or several members; if not `whole`, unpacks only its first bytes up to the limit.

    Raises:
        ValueError: the file is damaged, cut short, or unpacks to more than the limit.
    """
    content, rest = b"", packed
    try:
        while True:
            member = zlib.decompressobj(wbits=31)  # gzip's header; the checksum and the size at its end are checked
            content += member.decompress(rest, max(limit + 1 - len(content), 1))
            if not whole or len(content) > limit:
                break
            if not member.eof:
                raise ValueError("truncated or corrupt gzip file (it ends before its end marker)")
            rest = member.unused_data.lstrip(b"\0")
            if not rest:
                return content
    except zlib.error as error:
        raise ValueError(f"truncated or corrupt gzip file ({error})") from error
    if whole:
        raise ValueError(f"unpacks to more than the {limit} bytes that its header leads to expect")
    return content[:limit]


def _checked_header(header: Nifti1Header, least_offset: int, most: int) -> tuple[np.dtype, int]:
    """Returns the stored type and the file's size; raises ValueError if shape, type or size is impossible.

    Args:
        least_offset: first byte that voxels may have.
        most: bytes that the file may have.
    """
    count = int(header["dim"][0])
    if not 1 <= count <= 7:
        raise ValueError(f"broken NIfTI header: dim[0] is {count}, expected 1 to 7")
    shape = [int(n) for n in header["dim"][1 : count + 1]]
    if min(shape) < 1:
        raise ValueError(f"broken NIfTI header: dim says shape {tuple(shape)}, expected positive sizes")
    sizes = np.abs(header["pixdim"][1 : min(count, 3) + 1])
    if int(header["sform_code"]) == 0 and not (np.isfinite(sizes).all() and sizes.min() > 0):
        raise ValueError(f"broken NIfTI header: pixdim has voxel sizes {sizes.tolist()}; expected positive ones")
    try:
        dtype = header.get_data_dtype()
    except KeyError:
        raise ValueError(f"broken NIfTI header: datatype {int(header['datatype'])} is unknown") from None
    if dtype.kind not in "iuf":
        raise ValueError(f"voxels of type {dtype} are not supported; expected integers or real numbers")
    start = float(header["vox_offset"])
    if not start.is_integer() or start < least_offset:  # at 0, nibabel would read the header as voxels
        raise ValueError(f"broken NIfTI header: vox_offset is {start:g}; expected a whole number >= {least_offset}")
    # Python's integers, so that a broken header's sizes don't overflow or ask for terabytes of memory.
    promised = int(start) + math.prod(shape) * dtype.itemsize
    if most < promised:
        raise ValueError(_too_short(header, promised, most))
    memory = available_memory()
    if promised > memory:
        raise ValueError(
            f"shape {tuple(shape)} of {dtype} needs {promised / 1e9:.1f} GB of memory, and {memory / 1e9:.1f} GB are "
            "free"
        )
    return dtype, promised


def _too_short(header: Nifti1Header, promised: int, most: int) -> str:
    shape = tuple(int(n) for n in header["dim"][1 : int(header["dim"][0]) + 1])
    voxels = math.prod(shape) * header.get_data_dtype().itemsize
    return (
        f"truncated file or broken header: shape {shape} of {header.get_data_dtype()} needs {voxels} bytes, "
        f"but the file has {max(most - promised + voxels, 0)}"
    )


def available_memory() -> float:
    """Returns how many bytes can be allocated without swapping; infinite if the system doesn't say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next((line for line in file if line.startswith("MemAvailable:")), None)
        return math.inf if found is None else 1024.0 * int(found.split()[1])
    except (OSError, ValueError):
        return math.inf


def _values(image: Nifti1Image, stored: np.dtype) -> np.ndarray:
    """Returns the voxels in memory, in native byte order; `read_nifti` lists the types."""
    slope, inter = image.dataobj.slope, image.dataobj.inter
    if (slope, inter) == (1.0, 0.0):
        values = np.asanyarray(image.dataobj)
        if stored.itemsize > 8:  # 80-bit floats: no other library takes them
            return values.astype(np.float64)
        return values.astype(stored.newbyteorder("="), copy=False)
    narrow = stored.itemsize <= 2 or (stored.kind == "f" and stored.itemsize <= 4)
    with np.errstate(over="ignore"):
        values = np.asanyarray(image.dataobj).astype(np.float32 if narrow else np.float64, copy=False)
    if stored.kind in "iu" and not np.isfinite(values).all():
        raise ValueError(f"scl_slope {slope:g} and scl_inter {inter:g} make values that no number can hold")
    return values


def check_affine(affine: np.ndarray, path: Path, kind: str = "NIfTI") -> None:
    """Raises ValueError unless an affine places voxels in space."""
    if not np.isfinite(affine).all():
        raise ValueError(f"{path}: broken {kind} header: the affine has values that are not finite")
    if np.abs(affine).max() > _FARTHEST:
        raise ValueError(f"{path}: broken {kind} header: the affine has values up to {np.abs(affine).max():.3g} mm")
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if steps.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / steps)) < 1e-6:
        raise ValueError(
            f"{path}: broken {kind} header: the affine is singular, voxel sizes {steps.tolist()} "
            "(expected three positive sizes along three different directions)"
        )


def _storable(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype in (np.int64, np.uint64):
        narrow = np.dtype(np.int32 if array.dtype == np.int64 else np.uint32)
        limits = np.iinfo(narrow)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise ValueError(f"make_nifti: {array.dtype} values outside {narrow}, which NIfTI's readers expect")
        return array.astype(narrow)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"make_nifti: voxels of type {array.dtype}; expected integers or real numbers")
    return array


def _image(values: np.ndarray, affine: np.ndarray, header: Nifti1Header) -> Nifti1Image:
    """Makes an image of these values with an otherwise equal header, in the same NIfTI version."""
    import nibabel as nib

    header = header.copy()
    header.set_data_dtype(values.dtype)
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return image_class(values, affine, header)
