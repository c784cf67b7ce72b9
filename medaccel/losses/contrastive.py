# SPDX-License-Identifier: Apache-2.0
"""Computes MONAI's contrastive loss with medaccel's kernel."""

import math
import warnings
import weakref
from typing import Any

import torch
from monai.losses import ContrastiveLoss as MonaiContrastiveLoss
from torch import Tensor
from torch.autograd import forward_ad

from medaccel.ops import nt_xent_loss
from medaccel.ops._arguments import check_temperature, stays_tensor
from medaccel.ops._dispatch import refuse_scripting

_warned: weakref.WeakSet[MonaiContrastiveLoss] = weakref.WeakSet()


class ContrastiveLoss(MonaiContrastiveLoss):
    """This class is a drop-in for `monai.losses.ContrastiveLoss`: the same arguments, values and errors, computed as
    a log-sum-exp.

    It stays finite where MONAI's overflows (small temperatures, fp16), and makes no 2B × 2B × F tensor. `forward`
    takes two tensors (B, F), row i of both from the same image, and returns a scalar, in fp32 (fp64 for fp64): half
    precision is computed in fp32, under autocast too. Every row is normalised, however short; MONAI leaves rows
    shorter than 1e-8 below unit length.

    Args:
        temperature: a number above 0; a parameter gets its gradient (a learnt temperature). Values that the kernel
            does not take (a number below 0, a tensor of several, one that a transform differentiates) run MONAI's own
            code, and the first such call warns of it.
        batch_size: no longer needed, as in MONAI.

    Raises:
        TypeError, ValueError: a temperature that is no number, or one that would give NaN (0, negative, not finite).
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, temperature: Any = 0.5, batch_size: int = -1) -> None:
        if not isinstance(temperature, Tensor):  # a tensor's value may be hidden by a transform: `forward` looks
            check_temperature("ContrastiveLoss", temperature)
        super().__init__(temperature=temperature, batch_size=batch_size)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Maps two tensors (B, F) to a scalar; raises ValueError if their shapes differ or have more than two
        axes."""
        temperature = self.temperature
        if type(temperature) is not float or not 0 < temperature < math.inf:
            reason = contrastive_unsupported(self)
            if reason is not None:
                self._warn_once(reason)
                return super().forward(input, target)
            if not stays_tensor(temperature):
                temperature = float(temperature)
        if target.dim() > 2 or input.dim() > 2:
            raise ValueError(
                f"Either target or input has dimensions greater than 2 where target "
                f"shape is ({target.shape}) and input shape is ({input.shape})"
            )
        if target.shape != input.shape:
            raise ValueError(f"ground truth has differing shape ({target.shape}) from input ({input.shape})")
        return nt_xent_loss(input, target, temperature=temperature)

    def _warn_once(self, reason: str) -> None:
        if not torch.compiler.is_compiling() and self not in _warned:
            _warned.add(self)
            warnings.warn(f"{type(self).__name__}: runs MONAI's own code, because {reason}", stacklevel=3)


def contrastive_unsupported(module: MonaiContrastiveLoss) -> str | None:
    """Says why the kernel can't serve the loss; returns None if it can."""
    return _tensor_problem(module.temperature) or _value_problem(module.temperature)


def _tensor_problem(temperature: object) -> str | None:
    """Says why the value of a temperature may not be read as a constant; returns None if it may, or if it is
    learnt."""
    if torch.compiler.is_compiling() and not isinstance(temperature, float | int) and not stays_tensor(temperature):
        return "its temperature is no plain number, so that torch.compile does not know its value"
    if not isinstance(temperature, Tensor):
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "its temperature is a tensor that a transform may differentiate"
    if temperature.numel() != 1:
        return f"its temperature has shape {tuple(temperature.shape)}; expected a number above 0"
    return None


def _value_problem(temperature: Any) -> str | None:
    """Says what is wrong with a temperature; returns None if it is above 0, or a tensor whose value can't be read
    without waiting for the GPU."""
    if stays_tensor(temperature):
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        temperature = temperature.detach()
    try:
        value = float(temperature)
    except (TypeError, ValueError):
        return f"its temperature is {temperature!r}; expected a number above 0"
    return None if 0 < value < math.inf else f"its temperature is {value}; expected a finite number above 0"
