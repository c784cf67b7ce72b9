# SPDX-License-Identifier: Apache-2.0
"""Holds sample inputs of NT-Xent and InfoNCE, shared by their tests, `medaccel verify` and their benchmark."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Describes one call on pairs of embeddings, the second of a pair being the first with noise added."""

    name: str
    pairs: int
    channels: int = 19
    temperature: float = 0.5

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Returns the embeddings (pairs, channels) of both views."""
        generator = torch.Generator().manual_seed(0)
        a, noise = torch.randn(2, self.pairs, self.channels, dtype=torch.float64, generator=generator)
        return a.to(dtype), (a + noise).to(dtype)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("no_pair", 0),
    Case("one_pair", 1),
    Case("two_pairs", 2),
    Case("odd_sizes", 33),
    Case("several_tiles", 200),
    Case("sharp", 200, temperature=0.02),
]

# A batch of SimCLR on one GPU; too large for the suites.
PRODUCTION = Case("production", 2048, channels=128)


def named(name: str) -> Case:
    """Returns the case of that name."""
    return next(case for case in [*CASES, PRODUCTION] if case.name == name)
