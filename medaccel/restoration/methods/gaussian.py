# SPDX-License-Identifier: Apache-2.0
"""Restores by Gaussian filtering: one layer, a cascade of three, or a mix; widths are learnt in mm.

Gaussians in sequence are one Gaussian (their variances add), so the cascade can do no more than one layer; the mix,
Σ w_k·G_{σ_k} with the identity among its terms and Σ w = 1, can.
"""

from __future__ import annotations

import copy
import math
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from medaccel.data.files import atomic_path
from medaccel.data.tensors import load_tensors
from medaccel.ops import gaussian_filter
from medaccel.restoration.evaluation.metrics import body_mask
from medaccel.restoration.methods.base import (
    Fitted,
    Method,
    Restoration,
    RestorationRequest,
    RestorationTask,
    check_volume,
)
from medaccel.restoration.settings import GaussianSettings
from medaccel.restoration.study import PETStudy, load_study
from medaccel.training.hints import quieten_lightning


def _smooth(volume: Tensor, sigma: Tensor) -> Tensor:
    """Applies one Gaussian, σ (3,) in voxels.

    Lindeberg's discrete kernels form a semigroup: two in sequence are exactly the one whose variance is the sum of
    theirs, even for σ below a voxel; reflecting borders keep that true at the border. Their tails are longer than a
    Gaussian's there, so they are cut at 6σ.
    """
    return gaussian_filter(volume, sigma, truncated=6.0, approx="scalespace", mode="reflect", normalize=True)


@dataclass(frozen=True)
class FittedMethod:
    """Holds a method's fitted parameters and the losses of the fit.

    Attributes:
        sigma_mm: (σ_i, σ_j, σ_k) in mm of each Gaussian; all 0 for the identity.
        weights: weights of a mix, one per Gaussian; None if the Gaussians follow one another.
        losses: the training loss of each epoch.
    """

    sigma_mm: Sequence[tuple[float, float, float]]
    weights: Sequence[float] | None = None
    losses: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self.sigma_mm):
            raise ValueError(f"{len(self.weights)} weights for {len(self.sigma_mm)} Gaussians; expected one each")


class GaussianCascade(nn.Module):
    """Applies `layers` Gaussians, one after the other, each with a learnable σ per axis.

    Args:
        layers: number of Gaussians.
        sigma_mm: start value of every σ, mm.
    """

    def __init__(self, layers: int = 1, sigma_mm: float = 2.0) -> None:
        super().__init__()
        # The logarithm keeps σ positive and makes a step mean the same at every scale.
        start = math.log(sigma_mm / math.sqrt(layers))
        self.log_sigma = nn.Parameter(torch.full((layers, 3), start, dtype=torch.float64))

    def forward(self, volume: Tensor, spacing: Tensor) -> Tensor:
        """Filters volume (B, C, i, j, k) in any unit, with spacing (3,) in mm; shape and unit stay."""
        for sigma in self.log_sigma.exp():
            volume = _smooth(volume, sigma / spacing)
        return volume

    def fitted(self, losses: Sequence[float]) -> FittedMethod:
        """Returns σ in mm for the report."""
        return FittedMethod(_triples(self.log_sigma.exp()), losses=losses)


class GaussianMix(nn.Module):
    """Computes w_0·volume + Σ w_k·G_{σ_k}(volume), Σ w = 1; weights may be negative (a Gaussian less a wider one
    sharpens).

    Args:
        sigma_mm: start value of each Gaussian's σ, mm.
    """

    def __init__(self, sigma_mm: Sequence[float] = (1.5, 3.5, 8.0)) -> None:
        super().__init__()
        start = torch.tensor(sigma_mm, dtype=torch.float64).log()
        self.log_sigma = nn.Parameter(start[:, None].repeat(1, 3))
        self.weight = nn.Parameter(torch.full((len(sigma_mm),), 1 / (len(sigma_mm) + 1), dtype=torch.float64))

    def weights(self) -> Tensor:
        """Returns the weights (1 + K,), the identity's first; they sum to 1."""
        return torch.cat([1 - self.weight.sum(dim=0, keepdim=True), self.weight])

    def forward(self, volume: Tensor, spacing: Tensor) -> Tensor:
        """Filters volume (B, C, i, j, k) in any unit, with spacing (3,) in mm; shape and unit stay."""
        weights = self.weights().to(volume.dtype)
        result = weights[0] * volume
        for weight, sigma in zip(weights[1:], self.log_sigma.exp(), strict=True):
            result = result + weight * _smooth(volume, sigma / spacing)
        return result

    def fitted(self, losses: Sequence[float]) -> FittedMethod:
        """Returns σ in mm and weights for the report, the identity first."""
        identity = [(0.0, 0.0, 0.0)]
        return FittedMethod(identity + _triples(self.log_sigma.exp()), self.weights().tolist(), losses)


