# SPDX-License-Identifier: Apache-2.0
"""The rounding that mends the interpreter equals torch's own conversions, on every bit pattern that matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .bfloat16 import decode, encode, round_to_tf32

PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def torch_bfloat16(patterns: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)


def test_every_pattern_decodes_to_the_value_that_torch_gives_it() -> None:
    expected = torch_bfloat16(PATTERNS).float().numpy()
    np.testing.assert_array_equal(decode(PATTERNS), expected)


@pytest.mark.parametrize("below", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_encoding_rounds_to_nearest_with_ties_to_even_at_every_exponent(below: int) -> None:
    values = ((PATTERNS.astype(np.uint32) << 16) + np.uint32(below)).view(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(encode(values)[number], expected[number])
    assert np.isnan(decode(encode(values)[~number])).all()


def test_encoding_toward_zero_cuts_the_low_half_off() -> None:
    values = np.array([1.0 + 2**-8 + 2**-9, -1.0 - 2**-7 - 2**-8, 3.0], np.float32)
    np.testing.assert_array_equal(decode(encode(values, toward_zero=True)), [1.0, -1.0 - 2**-7, 3.0])


def test_encoding_refuses_other_than_float32() -> None:
    with pytest.raises(TypeError, match="values has dtype float64"):
        encode(np.zeros(2))  # type: ignore[arg-type]


def test_tf32_keeps_ten_bits_and_sends_ties_away_from_zero() -> None:
    values = np.array([1 + 2**-10, 1 + 2**-11, -1 - 2**-11, 1 + 2**-12, np.inf], np.float32)
    expected = [1 + 2**-10, 1 + 2**-10, -1 - 2**-10, 1.0, np.inf]
    np.testing.assert_array_equal(round_to_tf32(values), np.array(expected, np.float32))
