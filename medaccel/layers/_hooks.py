# SPDX-License-Identifier: Apache-2.0
"""Whether a layer may be computed without being called."""

from torch import nn


def bypass_problem(module: nn.Module, name: str) -> str | None:
    """None where nobody would notice that `module` is not called; else who would, in words for the report."""
    listeners = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(listeners):
        return f"its {name} has hooks, which the block would no longer call"
    if "forward" in module.__dict__:
        return f"its {name}'s forward has been replaced on the instance"
    return None
