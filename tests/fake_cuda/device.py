# SPDX-License-Identifier: Apache-2.0
"""Runs code on CUDA tensors that have neither memory nor GPU, and watches what would make the host wait for one.

Tests marked `fake_cuda` run in a process whose torch believes in a GPU (fake_cuda.cpp). There, tensors of torch's
FakeTensorMode lie on "cuda": shapes, dtypes, devices, autocast and backward are real, numbers are not. The ops'
registered CUDA functions run too, with launches that do nothing, and must give what the op's fake declares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import medaccel
from medaccel import _native
from medaccel.ops import _transforms
from tests.ops.checks import emulated_module

CUDA = torch.device("cuda", 0)


class Kernels:
    """Stands in for the compiled module `_cuda`: its constants are true, its kernels do nothing."""

    architectures = "80,90,100"
    _TRUE = ("gaussian_radius", "gaussian_workspace_bytes", "instance_norm_bytes")

    def __init__(self, true: Any) -> None:
        self._true = true
        self.launched: list[str] = []

    def running_architecture(self, index: int) -> int:
        return 90

    def __getattr__(self, name: str) -> Any:
        true = getattr(self._true, name)
        if name in self._TRUE or not callable(true):
            return true
        return lambda *args, **options: self.launched.append(name)


class Watch(TorchDispatchMode):
    """Notes copies between devices and numbers read from a GPU, and holds each op to what its fake declares."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        reads = ("aten._local_scalar_dense.default", "aten.equal.default", "aten.is_nonzero.default")
        if name in reads and any(t.device.type == "cuda" for t in given):
            self.waits.append(name)
        device = torch.device((kwargs or {}).get("device") or "cpu")
        if device.type == "cpu" and not any(isinstance(t, FakeTensor) for t in given):
            with unset_fake_temporarily():  # the host's own tensors have numbers
                return func(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if name in ("aten._to_copy.default", "aten.copy_.default"):
            source = args[0] if name.startswith("aten._to") else args[1]
            if source.device != output.device:
                self.waits.append(f"{name} {source.device} to {output.device}")
        if func.namespace == "medaccel":
            self.ops.append(func._schema.name.partition("::")[2])
            self._run_the_kernels_function(func, args, output)
        return output

    def _run_the_kernels_function(self, func: Any, args: Any, declared: Any) -> None:
        name = func.name()
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), (
            f"{name} was called, and has no CUDA code"
        )
        with self:
            made = func._op_dk(torch._C.DispatchKey.CUDA, *args)
        for a, b in zip(pytree.tree_leaves(made), pytree.tree_leaves(declared), strict=True):
            assert described(a) == described(b), (
                f"{name}: its CUDA code gives {described(a)}, its fake {described(b)}"
            )


def described(tensor: Tensor) -> tuple[Any, ...]:
    """Says everything of a tensor but its numbers."""
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))


@contextlib.contextmanager
def fake_gpu(patch: Any, watched: bool = True) -> Iterator[Watch]:
    """Makes tensors fake, "cuda" usable and every kernel served within it; yields what watches.

    Args:
        patch: pytest's monkeypatch.
        watched: False leaves the watching out, for code that is compiled.
    """
    import torch.cuda.amp.common
    import triton

    patch.setattr(_native, "cuda", Kernels(_native.cuda or emulated_module()))
    patch.setattr(triton.runtime.jit.JITFunction, "run", lambda self, *args, **options: None)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    patch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    # The fakes' mode counts as a compiler's, from which the ops hide the host's values: here they are real.
    patch.setattr(_transforms, "_TRACERS", ())
    # A place for each storage, so that memory which is shared is seen to be.
    patch.setattr(FakeTensor, "data_ptr", _place, raising=False)
    for cached in (_native._probe_gpu, _native._probe_triton):
        cached.cache_clear()
    watch = Watch()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), watch if watched else contextlib.nullcontext():
            yield watch
    finally:
        for cached in (_native._probe_gpu, _native._probe_triton):
            cached.cache_clear()


def _place(tensor: Tensor) -> int:
    return (tensor.untyped_storage()._cdata << 40) + tensor.storage_offset() * tensor.element_size()


def on_gpu(value: Any) -> Any:
    """Returns fake CUDA tensors in the layout of real ones, wherever they stand in lists, tuples and dicts."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        strides = x.stride()
        size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) if x.numel() else 0
        y = torch.empty(size, dtype=x.dtype, device=CUDA).as_strided(x.shape, strides)
        return y.detach().requires_grad_(x.requires_grad)

    return pytree.tree_map(moved, value)


def module_on_gpu(module: nn.Module) -> nn.Module:
    """Replaces a module's parameters and buffers with fake CUDA ones, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA), parameter.requires_grad
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
        if isinstance(part, medaccel.layers.GaussianFilter):
            part.sigma = [part._parameters[f"kernel_sigma_{axis}"] for axis in range(len(part.sigma))]
    return module
