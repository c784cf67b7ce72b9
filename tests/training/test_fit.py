# SPDX-License-Identifier: Apache-2.0
"""Tests what all trainings share: callbacks whose state is resumed, weights with and without their running
average."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from medaccel.training.fit import TRAINING, NetworkFit, train

SETTINGS = TRAINING | {
    "steps": 6,
    "steps_per_epoch": 2,
    "batch_size": 2,
    "warm_up": 0,
    "learning_rate": 0.1,
    "ema_decay": 0.0,
    "checkpoint_minutes": 1e-6,
    "accelerator": "cpu",
}


class Points(torch.utils.data.Dataset):
    """Item n is the number n and what a line makes of it."""

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.tensor([index % 7 / 7.0])
        return {"x": x, "y": 3 * x - 1}


class Line(NetworkFit):
    def losses(self, batch: Mapping[str, Any], index: int) -> dict[str, Tensor]:
        return {"loss": (self.network(batch["x"]) - batch["y"]).square().mean()}


class Watch(lightning.Callback):
    """Notes the weight after each epoch; stops the training once, on request."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[float] = []
        self.stop_after = stop_after

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.seen.append(pl_module.network.weight.item())
        if len(self.seen) == self.stop_after:
            raise ValueError("stopped here")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = list(state_dict["seen"])


def _line(**settings: Any) -> Line:
    torch.manual_seed(3)
    return Line(nn.Linear(1, 1), SETTINGS | settings)


def test_a_callback_gets_its_state_back_when_a_training_is_resumed(tmp_path: Path):
    whole, watched = _line(), Watch()
    train(whole, Points(), tmp_path / "whole", progress=False, callbacks=[watched])
    assert len(watched.seen) == 3
    with pytest.raises(ValueError, match="stopped here"):
        train(_line(), Points(), tmp_path / "part", progress=False, callbacks=[Watch(stop_after=2)])
    part, again = _line(), Watch()
    train(part, Points(), tmp_path / "part", progress=False, callbacks=[again])
    assert again.seen == watched.seen
    assert torch.equal(part.network.weight, whole.network.weight)


def test_a_finished_training_gives_module_and_callbacks_what_they_ended_with(tmp_path: Path):
    first, watched = _line(), Watch()
    train(first, Points(), tmp_path, progress=False, callbacks=[watched])
    again, other = _line(), Watch()
    train(again, Points(), tmp_path, progress=False, callbacks=[other])
    assert other.seen == watched.seen
    assert torch.equal(again.network.weight, first.network.weight)


def test_without_a_running_average_the_last_weights_stay(tmp_path: Path):
    last, watched = _line(), Watch()
    train(last, Points(), tmp_path / "last", progress=False, callbacks=[watched])
    assert last.network.weight.item() == watched.seen[-1]
    averaged, watched = _line(ema_decay=0.9), Watch()
    train(averaged, Points(), tmp_path / "averaged", progress=False, callbacks=[watched])
    assert averaged.network.weight.item() != watched.seen[-1]


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "another"])
def test_a_damaged_checkpoint_is_told_and_not_gone_on_from(tmp_path: Path, kind: str):
    with pytest.raises(ValueError, match="stopped here"):
        train(Line(nn.Linear(1, 1), SETTINGS), Points(), tmp_path, progress=False, callbacks=[Watch(stop_after=2)])
    path = tmp_path / "last.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    damaged = {"flipped": bytes(content), "cut": path.read_bytes()[:-200], "empty": b""}
    if kind == "another":
        torch.save({"callbacks": {}}, path)
    else:
        path.write_bytes(damaged[kind])
    with pytest.raises(ValueError, match=r"last\.ckpt: not a checkpoint that can be read.*; delete it to train anew"):
        train(Line(nn.Linear(1, 1), SETTINGS), Points(), tmp_path, progress=False)


