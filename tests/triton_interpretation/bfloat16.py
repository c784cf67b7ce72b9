# SPDX-License-Identifier: Apache-2.0
"""bfloat16 and TF32 rounding on numpy arrays, bit for bit as NVIDIA GPUs do it.

numpy has no bfloat16: values are held as their 16-bit patterns in uint16 arrays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

QUIET_NAN = np.uint16(0x7FFF)  # what cvt.rn.bf16.f32 makes of every NaN


def decode(patterns: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Returns the exact float32 values of bfloat16 bit patterns, any shape."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: npt.NDArray[np.float32], *, toward_zero: bool = False) -> npt.NDArray[np.uint16]:
    """Returns bfloat16 bit patterns of float32 values, any shape: nearest, ties to even (or toward zero)."""
    if values.dtype != np.float32:
        raise TypeError(f"encode: values has dtype {values.dtype} (expected float32)")
    bits = values.view(np.uint32)
    if not toward_zero:
        even = (bits >> np.uint32(16)) & np.uint32(1)
        bits = bits + np.uint32(0x7FFF) + even  # the carry may run into the exponent: that is the right result
    return np.where(np.isnan(values), QUIET_NAN, (bits >> np.uint32(16)).astype(np.uint16))


def round_to_tf32(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rounds float32 values to 10 mantissa bits, ties away from zero (cvt.rna.tf32.f32)."""
    bits = (values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), bits.view(np.float32), values)
