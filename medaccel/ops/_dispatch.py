# SPDX-License-Identifier: Apache-2.0
"""What every op's choice of path shares."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor, nn

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


def exporting() -> bool:
    """Whether calls are being recorded for others to run: by torch.jit.trace, ONNX or torch.export without Dynamo.

    Dynamo (torch.compile, strict export, AOTInductor) takes our ops and layers as they are.
    """
    # Dynamo is asked first: it can't look into the others.
    return not torch.compiler.is_dynamo_compiling() and (torch._C._is_tracing() or torch.compiler.is_exporting())


def exporting_plainly() -> bool:
    """Whether what records knows torch's own ops alone, or its file should: torch.jit.trace and ONNX."""
    return exporting() and (torch._C._is_tracing() or torch.onnx.is_in_onnx_export())


def kernels_wanted() -> bool:
    """Whether ops may run their kernels: not under `use_reference`, and not for ONNX, which has no such ops."""
    return not (reference_forced or (exporting() and torch.onnx.is_in_onnx_export()))


def refuse_scripting(module: nn.Module) -> NoReturn:
    """Refuses torch.jit.script in a sentence: as `__prepare_scriptable__`, which it asks of every module first."""
    monai = any(base.__module__.startswith("monai.") for base in type(module).__mro__)
    raise RuntimeError(
        f"torch.jit.script can't compile medaccel's {type(module).__qualname__}; "
        f"{'call medaccel.revert(model) first, or ' if monai else ''}use torch.jit.trace, torch.export or "
        "torch.onnx.export, which take it as it is"
    )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it, autocast casts nothing: for references of ops that are computed in fp32 whatever surrounds them."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def plain_eager(input: Tensor) -> bool:
    """Whether dispatching an op on `input` would reach its kernel with nothing to do on the way.

    No gradient to record, no autocast, no compilation or tracing, no tensor subclass, mode or functorch transform.
    A public function may then call the kernel directly, which saves torch's dispatch: more than the kernel itself
    takes on a small tensor.
    """
    return (
        not torch.compiler.is_compiling()
        and type(input) is Tensor
        and not (input.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled(input.device.type)
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
    )
