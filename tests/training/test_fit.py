# SPDX-License-Identifier: Apache-2.0
"""Tests what all trainings share: callbacks whose state is resumed, weights with and without their running
average."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

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
