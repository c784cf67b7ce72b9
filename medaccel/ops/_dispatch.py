# SPDX-License-Identifier: Apache-2.0
"""Holds the functions by which every op chooses its path."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor, nn

from medaccel.ops._transforms import derivative_is_traced, in_transform, is_tracked

# This is a plain module global, so that torch.compile guards on it: code compiled inside `use_reference()` is not
# reused outside.
reference_forced = False


@contextmanager
def use_reference() -> Iterator[None]:
    """Makes every op run its plain PyTorch reference within it: to compare numbers, or to rule a kernel out.

    It is not per thread: it holds for the whole process while it lasts.
    """
    global reference_forced
    before = reference_forced
    reference_forced = True
    try:
        yield
    finally:
        reference_forced = before


def kernel_serves(*arguments: object, linear: Sequence[object] = ()) -> bool:
    """Tells whether an op's kernel may be asked: no reference is forced, and no transform differentiates by an
    argument.

    Kernels have gradients for autograd, and vmap runs them sample by sample. Forward mode and the transforms of
    torch.func differentiate every single operation, and nest; the references, plain PyTorch, follow all of that.

    Args:
        arguments: the op's arguments, tensors or not.
        linear: further arguments, by which its registration has a forward-mode derivative.
    """
    if reference_forced or (exporting() and torch.onnx.is_in_onnx_export()):  # ONNX has no such ops
        return False
    if torch.compiler.is_compiling():
        return not derivative_is_traced()
    if not in_transform():
        return True
    return not (
        any(isinstance(a, Tensor) and is_tracked(a) for a in arguments)
        or any(isinstance(a, Tensor) and is_tracked(a, forward_mode=False) for a in linear)
    )


def exporting() -> bool:
    """Tells whether calls are being recorded for others to run: by torch.jit.trace, ONNX or torch.export without
    Dynamo.

    Dynamo (torch.compile, strict export, AOTInductor) takes medaccel's ops and layers as they are.
    """
    # Dynamo is asked first: it can't trace into the others.
    return not torch.compiler.is_dynamo_compiling() and (torch._C._is_tracing() or torch.compiler.is_exporting())


def exporting_plainly() -> bool:
    """Tells whether the recorder supports only torch's own ops, or its file should hold only these: torch.jit.trace
    and ONNX."""
    return exporting() and (torch._C._is_tracing() or torch.onnx.is_in_onnx_export())


def refuse_scripting(module: nn.Module) -> NoReturn:
    """Refuses torch.jit.script in a sentence; scripting asks every module's `__prepare_scriptable__` first."""
    monai = any(base.__module__.startswith("monai.") for base in type(module).__mro__)
    raise RuntimeError(
        f"torch.jit.script can't compile medaccel's {type(module).__qualname__}; "
        f"{'call medaccel.revert(model) first, or ' if monai else ''}use torch.jit.trace, torch.export or "
        "torch.onnx.export, which take it as it is"
    )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast's casts off within it: for references of ops that always compute in fp32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(input: Tensor) -> torch.dtype:
    """Returns the dtype that autocast gives `input`: its own if nothing is cast."""
    device = input.device.type
    if input.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype


def _cpu_keys(inference: bool) -> int:
    with torch.inference_mode(inference):
        return torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()


# These are the dispatch keys of an ordinary tensor on the CPU and of one made in inference mode. Any other key stands
# for work that torch does before a kernel may read the memory: the memory of a negated or conjugated view holds other
# values, torch's efficient zero tensors have no memory at all, and wrappers have another tensor's.
_PLAIN_KEYS = frozenset({_cpu_keys(False), _cpu_keys(True)})


def plain_eager(input: Tensor) -> bool:
    """Tells whether dispatching an op on the CPU tensor `input` would reach its kernel with nothing to do on the way.

    That is: no gradient to record, no autocast, no compilation or tracing, no tensor subclass, mode or functorch
    transform, and memory that holds the tensor's values. A public function may then call the kernel directly, which
    saves torch's dispatch: more than the kernel itself takes on a small tensor.
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
