# SPDX-License-Identifier: Apache-2.0
"""Data whose score is known in closed form: a mixture of Gaussians, each voxel independent."""

from dataclasses import dataclass

import torch
from torch import Tensor

from medaccel.diffusion.sde import _Sde


@dataclass(frozen=True)
class Mixture:
    """Describes the mixture Σ w_k · N(mean_k, std_k²)."""

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-1.0, 0.5)
    stds: tuple[float, ...] = (0.2, 0.3)

    def mean(self) -> float:
        return sum(w * m for w, m in zip(self.weights, self.means, strict=True))

    def variance(self) -> float:
        second = sum(w * (m * m + s * s) for w, m, s in zip(self.weights, self.means, self.stds, strict=True))
        return second - self.mean() ** 2

    def draw(self, n: int, seed: int) -> Tensor:
        """Draws (1, n) in float64."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(torch.tensor(self.weights), n, replacement=True, generator=generator)
        means, stds = torch.tensor(self.means).double(), torch.tensor(self.stds).double()
        return (means[k] + stds[k] * torch.randn(n, generator=generator, dtype=torch.float64))[None]

    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Returns ∇ log p of alpha · data + sigma · ε at x."""
        logs, slopes = [], []
        for w, m, s in zip(self.weights, self.means, self.stds, strict=True):
            variance = (alpha * s) ** 2 + sigma**2
            away = x - alpha * m
            logs.append(torch.tensor(w).log() - 0.5 * away**2 / variance - 0.5 * torch.tensor(variance).log())
            slopes.append(-away / variance)
        shares = torch.stack(logs).softmax(dim=0)
        return (shares * torch.stack(slopes)).sum(dim=0)

    def model(self, sde: _Sde, prediction: str):
        """Returns the perfect network for that prediction: (x, time) → output."""
        by_time = {sde.time(i): sde.level(i) for i in range(len(sde))}

        def predict(x: Tensor, time: Tensor) -> Tensor:
            alpha, sigma = by_time[float(time[0])]
            score = self.score(x, alpha, sigma)
            noise = -sigma * score
            clean = (x - sigma * noise) / alpha
            return {
                "score": score, "epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean,
            }[prediction]  # fmt: skip

        return predict
