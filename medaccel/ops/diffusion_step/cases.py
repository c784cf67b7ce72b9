# SPDX-License-Identifier: Apache-2.0
"""Holds sample inputs of the diffusion step, shared by its tests, `medaccel verify` and its benchmark."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DDPM = {"a": 1.25, "b": -0.75, "c": 0.3, "d": 0.65, "e": 0.0, "s": 0.4}
DDIM = {"a": 1.25, "b": -0.75, "c": 0.9, "d": 0.0, "e": 0.35, "s": 0.0}
MULTISTEP = {"a": 0.8, "b": -0.6, "c": 0.5, "d": 0.4, "e": 0.0, "s": 0.0, "f": -0.2}


@dataclass(frozen=True)
class Case:
    """Describes one call: the tensors' shape, layout and kinds, and its coefficients."""

    name: str
    shape: tuple[int, ...]
    coefficients: dict[str, float]
    clip: tuple[float, float] | None = None
    previous: bool = False
    noise: bool = False
    mask: str = ""  # "": none, "full": of the sample's shape, "shared": one for the batch
    per_sample: bool = False  # coefficients differ from sample to sample
    view: str = ""

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
        """Returns the tensor arguments, by name."""
        generator = torch.Generator().manual_seed(seed)

        def normal(shape: tuple[int, ...]) -> Tensor:
            if self.view == "sliced":
                x = torch.randn([2 * n for n in shape], generator=generator, dtype=torch.float64)
                return x[tuple(slice(0, None, 2) for _ in shape)].to(dtype)
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if self.view == "channels_last":
                return x.to(memory_format=torch.channels_last_3d)
            if self.view == "offset":  # addresses that are not aligned for vector loads
                flat = torch.empty(x.numel() + 1, dtype=dtype)
                flat[1:] = x.flatten()
                return flat[1:].reshape(shape)
            return x[:1].expand(shape) if self.view == "expanded" else x

        names = ["sample", "model_output"]
        names += ["previous"] * self.previous + ["noise"] * self.noise
        tensors = {name: normal(self.shape) for name in names}
        if self.mask:
            shape = self.shape if self.mask == "full" else (1, 1, *self.shape[2:])
            tensors["mask"] = torch.rand(shape, generator=generator) < 0.6
            tensors["guide"] = normal(self.shape if self.mask == "full" else (1, *self.shape[1:]))
        return tensors

    def options(self) -> dict[str, Any]:
        """Returns the other keyword arguments."""
        values: dict[str, Any] = dict(self.coefficients)
        if self.per_sample:
            step = torch.linspace(1.0, 0.5, self.shape[0], dtype=torch.float64)
            values = {name: value * step for name, value in values.items()}
        return {**values, "clip": self.clip, "seed": 0x123456789ABCDEF, "offset": 2**33 + 5, "sample_offset": 3}

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("ddpm", (2, 1, 9, 10, 11), DDPM),
    Case("ddpm_clipped", (1, 2, 7, 8, 9), DDPM, clip=(-1.0, 1.0)),
    Case("ddim", (2, 3, 8, 8, 8), DDIM, clip=(-0.5, 2.0)),
    Case("multistep", (2, 1, 5, 6, 7), MULTISTEP, previous=True),
    Case("given_noise", (1, 1, 8, 8, 8), DDPM, noise=True),
    Case("masked", (2, 2, 5, 6, 7), DDPM, mask="full"),
    Case("one_mask_for_all", (3, 2, 5, 6, 7), DDPM, clip=(-1.0, 1.0), mask="shared"),
    Case("everything", (2, 1, 5, 6, 9), {**DDPM, "e": 0.1, "f": 0.2}, (-1.0, 1.0), True, True, "full", True),
    Case("per_sample", (5, 1, 6, 7, 8), DDPM, per_sample=True),
    Case("several_blocks", (1, 1, 33, 32, 33), DDPM, clip=(-1.0, 1.0)),
    Case("image", (2, 3, 17, 19), DDPM),
    Case("vector", (37,), DDPM),
    Case("one_element", (1, 1, 1, 1, 1), DDPM),
    Case("three_elements", (2, 3), DDPM),
    Case("empty_batch", (0, 1, 4, 5, 6), DDPM),
    Case("empty_sample", (2, 1, 0, 5, 6), DDPM),
    Case("sliced", (2, 2, 5, 6, 7), DDPM, clip=(-1.0, 1.0), view="sliced"),
    Case("channels_last", (2, 3, 5, 6, 7), DDPM, view="channels_last"),
    Case("expanded", (3, 2, 5, 6, 8), DDPM, mask="full", view="expanded"),
    Case("unaligned", (1, 1, 8, 8, 8), DDPM, view="offset"),
]

# One PET volume at full resolution; too large for the suites.
PRODUCTION = Case("production", (1, 1, 192, 192, 192), {**DDPM, "e": 0.1}, clip=(-1.0, 1.0))


def named(name: str) -> Case:
    """Returns the case of that name."""
    return next(case for case in [*CASES, PRODUCTION] if case.name == name)
