# SPDX-License-Identifier: Apache-2.0
"""Sums the tasks' weighted losses, for `medaccel.training.fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medaccel.pretraining.network import PretrainingNet
from medaccel.pretraining.settings import PretrainingTrainerSettings
from medaccel.pretraining.tasks import PretextTask, Step
from medaccel.studies.typed import converted
from medaccel.training import ranks
from medaccel.training.fit import NetworkFit


class PretrainingFit(NetworkFit):
    """Passes both views of all items through the backbone as one batch; its norms are computed per sample, so this
    changes nothing. Only the levels that some task needs are computed.

    Args:
        network: the network with the tasks' heads.
        tasks: the tasks, in the network's order.
        weights: weights of their losses, by name.
        settings: the result of `settings_of`.
    """

    def __init__(
        self,
        network: PretrainingNet,
        tasks: Sequence[PretextTask],
        weights: Mapping[str, float],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(network, settings)
        self.tasks, self.weights = list(tasks), dict(weights)
        self.levels = frozenset().union(*(task.view_levels for task in tasks))

    def losses(self, batch: Mapping[str, Any], index: int) -> dict[str, Tensor]:
        net = self.network
        assert isinstance(net, PretrainingNet)
        maps: dict[str, Tensor] = {}
        if self.levels:
            maps = net.features(torch.cat([batch["view1"], batch["view2"]]), self.levels)
        step = Step(net, maps, batch, min(self.global_step / self.settings["steps"], 1.0))
        terms: dict[str, Tensor] = {}
        for task in self.tasks:
            terms.update(task.losses(step))
        total = torch.stack([weight * terms[name].float() for name, weight in self.weights.items()]).sum()
        return {"loss": total, **terms}


def settings_of(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a training's settings: the given ones, and the others' defaults.

    Raises:
        ValueError: a setting is unknown, has another type or is out of range, or the cache is unknown.
    """
    settings = converted("trainer", trainer, PretrainingTrainerSettings).whole()
    if settings["steps"] % settings["steps_per_epoch"]:
        raise ValueError(
            f"trainer: steps is {settings['steps']}; expected a multiple of steps_per_epoch, "
            f"{settings['steps_per_epoch']}"
        )
    if settings["batch_size"] % max(ranks.world_size(), 1):
        raise ValueError(
            f"trainer: batch_size is {settings['batch_size']}; expected a multiple of the {ranks.world_size()} "
            "processes that share it"
        )
    return settings
