# SPDX-License-Identifier: Apache-2.0
"""Sets Lightning up for the networks: numbered items, running average, checkpoints by the clock, exact resuming."""

from __future__ import annotations

import datetime
import math
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from medaccel.data.files import atomic_path
from medaccel.data.tensors import load_tensors
from medaccel.studies.digest import digest
from medaccel.studies.settings import TRAINING
from medaccel.training import ranks
from medaccel.training.hints import quieten_lightning
from medaccel.training.sampler import Numbered

__all__ = ["TRAINING", "NetworkFit", "train"]

# A gradient scaler begins at 2^16 and halves; what still overflows at this scale is a NaN or infinity of its own.
_LEAST_SCALE = 2.0**-24


class NetworkFit(lightning.LightningModule):
    """Holds a network and its loss; subclasses define `losses`.

    Args:
        network: the network to train.
        settings: the settings of `TRAINING`.
    """

    def __init__(self, network: nn.Module, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.settings = network, settings
        self._terms: dict[str, Tensor] = {}  # the last batch's terms, detached

    def losses(self, batch: Mapping[str, Any], index: int) -> dict[str, Tensor]:
        """Returns the loss's terms by name, as means over the batch; "loss" is the one to minimise."""
        raise NotImplementedError

    def training_step(self, batch: Mapping[str, Any], index: int) -> Tensor:
        terms = self.losses(batch, index)
        loss = terms["loss"]
        self._terms = {key: value.detach() for key, value in terms.items()}
        values = {f"train/{key}": value for key, value in self._terms.items()}
        self.log_dict(values, batch_size=_size(batch), on_step=False, on_epoch=True, sync_dist=True)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=_size(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises if the loss or a gradient isn't finite, since it would make such weights and the next checkpoint
        would hold them.

        The host waits for the device once, after the backward pass. Under a gradient scaler (16-mixed) only the loss
        is looked at: gradients that overflow are the scaler's business, which skips the step and lowers its scale.
        """
        loss, gradients = self._terms["loss"], {}
        finite = loss.isfinite()
        if self._scaler() is None:
            gradients = {
                n: p.grad for n, p in self.network.named_parameters() if p.grad is not None and p.grad.numel()
            }
        if gradients:  # their largest magnitude: squares would overflow sooner than the gradients
            finite = finite & nn.utils.get_total_norm(gradients.values(), math.inf).isfinite().to(finite.device)
        if bool(finite):
            return
        if not bool(loss.isfinite()):
            raise ValueError(
                f"step {self.global_step}: the loss is {float(loss)} "
                f"({', '.join(f'{k} {float(v):.3g}' for k, v in self._terms.items())}); training stops "
                "here, and its last checkpoint is from before"
            )
        name = next(name for name, gradient in gradients.items() if not bool(gradient.isfinite().all()))
        raise ValueError(
            f"step {self.global_step}: the gradient of {name} is not finite; training stops here, and its "
            "last checkpoint is from before"
        )

    def on_train_epoch_end(self) -> None:
        """Raises if a gradient scaler finds no scale at which the gradients are finite: it would skip every step."""
        scaler = self._scaler()
        if scaler is not None and not scaler.get_scale() > _LEAST_SCALE:
            raise ValueError(
                f"step {self.global_step}: the gradients are not finite, even with the loss scaled by "
                f"{scaler.get_scale():.1g}; training stops here (bf16-mixed needs no scale)"
            )

    def _scaler(self) -> Any:
        """Returns the gradient scaler of 16-mixed; None in other precisions."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def configure_optimizers(self) -> Any:
        s = self.settings
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=s["learning_rate"], weight_decay=s["weight_decay"]
        )

        def factor(step: int) -> float:
            """Returns the factor on the learning rate: a warm-up, then a cosine down to a hundredth."""
            done = min(step / s["steps"], 1.0)
            return min(1.0, (step + 1) / max(s["warm_up"], 1)) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _size(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))


