# SPDX-License-Identifier: Apache-2.0
"""Tells whether compressed DICOM pixels can be decoded here, before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medaccel.data._fields import source

if TYPE_CHECKING:
    from pydicom import Dataset

EXTRA = "pip install 'medaccel[dicom]'"


def check_decoder(header: Dataset) -> None:
    """Refuses a file whose compression needs a plug-in that isn't installed.

    Raises:
        ValueError: no decoder is there; the message names the compression and the extra that brings one.
    """
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    uid = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    if uid is None or not UID(uid).is_transfer_syntax or not UID(uid).is_compressed:
        return
    name = f"{source(header)}: its pixels are compressed as {UID(uid).name} ({uid})"
    try:
        decoder = get_decoder(UID(uid))
    except NotImplementedError:
        raise ValueError(f"{name}, which can't be decoded; convert the file to an uncompressed one") from None
    if not decoder.is_available:
        raise ValueError(f"{name}, for which no plug-in is installed; {EXTRA} brings them")
