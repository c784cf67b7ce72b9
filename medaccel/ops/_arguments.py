# SPDX-License-Identifier: Apache-2.0
"""Checks arguments of public functions: tensors, numbers, whole numbers and choices are accepted in many forms, and
anything else gets a sentence.

A TypeError says that the argument's kind makes no sense, a ValueError that its value doesn't.
"""

import math
import numbers
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from medaccel.ops._transforms import host_values, is_hidden, wants_gradient

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    *(torch.uint16, torch.uint32, torch.uint64),
)
# A mask may have these dtypes.
_MASKS = (*FLOATING, *INTEGERS, torch.bool)
# At this limit 1 / temperature, its products and their sums stay far from float32's limits.
MIN_TEMPERATURE = 1e-18


def describe(value: object) -> str:
    """Describes `value` in a few words, for an error's sentence."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested tensor of {value.dtype}"
        return f"{value.dtype}" if value.layout is torch.strided else f"{value.dtype} in the layout {value.layout}"
    if isinstance(value, list | tuple | dict | set):
        return type(value).__name__
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__


def _is_dense(value: Any, dtypes: Collection[torch.dtype]) -> bool:
    # The exact type is compared first: torch's isinstance takes four times as long.
    is_tensor = type(value) is Tensor or isinstance(value, Tensor)
    return is_tensor and value.dtype in dtypes and value.layout is torch.strided and not value.is_nested


def check_floating(name: str, **tensors: object) -> None:
    """Raises a TypeError naming the first argument that is no dense floating-point tensor."""
    for argument, tensor in tensors.items():
        if not _is_dense(tensor, FLOATING):
            raise TypeError(
                f"{name}: {argument} is {describe(tensor)}; expected a floating-point tensor (float32, float64, "
                "bfloat16 or float16, dense)"
            )


def check_integers(name: str, argument: str, tensor: object) -> None:
    """Raises a TypeError if `tensor` is no dense integer tensor."""
    if not _is_dense(tensor, INTEGERS):
        raise TypeError(
            f"{name}: {argument} is {describe(tensor)}; expected an integer tensor (indices have no gradient)"
        )


def check_mask(name: str, argument: str, tensor: object) -> None:
    """Raises a TypeError if `tensor` is no dense tensor of truth values or numbers."""
    if not _is_dense(tensor, _MASKS):
        raise TypeError(f"{name}: {argument} is {describe(tensor)}; expected a dense tensor of bool or real numbers")


def learnt(value: object) -> bool:
    """Tells whether `value` must stay a tensor, because a derivative by it is needed or vmap hides its values."""
    return isinstance(value, Tensor) and (wants_gradient(value) or is_hidden(value))


def stays_tensor(value: object) -> bool:
    """Tells whether `value` is a tensor that no number is read from: it is learnt, or it lies on a device, for which
    the host would have to wait."""
    return isinstance(value, Tensor) and (value.device.type != "cpu" or learnt(value))


def filled(
    values: Sequence[float], dtype: torch.dtype, device: torch.device, made: dict[str, Tensor] | None = None
) -> Tensor:
    """Returns numbers that the host knows as a tensor (len(values),) on `device`, without waiting for it.

    A copy from the host's memory would wait, and can't be recorded into a CUDA graph. So each number goes as a
    kernel's argument, equal ones once.

    Args:
        values: the numbers.
        dtype, device: those of the tensor.
        made: the numbers that are on the device already; new ones are added.
    """
    if device.type == "cpu" or len(values) == 0:
        return torch.tensor(values, dtype=dtype).to(device)
    made = {} if made is None else made
    parts = []
    for i, value in enumerate(values):
        # By its digits: 0.0 and −0.0 are equal. A compiler has symbols instead, and joins equal ones itself.
        key = f"{i}" if torch.compiler.is_compiling() else repr(value)
        if torch.compiler.is_compiling() or key not in made:
            made[key] = torch.full((1,), value, dtype=dtype, device=device)
        parts.append(made[key])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def number(name: str, argument: str, value: Any, expected: str = "a number") -> float:
    """Converts `value` to a Python float: a Python or NumPy number, or a tensor or array of one element.

    Raises:
        TypeError: `value` is a bool, complex, text or None, or has several elements.
        ValueError: `value` is a tensor that requires grad, which would silently lose its gradient, or a number beyond
            float64.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        if is_hidden(value):
            raise ValueError(
                f"{name}: {argument} is under vmap, another transform of torch.func or forward-mode differentiation; "
                f"expected {expected} outside of them"
            )
        if learnt(value):
            raise ValueError(
                f"{name}: {argument} requires grad; expected {expected} without (it has no gradient: detach it)"
            )
        plain = value.numel() == 1 and value.layout is torch.strided and not value.dtype.is_complex
        if plain and value.dtype != torch.bool:
            return float(value.detach())
    elif isinstance(value, int | float | torch.SymInt | torch.SymFloat | numbers.Real):
        if isinstance(value, bool):
            raise TypeError(f"{name}: {argument} is {value}; expected {expected}")
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name}: {argument} is beyond the range of float64; expected {expected}") from None
    elif getattr(value, "size", None) == 1 and hasattr(value, "item"):  # NumPy's other scalars, and arrays
        item = value.item()
        if isinstance(item, numbers.Real) and not isinstance(item, bool):
            return float(item)
    raise TypeError(f"{name}: {argument} is {describe(value)}; expected {expected}")


