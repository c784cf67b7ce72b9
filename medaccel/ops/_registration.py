# SPDX-License-Identifier: Apache-2.0
"""What every op's registration ends in."""

from typing import Any

import torch
from torch import Tensor


def refuse_double_backward(lib: torch.library.Library, backward: str, of: str) -> None:
    """Gives the registered op `backward`, the gradient of the public function `of`, a rule that raises."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{of}: its gradient has no gradient (double backward is not written); "
            "run it under medaccel.use_reference(), whose plain PyTorch code has one"
        )

    torch.library.register_autograd(
        f"medaccel::{backward}", refuse, setup_context=lambda ctx, inputs, output: None, lib=lib
    )
