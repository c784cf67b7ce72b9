# SPDX-License-Identifier: Apache-2.0
"""One small call of each op, its tensors apart from the rest: what the table of transforms is run over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medaccel import ops

_DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    """`call(*tensors, *numbers)`, differentiable by every tensor; the tensors are made anew, the same each time."""

    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    # Arguments that are Python numbers; torch.compile(dynamic=True) makes symbols of them.
    numbers: tuple[float, ...] = ()
    # Other values of them, whole ones where that is possible.
    others: tuple[float, ...] = ()
    # Tensors that have to be positive, by their place.
    positive: tuple[int, ...] = ()

    def tensors(self, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=generator, dtype=_DOUBLE) for shape in self.shapes]
        return tuple(t.abs() + 0.6 if i in self.positive else t for i, t in enumerate(made))

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors, *self.numbers)


_INDEX = torch.randint(0, 27, (8, 8), generator=torch.Generator().manual_seed(1))
_AT = torch.cartesian_prod(*[torch.arange(3.0, dtype=_DOUBLE)] * 2).repeat(2, 1, 1)
_MASK = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2)) > 0.3
_MAP, _MAPS = (2, 1, 4, 4), (2, 3, 4, 4)
_WINDOWS: dict[str, Any] = {"window_size": (2, 2, 2), "shift_size": (1, 1, 1)}


def _attention(qkv: Tensor, table: Tensor, pad: Tensor, scale: Any) -> Tensor:
    return ops.shifted_window_attention(qkv, table, _INDEX, pad_qkv=pad, scale=scale, **_WINDOWS)


def _attention_with_dropout(qkv: Tensor, table: Tensor, pad: Tensor, scale: Tensor, p: float) -> Tensor:
    dropout = {"dropout_p": p, "dropout_seed": torch.tensor(5)}
    return ops.shifted_window_attention(qkv, table, _INDEX, pad_qkv=pad, scale=scale, **dropout, **_WINDOWS)


def _linear_step(
    x: Tensor, m: Tensor, previous: Tensor, noise: Tensor, guide: Tensor, s: float, offset: int
) -> Tensor:
    return ops.diffusion_step(
        x, m, a=1.1, b=-0.4, c=0.9, d=0.1, e=0.2, f=0.5, s=s, previous=previous, noise=noise, guide=guide, mask=_MASK,
        seed=3, offset=offset,
    )[0]  # fmt: skip


def _clipped_step(x: Tensor, m: Tensor, a: Tensor, s: Tensor, low: float, high: float) -> Tensor:
    x_next, x0 = ops.diffusion_step(x, m, a=a, b=-0.4, c=0.9, d=0.1, e=0.2, s=s, clip=(low, high), seed=3)
    return x_next + 0.5 * x0


def _norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float, slope: float) -> Tensor:
    return ops.instance_norm_act(x, weight, bias, residual=residual, eps=eps, negative_slope=slope)


def _contrast(q: Tensor, k: Tensor, radius: float, temperature: Any) -> Tensor:
    return ops.pixel_contrastive_loss(q, k, _AT, _AT + 0.25, radius=radius, temperature=temperature)


_PIXELS = ((2, 9, 4), (2, 9, 4))
_ROWS = ((5, 4), (5, 4))

CASES = {
    "gaussian_filter": Case(
        lambda x, s, t: ops.gaussian_filter(x, s, truncated=t), ((1, 2, 5, 6),), (1.3, 3.0), (2, 4)
    ),
    "gaussian_filter, learnt sigma": Case(ops.gaussian_filter, ((1, 2, 5, 6), (2,)), positive=(1,)),
    "gaussian_filter, learnt sigma of one axis": Case(
        lambda x, s: ops.gaussian_filter(x, [s, 0.8]), ((1, 2, 5, 6), ()), positive=(1,)
    ),
    "shifted_window_attention": Case(_attention, ((2, 3, 4, 3, 12), (27, 2), (12,)), (0.4,), (1,)),
    "shifted_window_attention, dropout, learnt scale": Case(
        _attention_with_dropout, ((2, 3, 4, 3, 12), (27, 2), (12,), ()), (0.3,), (0,)
    ),
    "pixel_contrastive_loss": Case(_contrast, _PIXELS, (1.4, 0.3), (2, 1)),
    "pixel_contrastive_loss, learnt temperature": Case(
        lambda q, k, t: _contrast(q, k, 1.4, t), (*_PIXELS, ()), positive=(2,)
    ),
    "pixel_propagation": Case(
        lambda f, v, power: ops.pixel_propagation(f, v, power=power), ((2, 9, 4), (2, 9, 3)), (2.5,), (2,)
    ),
    "pixel_consistency_loss": Case(
        lambda q, k, radius: ops.pixel_consistency_loss(q, k, _AT, _AT + 0.25, radius=radius), _PIXELS, (1.4,), (2,)
    ),
    "nt_xent_loss": Case(lambda a, b, t: ops.nt_xent_loss(a, b, temperature=t), _ROWS, (0.5,), (1,)),
    "nt_xent_loss, learnt temperature": Case(
        lambda a, b, t: ops.nt_xent_loss(a, b, temperature=t), (*_ROWS, ()), positive=(2,)
    ),
    "info_nce_loss": Case(lambda a, b, t: ops.info_nce_loss(a, b, temperature=t), _ROWS, (0.2,), (1,)),
    "info_nce_loss, learnt temperature": Case(
        lambda a, b, t: ops.info_nce_loss(a, b, temperature=t), (*_ROWS, ()), positive=(2,)
    ),
    "diffusion_step": Case(_linear_step, (_MAP,) * 5, (0.3, 7), (1, 8)),
    "diffusion_step, clipped, learnt coefficients": Case(
        _clipped_step, (_MAP, _MAP, (2,), (2,)), (-0.9, 0.8), (-1, 2), positive=(3,)
    ),
    "instance_norm_act": Case(_norm, (_MAPS, (3,), (3,), _MAPS), (1e-3, 0.1), (1, 0)),
}


# The registered ops, called past the public functions. The tensors of `DIFFERENTIABLE` are those with a gradient.
X, SIGMA = torch.randn(1, 1, 5, 6, dtype=_DOUBLE), torch.tensor([1.0, 0.7], dtype=_DOUBLE)
ROWS, AT, RADIUS = torch.randn(2, 5, 4, dtype=_DOUBLE), torch.rand(2, 5, 2, dtype=_DOUBLE), torch.tensor([0.5, 0.6])
QKV, TABLE, INDEX = (
    torch.randn(1, 4, 4, 6, dtype=_DOUBLE),
    torch.randn(9, 1, dtype=_DOUBLE),
    torch.randint(0, 9, (4, 4)),
)
DIFFERENTIABLE = (X, SIGMA, ROWS, QKV, TABLE)
_KEY, _COEFFICIENTS = torch.zeros(3, dtype=torch.int64), torch.linspace(0.1, 0.9, 9, dtype=_DOUBLE)[:, None]
_PAIRS = (ROWS, 2 * ROWS + 1, AT, AT, RADIUS.double())

REGISTERED: dict[str, tuple[Any, ...]] = {
    "gaussian_filter": (X, SIGMA, 4.0, "erf", "constant", False),
    "diffusion_step": (X, X, None, X, None, None, _COEFFICIENTS, _KEY, -1.0, 1.0, True),
    "instance_norm_act": (X, None, None, X, 1e-5, 0.1),
    "similarity_lse": (ROWS, ROWS, 0.5, 0),
    "pixel_contrastive_loss": (*_PAIRS, 0.5),
    "pixel_pair_similarity": _PAIRS,
    "pixel_propagation": (ROWS, ROWS, 2.0),
    "shifted_window_attention": (QKV, TABLE, INDEX, None, None, [2, 2], [1, 1], 1.0, 0.0),
}
