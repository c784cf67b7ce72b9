# SPDX-License-Identifier: Apache-2.0
"""Reuses the pixel contrast's views as sample inputs of the pixel consistency."""

from medaccel.ops.pixel_contrast.cases import CASES, Views, named

__all__ = ["CASES", "Views", "named"]
