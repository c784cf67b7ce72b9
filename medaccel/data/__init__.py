# SPDX-License-Identifier: Apache-2.0
"""Medical images in and out: NIfTI, DICOM series, SUV, and files written atomically."""

from medaccel.data.dicom import DicomSeries, load_series, open_series, read_dicom_series, read_pet_series
from medaccel.data.files import atomic_path, check_output, write_bytes, write_text
from medaccel.data.nifti import is_nifti_name, make_nifti, read_nifti, save_nifti, voxel_spacing
from medaccel.data.suv import suv_factors

__all__ = [
    "DicomSeries",
    "atomic_path",
    "check_output",
    "is_nifti_name",
    "load_series",
    "make_nifti",
    "open_series",
    "read_dicom_series",
    "read_nifti",
    "read_pet_series",
    "save_nifti",
    "suv_factors",
    "voxel_spacing",
    "write_bytes",
    "write_text",
]
