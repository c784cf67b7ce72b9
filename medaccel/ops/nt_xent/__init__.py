# SPDX-License-Identifier: Apache-2.0
"""Contrasts whole images or volumes: NT-Xent (SimCLR) and InfoNCE, streamed, also across processes."""

import math
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch
from medaccel.ops._arguments import check_floating, check_temperature, describe, flag
from medaccel.ops._views import check_devices
from medaccel.ops.nt_xent import op, reference
from medaccel.ops.nt_xent.gather import gather
from medaccel.ops.pixel_contrast.reference import unit
from medaccel.ops.pixel_contrast.temperature import carry_temperature


def unsupported(z1: Tensor) -> str | None:
    """Says in a sentence why no kernel serves `z1`; returns None if one does."""
    if z1.device.type == "cpu":
        return _native.cpu_problem
    return f"nt_xent_loss has no kernel for device {z1.device.type!r}"


def nt_xent_loss(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor = 0.5, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Computes SimCLR's loss: each embedding against all others, its other view being the positive.

    With z = [z1; z2] (2N of them), the loss is the mean over i of log Σ_{k≠i} exp(cos(z_i, z_k)/τ) − cos(z_i,
    z_j(i))/τ, where j(i) is the other view of i. As a log-sum-exp it is finite for small τ, and for fp16, which is
    computed in fp32. No 2N × 2N tensor is made.

    Args:
        z1, z2: (N, C) each: row i of both comes from the same image. Normalised inside, at any scale (the gradient by
            a row of scale 1e-38 may be infinite); a zero vector has cosine 0 with everything and gets no gradient.
        temperature: a number above 0. (0.5 is MONAI's and lightly's, the official code has 0.1.) A tensor of one
            element may require grad and gets one (a learnt temperature); its memory stays linear.
        group: contrast with the embeddings of all its processes, which must have N rows each. The result is the mean
            over this process' anchors, and gradients flow to the other processes' embeddings: averaged over
            processes, as DDP does, loss and gradients are those of one process with the whole batch.

    Returns:
        A scalar, in fp32 (fp64 for fp64 embeddings); 0 for N = 0. One pair alone has loss 0: it has no negatives.

    Raises:
        TypeError: a dtype makes no sense.
        ValueError: a shape, temperature or device makes no sense.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020.

    >>> import torch, medaccel
    >>> medaccel.ops.nt_xent_loss(torch.randn(8, 32), torch.randn(8, 32)).shape
    torch.Size([])
    """
    tau = _check("nt_xent_loss", temperature, group, z1=z1, z2=z2)
    both = unit(torch.cat(_widened(z1, z2)))
    keys, first = both, 0
    if group is not None:
        keys = gather("nt_xent_loss", both, group)
        first = len(both) * dist.get_rank(group)
    lse = _similarity_lse(both, keys, tau, first)
    # A pair's two anchors have the same positive.
    return (lse.sum() - 2 * _paired(both[: len(z1)], both[len(z1) :], tau).sum()) / max(1, len(both))


@overload
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    group: dist.ProcessGroup | None = ...,
    return_bound: Literal[False] = ...,
) -> Tensor: ...


@overload
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    group: dist.ProcessGroup | None = ...,
    return_bound: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    group: dist.ProcessGroup | None = None,
    return_bound: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes InfoNCE in one direction: each query against all keys, the key of the same row being the positive.

    The loss is the mean over i of log Σ_k exp(cos(q_i, k_k)/τ) − cos(q_i, k_i)/τ.

    Args:
        query, key: (N, C) each. Normalised inside.
        temperature: see `nt_xent_loss`.
        group: contrast with the keys of all its processes; see `nt_xent_loss`.
        return_bound: also return log N − loss, N being the number of all keys, without gradient: a lower bound on the
            mutual information of queries and keys, in nats. It can't exceed log N.

    Returns:
        a scalar, in fp32 (fp64 for fp64 embeddings); 0 where N = 0.

    Raises:
        TypeError, ValueError: `nt_xent_loss` would refuse the arguments.

    Source: van den Oord et al., "Representation learning with contrastive predictive coding", 2018, eq. 4 and 5.

    >>> import torch, medaccel
    >>> x = torch.eye(16)
    >>> loss, bound = medaccel.ops.info_nce_loss(x, x, temperature=0.05, return_bound=True)
    >>> round(float(bound), 3)  # log 16: each key tells its query
    2.773
    """
    return_bound = flag("info_nce_loss", "return_bound", return_bound)
    tau = _check("info_nce_loss", temperature, group, query=query, key=key)
    query, key = map(unit, _widened(query, key))
    keys = key if group is None else gather("info_nce_loss", key, group)
    loss = (_similarity_lse(query, keys, tau, -1) - _paired(query, key, tau)).sum() / max(1, len(query))
    return (loss, math.log(max(1, len(keys))) - loss.detach()) if return_bound else loss


def _widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Converts both to the dtype of the arithmetic, so that the parts of their gradients are added up in it, too."""
    dtype = op.compute_dtype(a, b)
    return a.to(dtype), b.to(dtype)


def _similarity_lse(query: Tensor, key: Tensor, temperature: float | Tensor, self_offset: int) -> Tensor:
    """Returns the log-sum-exps (N,), by the kernel or by the reference."""
    if _dispatch.kernel_serves(query, key, temperature) and unsupported(query) is None:
        if isinstance(temperature, Tensor):
            query, key, temperature = carry_temperature(query, key, temperature)
        lse: Tensor = torch.ops.medaccel.similarity_lse(query[None], key[None], temperature, self_offset)[0]
    else:
        dtype = op.compute_dtype(query, key)
        lse = reference.similarity_lse(query[None].to(dtype), key[None].to(dtype), temperature, self_offset)
    return lse[0]


def _paired(a: Tensor, b: Tensor, temperature: float | Tensor) -> Tensor:
    """Returns the cosines of the unit vectors a with those of b, over temperature, (N,)."""
    return (a * b).sum(dim=-1) / temperature


def _check(
    name: str, temperature: float | Tensor, group: dist.ProcessGroup | None, **embeddings: Tensor
) -> float | Tensor:
    """Returns the temperature as `check_temperature` gives it, or raises an error in a sentence."""
    (first, a), (second, b) = embeddings.items()
    check_floating(name, **embeddings)
    if a.dim() != 2 or a.shape[1] == 0:
        raise ValueError(f"{name}: {first} has shape {tuple(a.shape)}; expected (N, C) with C >= 1")
    if b.shape != a.shape:
        raise ValueError(
            f"{name}: {second} has shape {tuple(b.shape)}; expected {tuple(a.shape)}, the shape of {first}"
        )
    check_devices(name, first, **embeddings)
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"{name}: group is {describe(group)}; expected a torch.distributed.ProcessGroup or None")
    return check_temperature(name, temperature)
