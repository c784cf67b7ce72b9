# SPDX-License-Identifier: Apache-2.0
"""Reads MetaImage files (.mhd with its .raw, or .mha) with SimpleITK, after checking their header against the file.

ITK allocates whatever size a header claims, opens whatever file it names and fills up a short file, so sizes and
names are checked first.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from nibabel.nifti1 import Nifti1Image

from medaccel.data.files import check_input
from medaccel.data.nifti import DEFLATE_RATIO, available_memory, check_affine, make_nifti

SUFFIXES = (".mhd", ".mha")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MOST_HEADER = 1 << 16  # bytes; real ones have a few hundred
_ITEM_SIZES = {
    **dict.fromkeys(("MET_CHAR", "MET_UCHAR"), 1),
    **dict.fromkeys(("MET_SHORT", "MET_USHORT"), 2),
    **dict.fromkeys(("MET_INT", "MET_UINT", "MET_FLOAT"), 4),
    **dict.fromkeys(("MET_LONG", "MET_ULONG", "MET_LONG_LONG", "MET_ULONG_LONG", "MET_DOUBLE"), 8),
}
# A volume's header holds so many numbers in each field, under any of the names that ITK accepts.
_NUMBERS = {
    **dict.fromkeys(("ElementSpacing", "ElementSize", "Offset", "Position", "Origin", "CenterOfRotation"), 3),
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), 9),
}


def read_metaimage(path: Path) -> Nifti1Image:
    """Reads a volume of one channel, float32, with an affine to RAS, mm.

    Raises:
        FileNotFoundError, PermissionError: the file is missing or may not be read.
        ValueError: SimpleITK is not installed; the header is broken, has other dimensions or several channels; the
            voxels are missing, truncated or damaged, in several files, in another folder, or in no regular file.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError(f"{path}: MetaImage needs SimpleITK (pip install SimpleITK)") from error
    check_input(path)
    try:
        _check(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: can't be read as MetaImage ({error})") from error
    try:
        image = SimpleITK.ReadImage(str(path), imageIO="MetaImageIO")
        values = SimpleITK.GetArrayFromImage(image)
    except (RuntimeError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(f"{path}: can't be read as MetaImage ({reason})") from error
    if values.ndim != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{path}: has {image.GetDimension()} dimensions; expected a volume of one channel")
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    affine = _LPS_TO_RAS @ lps
    check_affine(affine, path, "MetaImage")
    # SimpleITK's arrays are (k, j, i).
    return make_nifti(np.ascontiguousarray(values.T, dtype=np.float32), affine)


def _check(path: Path) -> None:
    """Raises ValueError if the header is not a volume's, or if the voxels' file doesn't match it."""
    fields, size = _fields(path)
    shape = _integers(fields, "DimSize")
    if _integers(fields, "NDims") != [3] or len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"NDims is {fields.get('NDims')} and DimSize {fields.get('DimSize')}; expected three sizes")
    if _integers(fields, "ElementNumberOfChannels", "1") != [1]:
        raise ValueError(f"ElementNumberOfChannels is {fields['ElementNumberOfChannels']}; expected 1")
    kind = fields.get("ElementType", "")
    if kind not in _ITEM_SIZES:
        raise ValueError(f"ElementType is {kind!r}; expected one of {', '.join(_ITEM_SIZES)}")
    for key, count in _NUMBERS.items():
        if key in fields:
            words = fields[key].split()
            if len(words) != count or not all(_finite(word) for word in words):
                raise ValueError(f"{key} is {fields[key]}; expected {count} numbers")
    name = fields.get("ElementDataFile", "")
    if name in ("LOCAL", "Local", "local"):
        file, start = path, size
    elif not name or name == "LIST" or "%" in name or len(PurePosixPath(name).parts) != 1 or "\\" in name:
        raise ValueError(f"ElementDataFile is {name!r}; expected LOCAL, or one file in the same folder")
    else:
        file, start = check_input(path.with_name(name)), 0
    needed = math.prod(shape) * _ITEM_SIZES[kind]
    _check_voxels(file, start, needed, fields, f"DimSize {fields['DimSize']} of {kind}")


def _check_voxels(file: Path, start: int, needed: int, fields: dict[str, str], what: str) -> None:
    skipped = sum(_integers(fields, "HeaderSize", "0")[:1])  # −1: the voxels are the file's last bytes
    present = file.stat().st_size - start - max(skipped, 0)
    compressed, binary = (
        _truth(fields, key, default) for key, default in (("CompressedData", False), ("BinaryData", True))
    )
    ratio = DEFLATE_RATIO if compressed else 1
    least = needed if binary else math.prod(_integers(fields, "DimSize"))  # text has at least one digit per voxel
    if present * ratio < least:
        raise ValueError(f"truncated: {what} needs {needed} bytes, and {file.name} has {max(present, 0)}")
    if needed > available_memory():
        raise ValueError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, and {available_memory() / 1e9:.1f} GB are free"
        )
    stated = _integers(fields, "CompressedDataSize", "0")
    if compressed and not (len(stated) == 1 and 0 <= stated[0] <= present):
        raise ValueError(f"CompressedDataSize is {fields['CompressedDataSize']}, and {file.name} has {present} bytes")
    if compressed:
        with file.open("rb") as stream:
            stream.seek(start + max(skipped, 0))
            unpacker, unpacked = zlib.decompressobj(wbits=47), 0  # zlib's or gzip's header
            try:
                rest = stream.read()
                while rest and not unpacker.eof and unpacked <= needed:
                    unpacked += len(unpacker.decompress(rest, 1 << 24))
                    rest = unpacker.unconsumed_tail
            except zlib.error as error:
                raise ValueError(f"{file.name} holds damaged data ({error})") from error
        if unpacked != needed or not unpacker.eof:
            raise ValueError(f"{what} needs {needed} bytes, and {file.name} unpacks to {unpacked}")


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """Returns the header's fields, and its size in bytes; ElementDataFile is its last field."""
    with path.open("rb") as file:
        content = file.read(_MOST_HEADER)
    fields: dict[str, str] = {}
    position = 0
    while position < len(content):
        end = content.find(b"\n", position)
        end = len(content) if end < 0 else end
        line = content[position:end]
        position = end + 1
        if not line.strip():
            continue
        # Metadata of DICOM, which ITK writes beside its own, may be in any encoding.
        key, equals, value = (part.strip() for part in line.decode("latin-1").partition("="))
        if not equals or not key or key in fields:
            raise ValueError(f"its header holds the line {line[:40]!r}; expected 'key = value', each key once")
        fields[key] = value
        if key == "ElementDataFile":
            return fields, position
    raise ValueError("its header has no ElementDataFile")


def _integers(fields: dict[str, str], key: str, default: str = "") -> list[int]:
    try:
        return [int(word) for word in fields.get(key, default).split()]
    except ValueError:
        raise ValueError(f"{key} is {fields[key]}; expected whole numbers") from None


def _finite(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _truth(fields: dict[str, str], key: str, default: bool) -> bool:
    """Returns a field's truth value; ITK looks at its first letter."""
    value = fields.get(key)
    return default if not value else value[0] in "Tt1"
