# SPDX-License-Identifier: Apache-2.0
"""Public calls that launch Triton kernels, on tensors without contents: what `launches` compiles.

A call is named by words: ``swin_unetr 48 bfloat16`` (a training step at 96³: the attention calls that the network
makes are recorded on meta tensors, forward and backward), ``attention 32 float32 high dropout``,
``pixel_contrast 64 bfloat16 coordinates64``. A precision is torch's setting for fp32 products.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRECISIONS = ("highest", "high", "medium")
Call = tuple[str, tuple[Any, ...]]


# Operations of torch that launch nothing on a device.
_FREE = (
    "empty",
    "new_empty",
    "empty_strided",
    "empty_like",
    "view",
    "_unsafe_view",
    "detach",
    "t",
    "select",
    "slice",
)


def run(name: str, arch: int) -> dict[str, int]:
    """Makes the call of that name, on an architecture that only Triton's driver knows; counts torch's launches."""
    what, size, dtype, *options = name.split()
    precision = next((option for option in options if option in PRECISIONS), "highest")
    torch.set_float32_matmul_precision(precision)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if what == "pixel_contrast":
        with _Recorder("aten") as recorder:
            _pixel_contrast(int(size), torch_dtype, torch.float64 if "coordinates64" in options else torch.float32)
        return recorder.launches()
    calls = swin_unetr(int(size)) if what == "swin_unetr" else attention(int(size), "dropout" in options)
    from medaccel.ops.window_attention import triton

    given = [(op, _without_contents(arguments, torch_dtype)) for op, arguments in calls]
    with mock.patch.object(triton, "architecture", return_value=arch), _Recorder("aten") as recorder:
        for op, arguments in given:
            launch: Any = triton.backward if op.endswith("_backward") else triton.forward
            launch(*arguments)
    return recorder.launches()


class _Recorder(TorchDispatchMode):
    """Notes the calls of a namespace's ops."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            self.calls.append((func._schema.name.partition("::")[2], args))
        return func(*args, **(kwargs or {}))

    def launches(self) -> dict[str, int]:
        """Counts the ops that launch something on a device."""
        return dict(collections.Counter(op for op, _ in self.calls if op not in _FREE))


@contextlib.contextmanager
def _kernels_serve_meta_tensors() -> Iterator[None]:
    import medaccel.ops.window_attention as attention

    with mock.patch.object(attention, "unsupported", return_value=None):
        yield


@functools.cache
def swin_unetr(feature_size: int) -> list[Call]:
    """Returns the ops' calls in a training step of Swin UNETR at 96³, in fp32, with meta tensors."""
    from medaccel.nets import SwinUNETR

    network = SwinUNETR(in_channels=1, out_channels=2, feature_size=feature_size).to("meta").train()
    with _kernels_serve_meta_tensors(), _Recorder("medaccel") as recorder:
        network(torch.empty(1, 1, 96, 96, 96, device="meta")).sum().backward()
    return recorder.calls


def attention(head_dim: int, dropout: bool) -> list[Call]:
    """Returns the calls of one shifted attention as in Swin UNETR's first stage, forward and backward."""
    from medaccel.ops import shifted_window_attention

    with torch.device("meta"), _kernels_serve_meta_tensors(), _Recorder("medaccel") as recorder:
        qkv, table = torch.empty(1, 48, 48, 48, 9 * head_dim), torch.empty(13**3, 3)
        pad = torch.empty(9 * head_dim).requires_grad_()
        index = torch.empty(343, 343, dtype=torch.int64)
        y = shifted_window_attention(
            qkv.requires_grad_(), table.requires_grad_(), index, pad_qkv=pad, window_size=(7, 7, 7),
            shift_size=(3, 3, 3), dropout_p=0.1 if dropout else 0.0,
            dropout_seed=torch.empty(1, dtype=torch.int64) if dropout else None,
        )  # fmt: skip
        y.sum().backward()
    return recorder.calls


def _without_contents(arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    """Returns the arguments as tensors on the CPU that nobody has filled.

    As under autocast, maps have `dtype`, and everything else keeps its own.
    """

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        is_map = value.dim() == 5
        return torch.empty_strided(value.shape, value.stride(), dtype=dtype if is_map else value.dtype)

    return [real(value) for value in arguments]


def _pixel_contrast(channels: int, dtype: torch.dtype, coordinates: torch.dtype) -> None:
    """Launches the loss between two views of 24³ pixels, and its gradients."""
    from medaccel.ops.pixel_contrast import triton

    n = 24**3
    views = [torch.empty(2, n, channels, dtype=dtype) for _ in range(2)]
    geometry = [torch.empty(shape, dtype=coordinates) for shape in ((2, n, 3), (2, n, 3), (2,))]
    loss, lse, positive = triton.forward(*views, *geometry, 0.1)
    triton.backward(loss, *views, *geometry, lse, positive, 0.1, True, True)