_FLOAT32_MAX = torch.finfo(torch.float32).max


def finite(name: str, argument: str, value: Any) -> float:
    """Returns a number that is finite in float32 too, which most kernels compute in."""
    result = number(name, argument, value, "a finite number")
    if not -_FLOAT32_MAX <= result <= _FLOAT32_MAX:
        raise ValueError(f"{name}: {argument} is {value}; expected a finite number (of float32)")
    return result


def check_temperature(name: str, value: Any) -> float | Tensor:
    """Returns the temperature as a number or, if a gradient by it is needed or it lies on a device, as the tensor ()
    itself.

    A tensor's value is read only if it lies on the CPU: nothing waits for a device.
    """
    if not stays_tensor(value):
        return _temperature(name, value, number(name, "temperature", value, "a number above 0"))
    if _is_dense(value, INTEGERS):
        value = value.to(torch.float64)
    if value.numel() != 1 or not _is_dense(value, FLOATING):
        raise TypeError(
            f"{name}: temperature is {describe(value)} of shape {tuple(value.shape)}; expected a number, or a "
            "floating-point tensor of one element"
        )
    known = host_values(value)
    for number_of_sample in [] if known is None else known.flatten().tolist():
        _temperature(name, number_of_sample, number_of_sample)
    scalar: Tensor = value.reshape(())
    return scalar


def _temperature(name: str, given: object, value: float) -> float:
    if not MIN_TEMPERATURE <= value < math.inf:
        raise ValueError(
            f"{name}: temperature is {given}; expected a finite number above 0 (at least {MIN_TEMPERATURE}: float32 "
            "overflows)"
        )
    return value


def whole(name: str, argument: str, value: Any, expected: str = "a whole number") -> int:
    """Converts `value` to a Python int: a Python or NumPy integer, or a tensor or array of one integer.

    Raises:
        TypeError: `value` is anything else; fractions are never cut off, and bool is no number.
    """
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    kind = getattr(value, "dtype", None)
    if not isinstance(value, bool) and kind != torch.bool:
        try:
            return operator.index(value)
        except (TypeError, RuntimeError, ValueError):
            pass
    raise TypeError(f"{name}: {argument} is {describe(value)}; expected {expected}")


def wholes(name: str, argument: str, values: Any, expected: str) -> list[int]:
    """Converts a sequence's values to Python ints; raises TypeError if it is no sequence, or one of them isn't
    whole."""
    if not is_sequence(values):
        raise TypeError(f"{name}: {argument} is {describe(values)}; expected {expected}")
    return [whole(name, f"{argument}[{i}]", value) for i, value in enumerate(values)]


def is_sequence(value: object) -> bool:
    """Tells whether `value` is a list, tuple or other sequence of numbers, or a tensor or array with an axis."""
    if isinstance(value, list | tuple):
        return True
    if isinstance(value, float | int | str | bytes | dict | set):
        return False
    shape = getattr(value, "shape", None)
    return len(shape) == 1 if shape is not None else hasattr(value, "__len__") and hasattr(value, "__getitem__")


def choice(name: str, argument: str, value: object, options: Collection[str], expected: str = "") -> None:
    """Raises an error if `value` is none of the options."""
    if isinstance(value, str) and value in options:
        return
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name}: {argument} is {describe(value)}; expected {expected or f'one of {list(options)}'}")


def flag(name: str, argument: str, value: object) -> bool:
    """Returns True or False, given as Python's or NumPy's; nothing else is accepted."""
    if value is True or value is False:
        return value
    if type(value).__name__ in ("bool", "bool_") and not isinstance(value, Tensor):
        return bool(value)
    raise TypeError(f"{name}: {argument} is {describe(value)}; expected True or False")
