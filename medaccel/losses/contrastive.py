# SPDX-License-Identifier: Apache-2.0
"""MONAI's contrastive loss on medaccel's kernel."""

from monai.losses import ContrastiveLoss as MonaiContrastiveLoss
from torch import Tensor

from medaccel.ops import nt_xent_loss
from medaccel.ops._dispatch import refuse_scripting


class ContrastiveLoss(MonaiContrastiveLoss):
    """A drop-in for `monai.losses.ContrastiveLoss`: the same arguments, values and errors, as a log-sum-exp.

    So it stays finite where MONAI's overflows (small temperatures, fp16), and makes no 2B × 2B × F tensor. `forward`
    takes two tensors (B, F), row i of both from the same image, and returns a scalar of their dtype.

    Args:
        temperature: above 0.
        batch_size: no longer needed, as in MONAI.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(B, F) twice, to a scalar; ValueError where the shapes differ or have more than two axes."""
        if target.dim() > 2 or input.dim() > 2:
            raise ValueError(
                f"Either target or input has dimensions greater than 2 where target "
                f"shape is ({target.shape}) and input shape is ({input.shape})"
            )
        if target.shape != input.shape:
            raise ValueError(f"ground truth has differing shape ({target.shape}) from input ({input.shape})")
        return nt_xent_loss(input, target, temperature=float(self.temperature)).to(input.dtype)


def contrastive_unsupported(module: MonaiContrastiveLoss) -> str | None:
    """None where `accelerate` can serve the loss; else why not."""
    temperature = float(module.temperature)
    return None if temperature > 0 else f"its temperature is {temperature}; expected a number above 0"
