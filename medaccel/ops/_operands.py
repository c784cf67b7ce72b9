# SPDX-License-Identifier: Apache-2.0
"""Checks a registered op's operands before its kernel takes addresses.

The public functions check a user's arguments, in a user's words. `torch.ops.medaccel.*` can be called past them, and
a saved tensor can have been changed before the backward pass: so everything that a kernel's memory accesses rely on
is checked again here, at about half a microsecond per tensor. Nothing here reads a GPU's memory.
"""

import math
from collections.abc import Collection, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from medaccel.ops._arguments import FLOATING, describe


class Operands:
    """Checks one call's operands: those of the op `name`, which must lie where the tensor `first` lies.

    The dispatcher passes None even for a tensor of the schema, if it is undefined.
    """

    def __init__(self, name: str, argument: str, first: Tensor, dtypes: Collection[torch.dtype] = FLOATING):
        self.name = name
        self._argument = argument
        if first is None:
            self._missing(argument)
        self.device = first.device
        self.tensor(argument, first, None, dtypes)

    def tensor(
        self,
        argument: str,
        tensor: Tensor,
        shape: Sequence[int] | None,
        dtypes: Collection[torch.dtype] = FLOATING,
    ) -> None:
        """Raises an error if the tensor is missing, or has another shape, dtype, device or layout."""
        if tensor is None:
            self._missing(argument)
        if tensor.dtype not in dtypes or tensor.layout is not torch.strided:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{self.name}: {argument} is {describe(tensor)}; expected a dense tensor of {names}")
        if tensor.device != self.device:
            raise ValueError(
                f"{self.name}: {argument} is on {tensor.device} and {self._argument} on {self.device}; expected the "
                "same device"
            )
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"{self.name}: {argument} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")

    def optional(
        self,
        argument: str,
        tensor: Tensor | None,
        shape: Sequence[int] | None,
        dtypes: Collection[torch.dtype] = FLOATING,
    ) -> None:
        """Does the work of `tensor` for one that may be None."""
        if tensor is not None:
            self.tensor(argument, tensor, shape, dtypes)

    def rank(self, argument: str, tensor: Tensor, ranks: Collection[int], expected: str) -> None:
        """Raises an error if the tensor is missing, or has another number of axes."""
        if tensor is None:
            self._missing(argument)
        if tensor.dim() not in ranks:
            self.refuse(argument, f"has shape {tuple(tensor.shape)}", expected)

    def number(self, argument: str, value: float, low: float, high: float = math.inf) -> None:
        """Raises an error if `value` isn't a finite number from low to high."""
        if not low <= value <= high or math.isinf(value):
            span = f" from {low:g} to {high:g}" if math.isfinite(high) else f" of at least {low:g}"
            self.refuse(argument, f"is {value}", f"a finite number{span if math.isfinite(low) else ''}")

    def refuse(self, argument: str, what: str, expected: str) -> NoReturn:
        """Raises a ValueError in a sentence."""
        raise ValueError(f"{self.name}: {argument} {what}; expected {expected}")

    def _missing(self, argument: str) -> NoReturn:
        raise TypeError(f"{self.name}: {argument} is None; expected a tensor")
