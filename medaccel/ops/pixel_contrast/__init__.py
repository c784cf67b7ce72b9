# SPDX-License-Identifier: Apache-2.0
"""Computes the pixel-level contrastive loss between two views of an image or volume, streamed."""

from typing import Literal, overload

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch
from medaccel.ops._arguments import check_temperature, choice, flag
from medaccel.ops._views import check_views
from medaccel.ops.pixel_contrast import op, reference
from medaccel.ops.pixel_contrast.temperature import carry_temperature

_NAME = "pixel_contrastive_loss"


def unsupported(query: Tensor, key: Tensor | None = None) -> str | None:
    """Says in a sentence why no kernel serves `query` and (if it is given) `key`; returns None if one does."""
    if query.device.type == "cpu":
        return _native.cpu_problem
    if query.device.type == "cuda":
        other = query if key is None else key
        dtype = other.dtype if other.dtype == torch.float64 else query.dtype
        return op.triton_problem(query.device.index, dtype, query.shape[-1])
    return f"{_NAME} has no kernel for device {query.device.type!r}"


@overload
def pixel_contrastive_loss(
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    *,
    radius: float | Tensor,
    temperature: float | Tensor = ...,
    reduction: str = ...,
    return_valid: Literal[False] = ...,
) -> Tensor: ...


@overload
def pixel_contrastive_loss(
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    *,
    radius: float | Tensor,
    temperature: float | Tensor = ...,
    reduction: str = ...,
    return_valid: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def pixel_contrastive_loss(
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    *,
    radius: float | Tensor,
    temperature: float | Tensor = 0.3,
    reduction: str = "mean",
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Contrasts each pixel of a view with all pixels of another; those that show the same place are the positives.

    loss_i = log Σ_j exp(cos(q_i, k_j) / temperature) − log Σ_{j ∈ P(i)} exp(cos(q_i, k_j) / temperature), where P(i)
    are the pixels j whose coordinates lie closer than `radius` to those of i. A pixel without any is left out. No N ×
    M tensor is made, not even in the backward pass: memory is linear in the pixels.

    Args:
        query: (B, N, C), features of one view's pixels, floating point; normalised inside. fp64 is computed in
            fp64, everything else in fp32.
        key: (B, M, C), features of the other view's pixels; give it without gradient if it comes from a momentum
            encoder, which saves a quarter of the time.
        query_coords, key_coords: (B, N, S) and (B, M, S), S = 1-3: coordinates of each pixel's centre in a frame that
            both views share, in mm if voxels are anisotropic. They have no gradient. A NaN is near to nothing.
        radius: the distance below which a pair is positive, in the coordinates' unit: a number, or one per sample
            (B,). Distances are compared in the coordinates' dtype. `medaccel.losses.default_radius` gives the
            published choice.
        temperature: a number above 0. A tensor of one element may require grad and gets one (a learnt temperature);
            its memory stays linear.
        reduction: "mean" over all pixels of the batch that have a positive, "sum", or "none": (B, N), 0 for pixels
            without a positive.
        return_valid: also return (B, N), bool, True for pixels that have a positive.

    Returns:
        The loss, in fp32 (fp64 for fp64 features); 0, with zero gradients, if no pixel has a positive. A zero
        vector has cosine 0 with everything and gets no gradient. A NaN among the features of a pixel that counts
        makes the loss NaN. Same bits whatever the number of threads, gradients included.

    Raises:
        TypeError: a dtype makes no sense.
        ValueError: a shape, value or device makes no sense.

    Source: Xie et al., "Propagate Yourself", CVPR 2021, eq. 1-2.

    >>> import torch, medaccel
    >>> centres = torch.cartesian_prod(*[torch.arange(6.0)] * 3)[None]  # voxels of 1 mm
    >>> features, others = torch.randn(1, 216, 32), torch.randn(1, 216, 32)
    >>> medaccel.ops.pixel_contrastive_loss(features, others, centres, centres + 0.5, radius=1.0).shape
    torch.Size([])
    """
    at_query, at_key, radii = check_views(_NAME, query, key, query_coords, key_coords, radius)
    tau = check_temperature(_NAME, temperature)
    choice(_NAME, "reduction", reduction, ("mean", "sum", "none"), "'mean', 'sum' or 'none'")
    return_valid = flag(_NAME, "return_valid", return_valid)
    if _dispatch.kernel_serves(query, key, tau) and unsupported(query, key) is None:
        if isinstance(tau, Tensor):
            query, key, tau = carry_temperature(query, key, tau)
        arguments = (query, key, at_query, at_key, radii, tau)
        loss, _, positive_lse = torch.ops.medaccel.pixel_contrastive_loss(*arguments)
        valid = positive_lse != -float("inf")
    else:
        dtype = op.compute_dtype(query, key)
        loss, valid = reference.pixel_contrastive_loss(query.to(dtype), key.to(dtype), at_query, at_key, radii, tau)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / valid.sum().clamp(min=1)
    return (loss, valid) if return_valid else loss
