# SPDX-License-Identifier: Apache-2.0
"""Checks the arguments that the ops on the pixels of two views share."""

import math

import torch
from torch import Tensor

from medaccel.ops._arguments import check_floating, filled, number
from medaccel.ops._transforms import host_values, tangent, wants_gradient


def check_devices(name: str, first: str, **tensors: Tensor) -> None:
    """Raises a ValueError naming the first argument that lies elsewhere than `first`."""
    device = tensors[first].device
    for argument, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(
                f"{name}: {argument} is on {tensor.device} and {first} on {device}; expected the same device"
            )


def check_positive(name: str, argument: str, value: float) -> float:
    """Returns `value` as a float, or raises an error in a sentence if it is not finite and above 0."""
    result = number(name, argument, value, "a finite number above 0")
    if not 0 < result < math.inf:  # not math.isfinite: torch.compile may have made the number a symbol
        raise ValueError(f"{name}: {argument} is {value}; expected a finite number above 0")
    return result


def check_features(name: str, query: Tensor, key: Tensor) -> None:
    """Raises errors in a sentence unless query and key are (B, N, C) and (B, M, C)."""
    check_floating(name, query=query, key=key)
    if query.dim() != 3 or query.shape[2] == 0:
        raise ValueError(f"{name}: query has shape {tuple(query.shape)}; expected (B, N, C) with C >= 1")
    if key.dim() != 3 or key.shape[0] != query.shape[0] or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{name}: key has shape {tuple(key.shape)}; expected ({query.shape[0]}, M, {query.shape[2]}), the batch "
            "and the channels of query"
        )


def check_views(
    name: str, query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the coordinates and the radius (B,) in one dtype, fp32 or fp64; or raises an error in a sentence.

    Values are read only on the CPU: nothing here waits for a device.
    """
    check_features(name, query, key)
    check_floating(name, query_coords=query_coords, key_coords=key_coords)
    axes = query_coords.shape[-1] if query_coords.dim() == 3 else 0
    for argument, coords, of, features in (
        ("query_coords", query_coords, "query", query),
        ("key_coords", key_coords, "key", key),
    ):
        if not 1 <= axes <= 3 or tuple(coords.shape) != (*features.shape[:2], axes):
            raise ValueError(
                f"{name}: {argument} has shape {tuple(coords.shape)}; expected ({features.shape[0]}, "
                f"{features.shape[1]}, S), the batch and the pixels of {of}, with S = 1-3 the same for both views"
            )
    dtype = torch.float32
    if torch.float64 in (query_coords.dtype, key_coords.dtype):
        dtype = torch.float64
    radii = _radii(name, radius, query, dtype)
    check_devices(name, "query", query=query, key=key, query_coords=query_coords, key_coords=key_coords, radius=radii)
    return query_coords.detach().to(dtype), key_coords.detach().to(dtype), radii


def _radii(name: str, radius: object, query: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the radius of each sample, (B,), in the coordinates' dtype."""
    batch = len(query)
    if not isinstance(radius, Tensor | float | int) and getattr(radius, "ndim", 0) == 1:
        radius = torch.as_tensor(radius)  # a NumPy array
        check_floating(name, radius=radius)
        for value in radius.tolist():
            _check_radius(name, value, dtype)
        radius = filled(radius.tolist(), radius.dtype, query.device)
    if not isinstance(radius, Tensor):
        value = _check_radius(name, number(name, "radius", radius, "a number or one per sample"), dtype)
        return torch.full((batch,), value, dtype=dtype, device=query.device)
    check_floating(name, radius=radius)
    if radius.numel() not in (1, batch) or radius.dim() > 1:
        raise ValueError(
            f"{name}: radius has shape {tuple(radius.shape)}; expected a number or one per sample, ({batch},)"
        )
    if wants_gradient(radius) or tangent(radius) is not None:
        raise ValueError(
            f"{name}: radius requires grad; expected one without: pairs are near or they aren't, so detach it"
        )
    known = host_values(radius)
    for value in [] if known is None else known.flatten().tolist():
        _check_radius(name, value, dtype)
    return radius.detach().to(dtype).expand(batch)


def _check_radius(name: str, radius: float, dtype: torch.dtype) -> float:
    check_positive(name, "radius", radius)
    least = torch.finfo(dtype).tiny ** 0.5
    if radius < least:  # its square would be 0, and no distance is below that
        raise ValueError(f"{name}: radius is {radius}; expected at least {least:.3g}, whose square {dtype} can hold")
    return radius
