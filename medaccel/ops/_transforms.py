# SPDX-License-Identifier: Apache-2.0
"""What the transforms of torch.func and forward-mode differentiation do to an op's arguments.

vmap and torch.func's derivatives wrap tensors, one wrapper a level; forward mode hangs a tangent on them.
"""

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is going on, whatever it is applied to."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def derivative_is_traced() -> bool:
    """Whether what torch.compile or torch.export traces is to be differentiated by a transform."""
    stack = _functorch.get_interpreter_stack() or []
    differentiating = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return forward_ad._current_level >= 0 or any(layer.key() in differentiating for layer in stack)


# torch.compile asks while it traces; it compiles anew where transforms or dual levels are others.
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
derivative_is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_tracked(tensor: Tensor, forward_mode: bool = True) -> bool:
    """Whether a transform of torch.func or forward mode, if that counts, differentiates by `tensor`.

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
    """Whether autograd, or a transform of torch.func at any level, records a gradient by `tensor`."""
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
    """Whether `value` is a tensor without memory of its own, as transforms hand it on, or with a tangent."""
    if not isinstance(value, Tensor) or not in_transform():
        return False
    if torch.compiler.is_compiling():
        return True  # it may be
    return bool(_functorch.is_functorch_wrapped_tensor(value)) or tangent(value) is not None


def is_hidden(tensor: Tensor) -> bool:
    """Whether a number that is read of `tensor` would have lost a derivative or, under vmap, isn't one number."""
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
    """The derivative that forward-mode differentiation carries along with a tensor; None where it carries none."""
    if forward_ad._current_level < 0 or not isinstance(value, Tensor):
        return None
    return forward_ad.unpack_dual(value).tangent


_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)


def host_values(tensor: Tensor) -> Tensor | None:
    """What the host may read of `tensor` without waiting: under vmap the values of all samples; else None.

    None: they lie on a device, or torch.compile or another tracer goes by without values.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    tensor = tensor.detach()
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return None if any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS) else tensor
