# SPDX-License-Identifier: Apache-2.0
"""Sample inputs of the pixel consistency: the same views as the pixel contrast's."""

from medaccel.ops.pixel_contrast.cases import CASES, Views, named

__all__ = ["CASES", "Views", "named"]
