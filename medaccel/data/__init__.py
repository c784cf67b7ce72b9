# SPDX-License-Identifier: Apache-2.0
"""Reads and writes medical images: NIfTI, DICOM series, SUV, files written atomically; cuts two views of a volume."""

import importlib
from typing import Any

from medaccel.data.dicom import DicomSeries, load_series, open_series, read_dicom_series, read_pet_series, series_rule
from medaccel.data.dicom_write import write_derived_pet
from medaccel.data.files import (
    atomic_folder,
    atomic_path,
    check_output,
    check_output_folder,
    write_bytes,
    write_text,
)
from medaccel.data.nifti import is_nifti_name, make_nifti, read_nifti, resample, save_nifti, voxel_spacing
from medaccel.data.suv import SuvRule, suv_factors, suv_rule

_VIEWS = ("TwoViews", "feature_affine")  # these need MONAI, which is imported at their first use
__all__ = [
    "DicomSeries",
    "SuvRule",
    "TwoViews",
    "atomic_folder",
    "atomic_path",
    "check_output",
    "check_output_folder",
    "feature_affine",
    "is_nifti_name",
    "load_series",
    "make_nifti",
    "open_series",
    "read_dicom_series",
    "read_nifti",
    "read_pet_series",
    "resample",
    "save_nifti",
    "series_rule",
    "suv_factors",
    "suv_rule",
    "voxel_spacing",
    "write_bytes",
    "write_derived_pet",
    "write_text",
]


def __getattr__(name: str) -> Any:
    if name in _VIEWS:
        return getattr(importlib.import_module("medaccel.data.views"), name)
    raise AttributeError(f"module 'medaccel.data' has no attribute {name!r}")
