# SPDX-License-Identifier: Apache-2.0
"""What every op's choice of path shares."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from medaccel.ops._transforms import derivative_is_traced, in_transform, is_tracked

# A plain module global, so that torch.compile guards on it: what is compiled inside `use_reference()` is not reused
# outside.
reference_forced = False


@contextmanager
def use_reference() -> Iterator[None]:
    """Within it, every op runs its plain PyTorch reference: to compare numbers, or to rule a kernel out.

    Not per thread: it holds for the whole process while it lasts.
    """
    global reference_forced
    before = reference_forced
    reference_forced = True
    try:
        yield
    finally:
        reference_forced = before


def kernel_serves(*arguments: object, linear: Sequence[object] = ()) -> bool:
    """Whether an op's kernel may be asked: no reference is forced, and no transform differentiates by an argument.

    Kernels have gradients for autograd, and vmap runs them sample by sample. Forward mode and the transforms of
    torch.func differentiate every single operation, and nest; the references, plain PyTorch, follow all of that.

    Args:
        arguments: of the op, tensors or not.
        linear: further ones, by which its registration has a forward-mode derivative.
    """
    if reference_forced:
        return False
    if torch.compiler.is_compiling():
        return not derivative_is_traced()
    if not in_transform():
        return True
    return not (
        any(isinstance(a, Tensor) and is_tracked(a) for a in arguments)
        or any(isinstance(a, Tensor) and is_tracked(a, forward_mode=False) for a in linear)
    )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it, autocast casts nothing: for references of ops that are computed in fp32 whatever surrounds them."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(input: Tensor) -> torch.dtype:
    """What autocast makes of `input`: its dtype where it casts nothing."""
    device = input.device.type
    if input.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype


def _cpu_keys(inference: bool) -> int:
    with torch.inference_mode(inference):
        return torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()


# The dispatch keys of an ordinary tensor on the CPU and of one made in inference mode. Any other key stands for work
# that torch does before a kernel may read the memory: a negated or conjugated view is not what lies there, torch's
# efficient zero tensors have no memory at all, wrappers have somebody else's.
_PLAIN_KEYS = frozenset({_cpu_keys(False), _cpu_keys(True)})


def plain_eager(input: Tensor) -> bool:
    """Whether dispatching an op on the CPU tensor `input` would reach its kernel with nothing to do on the way.

    No gradient to record, no autocast, no compilation or tracing, no tensor subclass, mode or functorch transform,
    and memory that holds what the tensor says.
    A public function may then call the kernel directly, which saves torch's dispatch: more than the kernel itself
    takes on a small tensor.
    """
    return (
        not torch.compiler.is_compiling()
        and type(input) is Tensor
        and torch._C._dispatch_keys(input).raw_repr() in _PLAIN_KEYS
        and not (input.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled(input.device.type)
        and not torch._C._is_tracing()
        and not in_transform()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
    )