def _triples(sigma: Tensor) -> list[tuple[float, float, float]]:
    return [(float(a), float(b), float(c)) for a, b, c in sigma.detach()]


GaussianMethod = GaussianCascade | GaussianMix
METHODS: dict[str, Callable[[], GaussianMethod]] = {
    "gaussian1": lambda: GaussianCascade(1),
    "gaussian3": lambda: GaussianCascade(3),
    "gaussian_mix": GaussianMix,
}


class _Studies(torch.utils.data.Dataset):
    """Lists the training studies, one item each: input, target (1, 1, i, j, k), body mask, spacing (3,)."""

    def __init__(self, studies: Sequence[PETStudy], input_seconds: int, target_seconds: int) -> None:
        self.items = []
        for study in studies:
            image, target = study.exposures[input_seconds], study.exposures[target_seconds]
            mask = body_mask(target, study.spacing)
            if not mask.any() or not np.any((image != target)[mask]):
                raise ValueError(f"study {study.name}: input and target do not differ within a body; nothing to fit")
            self.items.append(
                {
                    "input": torch.from_numpy(image)[None, None],
                    "target": torch.from_numpy(target)[None, None],
                    "mask": torch.from_numpy(mask)[None, None],
                    "spacing": torch.tensor(study.spacing, dtype=torch.float64),
                }
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


class GaussianFit(lightning.LightningModule):
    """Fits a method's few parameters to all studies at once.

    The loss is the mean over studies of MSE(restored, target) / MSE(input, target) within the body: 1 less the
    MSE score, so that a hot patient weighs no more than another. Full batches and so few parameters call for L-BFGS.

    Args:
        method: the method to fit.
        steps: evaluations of the loss that an epoch may take.
    """

    def __init__(self, method: GaussianMethod, steps: int = 5) -> None:
        super().__init__()
        self.method = method
        self.steps = steps
        self.losses: list[float] = []

    def loss(self, batch: list[dict[str, Tensor]]) -> Tensor:
        """Computes the loss of a batch, which is a list of studies, since their shapes differ."""
        ratios = []
        for study in batch:
            restored = self.method(study["input"], study["spacing"])
            error = (restored - study["target"])[study["mask"]].double().square().mean()
            before = (study["input"] - study["target"])[study["mask"]].double().square().mean()
            ratios.append(error / before)
        return torch.stack(ratios).mean()

    def training_step(self, batch: list[dict[str, Tensor]], index: int) -> Tensor:
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise ValueError(f"epoch {self.current_epoch}: the loss is {float(loss)}; the fit stops here")
        self.log("loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            self.method.parameters(), lr=1.0, max_iter=self.steps, history_size=20, line_search_fn="strong_wolfe"
        )


def fit(
    name: str,
    studies: Sequence[PETStudy],
    input_seconds: int,
    target_seconds: int,
    *,
    epochs: int = 10,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> tuple[GaussianMethod, FittedMethod]:
    """Fits one of `METHODS` on training studies.

    Args:
        name: "gaussian1", "gaussian3" or "gaussian_mix".
        studies: each has exposures of `input_seconds` and `target_seconds`.
        epochs: each is up to 5 L-BFGS iterations over all studies.
        checkpoint: the finished fit is stored here; if the file exists already, it is loaded instead.
        progress: show Lightning's progress bar.

    Returns:
        The method, and its parameters and losses for the report.

    Raises:
        ValueError: `name` is unknown, there are no studies, input and target of a study are the same, a loss isn't
            finite, or the checkpoint is another method's.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; expected one of {', '.join(METHODS)}")
    if not studies:
        raise ValueError(f"{name}: no training studies")
    module = GaussianFit(METHODS[name]())
    if checkpoint is not None and checkpoint.exists():
        losses = _load(module, name, checkpoint)
        return module.method, module.method.fitted(losses)
    lightning.seed_everything(seed, verbose=False)
    data = _Studies(studies, input_seconds, target_seconds)
    loader = torch.utils.data.DataLoader(data, batch_size=len(data), collate_fn=list)
    quieten_lightning()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            log_every_n_steps=1,
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, loader)
        except SystemExit:  # Lightning silently raises this on Ctrl-C, and ignores the next ones
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt from None
    losses = [*module.losses, float(module.loss([data[i] for i in range(len(data))]).detach())]
    if checkpoint is not None:
        content = {"method": name, "state_dict": module.method.state_dict(), "losses": losses}
        with atomic_path(checkpoint) as temporary:
            torch.save(content, temporary)
    return module.method, module.method.fitted(losses)


def _load(module: GaussianFit, name: str, checkpoint: Path) -> list[float]:
    try:
        content = load_tensors(checkpoint, what="a checkpoint")
    except ValueError as error:
        raise ValueError(f"{error}; delete it to fit again") from error
    found = content.get("method") if isinstance(content, dict) else None
    if found != name:
        raise ValueError(f"{checkpoint}: a checkpoint of {found!r}; expected {name!r}")
    module.method.load_state_dict(content["state_dict"])
    return list(content["losses"])


@torch.no_grad()
def restore(method: GaussianMethod, volume: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Restores one volume (i, j, k), float32, spacing in mm, in its unit."""
    restored = method(torch.from_numpy(volume)[None, None], torch.tensor(spacing, dtype=torch.float64))
    return restored[0, 0].numpy()


class _Gaussian(Method):
    """Holds a Gaussian method for each exposure of the task: the best smoothing depends on the noise."""

    Settings: ClassVar[type[GaussianSettings]] = GaussianSettings

    def __init__(self, task: RestorationTask, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, settings)
        self.filters = {seconds: METHODS[self.name]() for seconds in task.input_seconds}

    def fit(
        self,
        studies: Sequence[Path],
        validation: Sequence[Path],
        *,
        folder: Path,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Ignores `validation`, since a handful of parameters can't overfit to all voxels of several studies."""
        task, self.fitted = self.task, Fitted()
        loaded = [
            load_study(path, (*task.input_seconds, task.target_seconds))
            for path in studies[: self.settings["studies"]]
        ]
        for seconds in task.input_seconds:
            self.filters[seconds], found = fit(
                self.name,
                loaded,
                seconds,
                task.target_seconds,
                epochs=self.settings["epochs"],
                seed=seed,
                progress=progress,
            )
            self.fitted.losses[f"{seconds} s"] = list(found.losses)
            record = asdict(found)
            self.fitted.parameters[str(seconds)] = {key: record[key] for key in ("sigma_mm", "weights")}

    def restore(self, request: RestorationRequest) -> Restoration:
        check_volume(self.name, request.volume, request.spacing)
        chosen = self.filters[self.seconds(request.seconds)]
        return Restoration(restore(chosen, request.volume, request.spacing))

    def at(self, seconds: int) -> _Gaussian | None:
        """Returns the method for another exposure: with the filter of the nearest fitted one."""
        if not 0 < seconds < self.task.target_seconds:
            return None
        nearest = min(self.filters, key=lambda fitted: abs(math.log(fitted / seconds)))
        other = copy.copy(self)
        other.task = RestorationTask((seconds,), self.task.target_seconds)
        other.filters = {seconds: self.filters[nearest]}
        return other

    def state(self) -> dict[str, Any]:
        return {str(seconds): method.state_dict() for seconds, method in self.filters.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for seconds, method in self.filters.items():
            method.load_state_dict(state[str(seconds)])


class Gaussian1(_Gaussian):
    name = "gaussian1"


class Gaussian3(_Gaussian):
    name = "gaussian3"


class GaussianMixture(_Gaussian):
    name = "gaussian_mix"