# --- what isn't finite ------------------------------------------------------------------------------------------
class Waits(TorchDispatchMode):
    """Counts the numbers that the host takes from a tensor: on a GPU it waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Watched(Line):
    """Counts the waits of the hooks of each step; can spoil a step's loss or gradient."""

    def __init__(self, network: nn.Module, spoil: str = "", at: int = 2, **settings: Any) -> None:
        super().__init__(network, SETTINGS | settings)
        self.spoil, self.at, self.waits = spoil, at, []

    def losses(self, batch: Mapping[str, Any], index: int) -> dict[str, Tensor]:
        loss = super().losses(batch, index)["loss"]
        first = next(self.network.parameters()).flatten()[0]
        if self.global_step == self.at:
            # A square root's gradient at 0 is infinite, times 0 it is no number; the loss is as it was.
            loss = loss * {"loss": torch.nan, "infinite loss": torch.inf}.get(self.spoil, 1.0)
        if self.global_step >= self.at and self.spoil == "gradient":
            loss = loss + 0 * (first - first.detach()).square().sqrt()
        if self.global_step == self.at and self.spoil == "large gradient":  # its square overflows
            loss = loss + 1e30 * (first - first.detach())
        return {"loss": loss, "half": loss / 2}

    def training_step(self, batch: Mapping[str, Any], index: int) -> Tensor:
        with Waits() as waits:
            loss = super().training_step(batch, index)
        self.waits.append(waits.count)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        with Waits() as waits:
            super().on_before_optimizer_step(optimizer)
        self.waits[-1] += waits.count


def _deep() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(1, 1) for _ in range(9)), nn.Identity())


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], torch.amp.GradScaler]:
    """Gives every Trainer a gradient scaler that begins at some scale, as 16-mixed does on a GPU."""

    def begin_at(scale: float) -> torch.amp.GradScaler:
        scaler, trainer = torch.amp.GradScaler("cpu", init_scale=scale), lightning.Trainer

        def patched(*args: Any, precision: Any, plugins: list[Any], **options: Any) -> lightning.Trainer:
            return trainer(*args, plugins=[*plugins, MixedPrecision("16-mixed", "cpu", scaler)], **options)

        monkeypatch.setattr(lightning, "Trainer", patched)
        return scaler

    return begin_at


def test_a_step_waits_once_for_the_device_however_many_parameters_there_are(tmp_path: Path):
    module = Watched(_deep())
    train(module, Points(), tmp_path, progress=False)
    assert module.waits == [1] * SETTINGS["steps"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        ("loss", r"step 2: the loss is nan \(loss nan, half nan\); training stops here"),
        ("infinite loss", r"step 2: the loss is inf \(loss inf, half inf\); training stops here"),
        ("gradient", r"step 2: the gradient of 0.weight is not finite; training stops here"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_training(tmp_path: Path, spoil: str, sentence: str):
    module = Watched(_deep(), spoil)
    with pytest.raises(ValueError, match=sentence):
        train(module, Points(), tmp_path, progress=False)
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_gradient_whose_square_overflows_is_finite(tmp_path: Path):
    train(Watched(_deep(), "large gradient"), Points(), tmp_path, progress=False)


def test_an_overflow_is_the_scalers_business(tmp_path: Path, scaled: Callable[[float], torch.amp.GradScaler]):
    scaler, module = scaled(2.0**18), Watched(nn.Linear(1, 1))
    before = module.network.weight.item()
    train(module, Points(), tmp_path, progress=False)
    assert scaler.get_scale() < 2.0**18  # some steps were skipped,
    assert module.network.weight.item() != before  # not all,
    assert module.waits == [1] * SETTINGS["steps"]
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("spoil", ["loss", "infinite loss"])
def test_a_loss_that_is_not_finite_stops_the_training_under_a_scaler_too(
    tmp_path: Path, scaled: Callable[[float], torch.amp.GradScaler], spoil: str
):
    scaled(1024.0)
    with pytest.raises(ValueError, match=r"step 2: the loss is (nan|inf)"):
        train(Watched(_deep(), spoil), Points(), tmp_path, progress=False)


def test_gradients_that_no_scale_makes_finite_are_told(
    tmp_path: Path, scaled: Callable[[float], torch.amp.GradScaler]
):
    scaled(2.0**-20)
    module = Watched(_deep(), "gradient", steps=40)
    with pytest.raises(ValueError, match=r"step 6: the gradients are not finite, even with the loss scaled by 6e-08"):
        train(module, Points(), tmp_path, progress=False)
