# SPDX-License-Identifier: Apache-2.0
"""PixPro's loss: pixels of two views that show the same place should have the same direction."""

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch
from medaccel.ops._views import check_views
from medaccel.ops.pixel_consistency import op, reference
from medaccel.ops.pixel_contrast.op import triton_problem

_NAME = "pixel_consistency_loss"


def unsupported(query: Tensor, key: Tensor | None = None) -> str | None:
    """Says in a sentence why no kernel serves `query` and (if it is given) `key`; returns None if one does."""
    if query.device.type == "cpu":
        return _native.cpu_problem
    if query.device.type == "cuda":
        other = query if key is None else key
        dtype = other.dtype if other.dtype == torch.float64 else query.dtype
        return triton_problem(query.device.index, dtype, 1)  # it takes any number of channels
    return f"{_NAME} has no kernel for device {query.device.type!r}"


def pixel_consistency_loss(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, *, radius: float | Tensor
) -> Tensor:
    """Averages −cos(q_i, k_j) over a sample's pairs of pixels closer than `radius`, and then over the batch.

    Args:
        query: (B, N, C), features of one view, in PixPro the output of `pixel_propagation`; normalised inside.
        key: (B, M, C), features of the other view, in PixPro from a momentum encoder and without gradient.
        query_coords, key_coords: (B, N, S) and (B, M, S), S = 1-3, in a frame that both views share.
        radius: the distance below which two pixels are a pair, in the coordinates' unit: a number, or one per sample
            (B,).

    Returns:
        A scalar between −1 and 1, in fp32 (fp64 for fp64 features). A sample without pairs counts as 0, as in PixPro,
        and so does a zero vector; neither has a gradient. Same bits whatever the number of threads.

    Raises:
        TypeError: a dtype makes no sense.
        ValueError: a shape, value or device makes no sense.

    Source: Xie et al., "Propagate Yourself", CVPR 2021, eq. 5.

    >>> import torch, medaccel
    >>> at = torch.cartesian_prod(*[torch.arange(6.0)] * 3)[None]
    >>> x = torch.randn(1, 216, 32)
    >>> round(float(medaccel.ops.pixel_consistency_loss(x, 3 * x, at, at, radius=0.5)), 5)
    -1.0
    """
    at_query, at_key, radii = check_views(_NAME, query, key, query_coords, key_coords, radius)
    if _dispatch.kernel_serves(query, key) and unsupported(query, key) is None:
        sums, counts = torch.ops.medaccel.pixel_pair_similarity(query, key, at_query, at_key, radii)
    else:
        dtype = op.compute_dtype(query, key)
        sums, counts = reference.pair_similarity(query.to(dtype), key.to(dtype), at_query, at_key, radii)
    per_sample = sums.sum(dim=-1) / counts.detach().sum(dim=-1).clamp(min=1)
    return -per_sample.sum() / max(1, len(query))
