# SPDX-License-Identifier: Apache-2.0
"""Holds the parts that the two diffusion methods share: a small U-Net, its training, and samples drawn and averaged
in SUV."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor, nn

from medaccel.diffusion import VPSDE, noised, small_unet
from medaccel.diffusion.sde import _Sde
from medaccel.restoration.methods.base import Fitted, Restoration, RestorationRequest, RestorationTask, check_volume
from medaccel.restoration.methods.networks.method import NetworkMethod, body_box
from medaccel.restoration.methods.networks.nets import whole
from medaccel.restoration.settings import DiffusionSettings
from medaccel.training.fit import NetworkFit

# The U-Net sees so many voxels at once: a torso of 4 mm voxels has half a million, and two take 1–2 GB.
_WHOLE = 2_000_000


def sample_cap(samples: int, seconds: float, target_seconds: float) -> float:
    """Returns the largest MSE score (%) that the plain mean of K posterior samples of PET_T can have.

    Each sample misses the posterior mean by as much as the target does, so the mean of K adds 1/K of that error:
    1 − (t/T)·(1 + 1/K). At 60 s of 90 s, K = 1 gives −33 %, K = 8 gives 25 %, many the limit, 33 %.
    """
    return 100 * (1 - seconds / target_seconds * (1 + 1 / samples))


class _Shuffled(nn.Module):
    """Runs a network on blocks of voxels as channels: at this size a U-Net spends most of its time at its finest
    level.

    Zhang et al., "FFDNet", IEEE TIP 2018, denoise in this way without loss; all voxels of a block go in and come out.
    """

    def __init__(self, network: nn.Module, side: int) -> None:
        super().__init__()
        self.network, self.side = network, side

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Maps x (B, C, i, j, k), sizes multiples of the block's side, at time (B,) to the network's output."""
        return pixelshuffle(self.network(pixelunshuffle(x, 3, self.side), time), 3, self.side)


