# SPDX-License-Identifier: Apache-2.0
"""Implements Philox-4x32-10 in plain PyTorch: the random words that every kernel must reproduce, bit for bit."""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_4x32_10(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns four random 32-bit words for each counter.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, with ten rounds.

    Args:
        seed: one int64 element; its low and high halves are the two words of the key.
        counter: four int64 tensors that broadcast, each value in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    key = seed.reshape(()).to(torch.int64)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, but its 64 bits are the right ones.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK, high0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3
