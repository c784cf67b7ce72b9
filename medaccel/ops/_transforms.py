# SPDX-License-Identifier: Apache-2.0
"""Detects the transforms of torch.func and forward-mode differentiation in an op's arguments.

vmap and torch.func's derivatives wrap tensors, one wrapper per level; forward mode attaches a tangent to them.
"""

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Tells whether a transform of torch.func or forward-mode differentiation is active, whatever it is applied
    to."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def derivative_is_traced() -> bool:
    """Tells whether a transform is to differentiate the code that torch.compile or torch.export traces."""
    stack = _functorch.get_interpreter_stack() or []
    differentiating = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return forward_ad._current_level >= 0 or any(layer.key() in differentiating for layer in stack)


# torch.compile asks while it traces; it compiles anew if transforms or dual levels change.
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
derivative_is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_tracked(tensor: Tensor, forward_mode: bool = True) -> bool:
    """Tells whether a transform of torch.func, or forward mode if that counts, differentiates by `tensor`.

    A tensor that is a constant to a forward mode further out than the innermost transform may count as well.
    """
    stack = _functorch.get_interpreter_stack() or []
    innermost = stack[-1].level() if stack else 0
    forward_levels = {layer.level() for layer in stack if layer.key() == _functorch.TransformType.Jvp}
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            level = _functorch.maybe_get_level(tensor)
            forward = forward_mode and level in forward_levels
            if tensor.requires_grad or (forward and (level != innermost or tangent(tensor) is not None)):
                return True
        tensor = _functorch.get_unwrapped(tensor)
    return forward_mode and tangent(tensor) is not None


def wants_gradient(tensor: Tensor) -> bool:
    """Tells whether autograd, or a transform of torch.func at any level, records a gradient by `tensor`."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or not in_transform():
        return tensor.requires_grad
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = _functorch.get_unwrapped(tensor)  # vmap's wrapper itself never requires one
    return tensor.requires_grad


def is_wrapped(value: object) -> bool:
    """Tells whether `value` is a tensor without memory of its own, as transforms pass it on, or one with a
    tangent."""
    if not isinstance(value, Tensor) or not in_transform():
        return False
    if torch.compiler.is_compiling():
        return True  # it may be
    return bool(_functorch.is_functorch_wrapped_tensor(value)) or tangent(value) is not None


def is_hidden(tensor: Tensor) -> bool:
    """Tells whether a number read from `tensor` would have lost a derivative or, under vmap, isn't one number."""
    if not in_transform():
        return False
    if torch.compiler.is_compiling() or is_tracked(tensor):
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def tangent(value: object) -> Tensor | None:
    """Returns the derivative that forward-mode differentiation attaches to a tensor; None if it has none."""
    if forward_ad._current_level < 0 or not isinstance(value, Tensor):
        return None
    return forward_ad.unpack_dual(value).tangent


_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)


def host_values(tensor: Tensor) -> Tensor | None:
    """Returns the values of `tensor` if the host may read them without waiting (under vmap those of all samples),
    else None.

    It is None if they lie on a device, or if torch.compile or another tracer works without values.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    tensor = tensor.detach()
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return None if any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS) else tensor