class DiffusionFit(NetworkFit):
    """Trains a network to tell a clean volume from its noise; `clean` of the method defines the clean volume.

    The network predicts v = α·ε − σ·x0 (Salimans and Ho, ICLR 2022), which neglects neither end of the schedule.
    """

    def __init__(self, method: DiffusionMethod) -> None:
        super().__init__(method.network, method.training_settings)
        self.method = [method]  # in a list, so that it is no sub-module
        levels = [method.sde.level(i) for i in range(method.levels)]
        self.register_buffer("alphas", torch.tensor([level.alpha for level in levels]), persistent=False)
        self.register_buffer("sigmas", torch.tensor([level.sigma for level in levels]), persistent=False)

    def losses(self, batch: Mapping[str, Any], index: int) -> dict[str, Tensor]:
        method = self.method[0]
        clean, known = method.clean(batch)
        # The noise comes from the items' own seeds: it is the same in a resumed run, and however the items are
        # distributed.
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batch["noise_seed"]]
        chosen = torch.cat([torch.randint(len(self.alphas), (1,), generator=g) for g in generators]).to(clean.device)
        noise = torch.stack([torch.randn(c.shape, generator=g) for c, g in zip(clean, generators, strict=True)])
        noise = noise.to(clean)
        alpha, sigma = self.alphas[chosen], self.sigmas[chosen]
        x = noised(clean, alpha, sigma, noise=noise)
        target = noised(noise, alpha, 1.0, noise=-sigma.reshape(-1, 1, 1, 1, 1) * clean)
        predicted = self.network(torch.cat([x, *known], dim=1), chosen.float()).float()
        # Outside the body the network learns only that it is empty.
        weight = batch["mask"] + 0.05
        loss = ((predicted - target).square() * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
        return {"loss": loss.mean()}


class DiffusionMethod(NetworkMethod):
    """Samples of the activity by a diffusion, averaged in SUV."""

    Settings: ClassVar[type[DiffusionSettings]] = DiffusionSettings
    multiple = least = 8
    samples = True
    sde: _Sde
    levels: int

    def __init__(self, task: RestorationTask, settings: Mapping[str, Any] | None = None) -> None:
        self.sde, self.levels = VPSDE(), 1000
        super().__init__(task, settings)

    @property
    def inputs(self) -> int:
        """Returns the number of channels that the U-Net sees beside the noisy volume."""
        return 0

    def build(self) -> nn.Module:
        channels, side = self.settings["channels"], self.settings["shuffle"]
        if side < 1 or self.multiple % (side * 2 ** (len(channels) - 1)):
            raise ValueError(
                f"{self.name}: shuffle is {side} with {len(channels)} channels; expected shuffle · 2^(channels − 1) "
                f"to divide {self.multiple}, which volumes are padded to a multiple of"
            )
        net = small_unet(in_channels=(1 + self.inputs) * side**3, out_channels=side**3, channels=channels)
        return net if side == 1 else _Shuffled(net, side)

    def module(self) -> NetworkFit:
        return DiffusionFit(self)

    @abc.abstractmethod
    def clean(self, batch: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """Returns, for a training batch, the volume that noise is added to, (B, 1, i, j, k), and the network's
        further inputs."""

    @abc.abstractmethod
    def draw(self, request: RestorationRequest, seeds: Sequence[int]) -> Iterator[np.ndarray]:
        """Samples of the activity of one PET, one a seed and one after the other: (i, j, k), SUV, float32."""

    def evaluate(self, x: Tensor, time: Tensor, known: Tensor | None = None) -> Tensor:
        """Applies the network to a whole volume (1, 1, i, j, k); in windows if it is larger than a torso."""
        inputs = x if known is None else torch.cat([x, known.to(x)], dim=1)

        def window(patch: Tensor) -> Tensor:
            bfloat = self.settings["precision"] == "bf16-mixed"
            with torch.autocast(patch.device.type, torch.bfloat16, enabled=bfloat):
                return self.network(patch, time[:1].expand(patch.shape[0]).to(patch.device)).float()

        sizes = [whole(n, self.multiple) for n in x.shape[2:]]
        if np.prod(sizes) > _WHOLE:
            return self.windows(inputs, window)
        # The volume is small enough to be seen whole: no seams, and no voxel computed twice.
        pads = [side for n, size in zip(x.shape[:1:-1], sizes[::-1], strict=True) for side in (0, size - n)]
        self.network.to(self.device())
        padded = torch.nn.functional.pad(inputs, pads, mode="replicate").to(self.device())
        return window(padded)[:, :, : x.shape[2], : x.shape[3], : x.shape[4]].to(x.device)

    def restore(self, request: RestorationRequest) -> Restoration:
        volume = request.volume
        check_volume(self.name, volume, request.spacing)
        count = self.settings["samples"] if request.samples is None else request.samples
        if count < 1:
            raise ValueError(f"{self.name}: samples is {count}; expected a whole number >= 1")
        t = self.seconds(request.seconds)
        seeds = [request.seed * 1000 + k for k in range(count)]
        kept: list[np.ndarray] | None = [] if request.keep_samples else None
        activity, std = self.moments(request, seeds, kept=kept)
        weight = np.float32(self.weight(t))
        return Restoration(
            weight * volume + (1 - weight) * activity,
            activity=activity,
            weight=float(weight),
            std=std if count > 1 else None,
            samples=None if kept is None else np.stack(kept),
        )

    def moments(
        self,
        request: RestorationRequest,
        seeds: Sequence[int],
        kept: list[np.ndarray] | None = None,
        **options: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard deviation of samples of the activity, (i, j, k), SUV, without holding them all.

        The air far from the body stays as it is; `residual_shrinkage` concerns the mean alone. Samples are appended
        to `kept`, where it is given; `options` are `draw`'s further ones.
        """
        volume, spacing = request.volume, request.spacing
        box = body_box(volume, spacing)
        body = replace(request, volume=volume[box], ct=None if request.ct is None else request.ct[box])
        mean = np.zeros([s.stop - s.start for s in box], dtype=np.float32)
        squares = np.zeros_like(mean)
        drawn = self.draw(body, seeds, **options)
        for number, sample in enumerate(drawn, start=1):  # Welford's sums lose no digits
            change = sample - mean
            mean += change / np.float32(number)
            squares += change * (sample - mean)
            if kept is not None:
                whole = volume.astype(np.float32)
                whole[box] = sample
                kept.append(whole)
        activity, std = volume.astype(np.float32), np.zeros(volume.shape, dtype=np.float32)
        activity[box] = mean
        std[box] = np.sqrt(squares / np.float32(max(len(seeds) - 1, 1)))
        return self.shrunk_residual_added(volume, activity, spacing), std

    def weight(self, seconds: int) -> float:
        """Returns the weight of PET_t in the blend with the samples' mean; 0 if the mean alone was better."""
        chosen = self.fitted.choices.get("weight", {})
        return float(chosen.get(str(seconds), seconds / self.task.target_seconds))

    def cap(self, seconds: int, fitted: Fitted) -> None:
        """Notes the score that a plain mean of K samples could reach."""
        caps = fitted.parameters.setdefault("sample_cap", {})
        caps[str(seconds)] = sample_cap(self.settings["samples"], seconds, self.task.target_seconds)