class _Record(lightning.Callback):
    """Records steps, their seconds and mean losses, and the run that they belong to; the checkpoint keeps them for
    the run that resumes.

    Args:
        identity: identifies settings and seed: a checkpoint with another identity is refused.
    """

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.steps, self.seconds = 0, 0.0
        self.losses: dict[str, list[float]] = {}
        self._last = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self._last
        self._last, self.steps = now, trainer.global_step

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for key, value in trainer.callback_metrics.items():
            if key.startswith("train/"):
                self.losses.setdefault(key.removeprefix("train/"), []).append(float(value))

    def state_dict(self) -> dict[str, Any]:
        return {"identity": self.identity, "steps": self.steps, "seconds": self.seconds, "losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.seconds = state_dict["steps"], state_dict["seconds"]
        self.losses = dict(state_dict["losses"])


class _Atomic(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, also if the folder is on another file system than /tmp."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(Path(path), force=True) as temporary:
            torch.save(checkpoint, temporary)


class _ByTheClock(ModelCheckpoint):
    """Saves every so many minutes, and at the end.

    An epoch's last step is saved after the epoch's end, so that the checkpoint holds the callbacks' work there: a run
    that resumes after the last step does not repeat that end.
    """

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *arguments)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.max_steps is not None and trainer.global_step >= trainer.max_steps:
            self._last_time_checked = -math.inf  # a save is always due
        super().on_train_batch_end(trainer, pl_module, None, None, trainer.global_step)


def train(
    module: NetworkFit,
    items: torch.utils.data.Dataset,
    folder: Path,
    *,
    seed: int = 0,
    progress: bool = True,
    callbacks: Sequence[lightning.Callback] = (),
) -> tuple[dict[str, list[float]], float, float]:
    """Trains a network, from the folder's last checkpoint if it has one; the network ends as its running average.

    Args:
        module: its settings say how long, on what devices and in which precision.
        items: endless and numbered, such as `medaccel.restoration.methods.networks.patches.Patches`.
        folder: holds checkpoints, TensorBoard and CSV logs.
        seed: seed of dropout and the like; the items have their own.
        progress: show Lightning's bar.
        callbacks: further callbacks, such as a validation; their `state_dict` is restored when a run is resumed.

    Returns:
        Mean losses of each epoch by name; seconds that the steps took, all runs together; seconds a step.

    Raises:
        ValueError: the loss isn't finite (the last checkpoint stays); settings don't fit together; the checkpoint has
            other settings.
        KeyboardInterrupt: the user pressed Ctrl-C.
    """
    s, world = module.settings, max(ranks.world_size(), 1)
    if s["steps"] % s["steps_per_epoch"]:
        raise ValueError(f"steps is {s['steps']}; expected a multiple of steps_per_epoch, {s['steps_per_epoch']}")
    sampler = Numbered(s["batch_size"], ranks.rank(), world, lambda: trainer.global_step)
    loader = torch.utils.data.DataLoader(
        items, batch_size=s["batch_size"] // world, sampler=sampler, num_workers=s["num_workers"]
    )
    last = folder / "last.ckpt"
    record = _Record(digest([s, seed]))
    folder.mkdir(parents=True, exist_ok=True)
    begun = _take_up(last, module, record, callbacks) if last.exists() else 0
    if begun >= s["steps"]:
        return record.losses, record.seconds, record.seconds / max(record.steps, 1)
    lightning.seed_everything(seed, verbose=False)
    quieten_lightning()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            max_steps=s["steps"],
            limit_train_batches=s["steps_per_epoch"],  # one epoch of the logs and the bar
            accelerator=s["accelerator"],
            # torchrun starts several processes: Lightning would begin the whole command anew.
            devices=ranks.local_world_size(),
            num_nodes=world // ranks.local_world_size(),
            strategy="ddp" if s["strategy"] == "auto" and world > 1 else s["strategy"],
            precision=s["precision"],
            gradient_clip_val=s["gradient_clip"],
            use_distributed_sampler=False,  # `Numbered` shares the items out
            logger=[
                CSVLogger(folder, "csv", version=f"from_step_{begun}"),
                TensorBoardLogger(folder, "tensorboard", version=""),
            ],
            callbacks=[
                # An index table has no average.
                *([EMAWeightAveraging(decay=s["ema_decay"], use_buffers=False)] if s["ema_decay"] else []),
                *callbacks,
                _ByTheClock(
                    folder,
                    filename="last",
                    train_time_interval=datetime.timedelta(minutes=s["checkpoint_minutes"]),
                    enable_version_counter=False,
                ),
                record,
            ],
            plugins=[_Atomic()],
            enable_model_summary=False,
            enable_progress_bar=progress,
            log_every_n_steps=s["steps_per_epoch"],
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, loader, ckpt_path=str(last) if last.exists() else None, weights_only=True)
        except SystemExit:  # Lightning silently raises this on Ctrl-C, and ignores the next ones
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt from None
    return record.losses, record.seconds, record.seconds / max(record.steps, 1)


def _take_up(path: Path, module: NetworkFit, record: _Record, callbacks: Sequence[lightning.Callback]) -> int:
    """Checks a checkpoint, and returns its step; if the training is finished, restores its final state everywhere."""
    try:
        content = load_tensors(path, what="a checkpoint")
        state, step = content["callbacks"][record.state_key], int(content["global_step"])
        identity = state["identity"]
    except ValueError as error:
        raise ValueError(f"{error}; delete it to train anew") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path}: not a checkpoint that can be read (it lacks {error}); delete it to train anew"
        ) from error
    if identity != record.identity:
        raise ValueError(f"{path}: a checkpoint of other settings or another seed; delete it to train anew")
    if step >= module.settings["steps"]:
        module.load_state_dict(content["state_dict"])
        for callback in (record, *callbacks):
            if callback.state_key in content["callbacks"]:
                callback.load_state_dict(content["callbacks"][callback.state_key])
    return step
