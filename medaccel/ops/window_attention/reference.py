# SPDX-License-Identifier: Apache-2.0
"""Computes shifted-window attention in plain PyTorch: differentiable, readable, slow. The kernels are held to it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medaccel.ops._philox import philox_4x32_10

# MONAI adds this to the score of a query and a key that the cyclic shift made neighbours: not −∞.
MASKED = -100.0


def partition(x: Tensor, window_size: Sequence[int]) -> Tensor:
    """Cuts (B, *spatial, C) into whole windows, (B, windows, tokens, C)."""
    b, *sizes, c = x.shape
    split = [n for size, w in zip(sizes, window_size, strict=True) for n in (size // w, w)]
    rank = len(sizes)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    return x.reshape(b, *split, c).permute(order).reshape(b, -1, math.prod(window_size), c)


def unpartition(windows: Tensor, sizes: Sequence[int], window_size: Sequence[int]) -> Tensor:
    """Undoes `partition`: (B, windows, tokens, C) to (B, *sizes, C)."""
    b, _, _, c = windows.shape
    rank = len(sizes)
    grid = [size // w for size, w in zip(sizes, window_size, strict=True)]
    order = [0, *(n for axis in range(rank) for n in (1 + axis, 1 + rank + axis)), 2 * rank + 1]
    return windows.reshape(b, *grid, *window_size, c).permute(order).reshape(b, *sizes, c)


def region_ids(
    sizes: Sequence[int],
    window_size: Sequence[int],
    shift_size: Sequence[int],
    device: torch.device | None = None,
) -> Tensor:
    """Returns, for each token of each window of the rolled map, the side of the volume that it came from, (windows,
    tokens).

    On an axis that is shifted, the last window holds `window − shift` tokens from the volume's end and `shift` from
    its beginning. Two tokens see each other if their numbers agree.
    """
    ids = torch.zeros(tuple(sizes), dtype=torch.int64, device=device)
    for axis, (size, shift) in enumerate(zip(sizes, shift_size, strict=True)):
        at = torch.arange(size, device=device)
        wrapped = (at >= size - shift).long() if shift else torch.zeros_like(at)
        ids = 2 * ids + wrapped.reshape([-1 if a == axis else 1 for a in range(len(sizes))])
    return partition(ids[None, ..., None], window_size)[0, ..., 0]


def dropout_threshold(dropout_p: float) -> int:
    """Returns the threshold: a value is dropped if its random 32-bit word is below it."""
    return min(int(dropout_p * 2**32), 2**32 - 1)


def kept(seed: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
    """Marks the attention weights (B, windows, heads, tokens, tokens) that survive dropout.

    The word of query i and key j is number j mod 4 of Philox' words with key `seed` and counter
    (⌊j / 4⌋, i, window · heads + head, sample).
    """
    b, windows, heads, n, _ = shape
    j4 = torch.arange((n + 3) // 4, device=seed.device)
    i = torch.arange(n, device=seed.device)[:, None]
    head = torch.arange(windows * heads, device=seed.device).reshape(windows, heads, 1, 1)
    sample = torch.arange(b, device=seed.device).reshape(b, 1, 1, 1, 1)
    words = torch.stack(philox_4x32_10(seed, (j4, i, head, sample)), dim=-1)
    return words.flatten(-2)[..., :n] >= dropout_threshold(dropout_p)


def shifted_window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Computes `medaccel.ops.shifted_window_attention` for checked arguments. bf16 and fp16 are computed in fp32."""
    dtype = qkv.dtype
    compute = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    x = qkv.to(compute)
    heads = bias_table.shape[1]
    sizes = x.shape[1:-1]
    channels = x.shape[-1] // 3
    if x.numel() == 0:
        return (x[..., :channels] + 0 * bias_table.sum()).to(dtype)
    padding = [-size % w for size, w in zip(sizes, window_size, strict=True)]
    padded = [size + p for size, p in zip(sizes, padding, strict=True)]
    if any(padding):
        after = [n for p in reversed(padding) for n in (0, p)]
        inside = F.pad(torch.ones(sizes, dtype=torch.bool, device=x.device), after)[..., None]
        fill = torch.zeros_like(x[0, ..., 0, :][(0,) * (len(sizes) - 1)]) if pad_qkv is None else pad_qkv.to(compute)
        x = torch.where(inside, F.pad(x, [0, 0, *after]), fill)
    axes = list(range(1, len(sizes) + 1))
    if any(shift_size):
        x = torch.roll(x, [-s for s in shift_size], axes)
    windows = partition(x, window_size)  # (B, windows, tokens, 3·C)
    b, count, n, _ = windows.shape
    q, k, v = windows.reshape(b, count, n, 3, heads, channels // heads).permute(3, 0, 1, 4, 2, 5)
    scores = (q * scale) @ k.transpose(-2, -1)  # (B, windows, heads, tokens, tokens)
    bias = bias_table.to(compute)[bias_index.reshape(-1).long()].reshape(n, n, heads).permute(2, 0, 1)
    scores = scores + bias
    if any(shift_size):
        ids = region_ids(padded, window_size, shift_size, x.device)
        apart = ids[:, :, None] != ids[:, None, :]
        scores = scores + (MASKED * apart.to(compute))[:, None]
    weights = scores.softmax(dim=-1)
    if dropout_p > 0:
        assert dropout_seed is not None
        weights = weights * kept(dropout_seed, weights.shape, dropout_p) / (1 - dropout_p)
    attended = (weights @ v).transpose(2, 3).reshape(b, count, n, channels)
    y = unpartition(attended, padded, window_size)
    if any(shift_size):
        y = torch.roll(y, list(shift_size), axes)
    for axis, size in zip(axes, sizes, strict=True):
        y = y.narrow(axis, 0, size)
    return y.contiguous().to(dtype)
