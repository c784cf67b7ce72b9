# SPDX-License-Identifier: Apache-2.0
"""Tables what is called with fake CUDA tensors: every op on its own cases, and every way to give it a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medaccel import ops
from medaccel.ops._registry import OPS


@dataclass(frozen=True)
class Call:
    """One call, `run(tensors)`, for tensors of either device in any nest of lists, tuples and dicts."""

    name: str
    tensors: Any
    run: Callable[[Any], Any]

    def __str__(self) -> str:
        return self.name


def _step(case: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Any], Any]]:
    return {**case.tensors(dtype), **case.options()}, lambda t: ops.diffusion_step(**t)


def _gaussian(case: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Any], Any]]:
    return case.input(dtype), lambda x: ops.gaussian_filter(x, case.sigma, **case.options)


def _nt_xent(case: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Any], Any]]:
    return case.tensors(dtype), lambda t: ops.nt_xent_loss(*t, temperature=case.temperature)


def _info_nce(case: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Any], Any]]:
    return case.tensors(dtype), lambda t: ops.info_nce_loss(*t, temperature=case.temperature)


def _norm(case: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Any], Any]]:
    def run(t: Any) -> Tensor:
        x, weight, bias, residual = t
        return ops.instance_norm_act(x, weight, bias, residual=residual, negative_slope=case.slope)

    return case.tensors(dtype)[:4], run


def _consistency(case: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Any], Any]]:
    return case.tensors(dtype), lambda t: ops.pixel_consistency_loss(*t[:4], radius=t[4])


def _contrast(case: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Any], Any]]:
    def run(t: Any) -> Any:
        return ops.pixel_contrastive_loss(*t[:4], radius=t[4], temperature=case.temperature, return_valid=True)

    return case.tensors(dtype), run


def _propagation(case: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Any], Any]]:
    return case.tensors(dtype)[:2], lambda t: ops.pixel_propagation(*t, power=case.power)


def _attention(case: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Any], Any]]:
    def run(t: Any) -> Tensor:
        (qkv, table, index, pad), options = t
        return ops.shifted_window_attention(qkv, table, index, pad_qkv=pad, **options)

    return (case.tensors(dtype), case.options()), run


# How a case of an op's cases.py is called.
CALLERS: dict[str, Callable[[Any, torch.dtype], tuple[Any, Callable[[Any], Any]]]] = {
    "diffusion_step": _step,
    "gaussian_filter": _gaussian,
    "info_nce_loss": _info_nce,
    "instance_norm_act": _norm,
    "nt_xent_loss": _nt_xent,
    "pixel_consistency_loss": _consistency,
    "pixel_contrastive_loss": _contrast,
    "pixel_propagation": _propagation,
    "shifted_window_attention": _attention,
}


def calls_of(op: str, dtype: torch.dtype) -> Iterator[Call]:
    """Yields the calls of an op, one a case of its registry's cases."""
    for case in OPS[op].load("cases").CASES:
        yield Call(str(case), *CALLERS[op](case, dtype))


# --- numbers, given in every way ---------------------------------------------------------------------------------
_X, _ROWS, _PIXELS = torch.ones(2, 1, 4, 5, 6), torch.ones(5, 4), torch.ones(2, 9, 4)
_AT = torch.rand(2, 9, 2)
_NUMBERS = {"a": 1.1, "b": -0.4, "c": 0.9, "d": 0.1, "e": 0.2, "s": 0.3}
_ONE, _EACH = torch.tensor(0.7), torch.tensor([0.7, 0.8])


def _diffusion(more: dict[str, Any], **tensors: Any) -> tuple[Any, Callable[[Any], Any]]:
    given = {"sample": _X, "model_output": _X, **_NUMBERS, **tensors}
    return given, lambda t: ops.diffusion_step(**{**t, **more})


def _contrasted(**options: Any) -> tuple[Any, Callable[[Any], Any]]:
    given = {"query": _PIXELS, "key": _PIXELS, "query_coords": _AT, "key_coords": _AT, **options}
    return given, lambda t: ops.pixel_contrastive_loss(**t)


def _table(scale: Any) -> tuple[Any, Callable[[Any], Any]]:
    given = (torch.ones(1, 4, 4, 6), torch.ones(9, 1), torch.zeros(4, 4, dtype=torch.int64), scale)
    settings: dict[str, Any] = {"window_size": (2, 2), "shift_size": (1, 1)}
    return given, lambda t: ops.shifted_window_attention(*t[:3], scale=t[3], **settings)


def _in_place(t: Any) -> Any:
    with torch.no_grad():
        return ops.diffusion_step(t, t, out=(t, None), seed=3, **_NUMBERS)[0]


WAYS = {
    "step, drawn seed": _diffusion({}),
    "step, seed on the GPU": _diffusion({"offset": 7, "sample_offset": 1}, seed=torch.tensor(3)),
    "step, each coefficient on the GPU": _diffusion({}, **{k: torch.tensor(v) for k, v in _NUMBERS.items()}),
    "step, one coefficient on the GPU": _diffusion({"seed": 3}, a=_ONE),
    "step, one per sample on the GPU": _diffusion({"seed": 3}, a=_EACH, c=_EACH),
    "step, one coefficient on the host": _diffusion({"seed": 3, "s": torch.tensor(0.3)}),
    "step, one per sample on the host": _diffusion({"seed": 3, "s": torch.tensor([0.3, 0.4])}),
    "step, per sample, host and GPU": _diffusion({"seed": 3, "s": torch.tensor([0.3, 0.4])}, a=_EACH),
    "step, seed and coefficient on the GPU": _diffusion({}, seed=torch.tensor(3), a=_ONE),
    "step, guided": _diffusion({"clip": (-1.0, 1.0)}, mask=torch.ones(2, 1, 4, 5, 6), guide=_X),
    "step, learnt coefficient": _diffusion({"seed": 3}, a=torch.tensor(0.7, requires_grad=True)),
    "step, gradients of all tensors": _diffusion(
        {}, previous=_X.clone().requires_grad_(), noise=_X.clone().requires_grad_(), f=0.5,
        mask=torch.ones(1, 1, 4, 5, 6), guide=_X.clone().requires_grad_(),
    ),
    "step, gradients, coefficients per sample on the host": _diffusion(
        {"f": torch.tensor([0.5, 0.6])}, previous=_X.clone().requires_grad_(), noise=_X.clone().requires_grad_()
    ),
    "step in place": (_X, _in_place),
    "filter, sigma on the GPU": ((_X, torch.tensor([1.0, 0.7, 0.5])), lambda t: ops.gaussian_filter(*t)),
    "filter, one sigma on the GPU": ((_X, torch.tensor(1.0)), lambda t: ops.gaussian_filter(*t)),
    "filter, some sigmas on the GPU": ((_X, [1.0, torch.tensor(0.7), 0.0]), lambda t: ops.gaussian_filter(*t)),
    "filter, sigma on the host": (_X, lambda x: ops.gaussian_filter(x, torch.tensor([1.0, 0.7, 0.5]))),
    "filter, learnt sigma": (
        (_X, torch.tensor([1.0, 0.7, 0.5], requires_grad=True)), lambda t: ops.gaussian_filter(*t, mode="reflect")
    ),
    "attention, scale on the GPU": _table(_ONE),
    "attention, learnt scale": _table(torch.tensor(0.7, requires_grad=True)),
    "contrast, radius a number": _contrasted(radius=1.0),
    "contrast, radius an array": _contrasted(radius=_EACH.numpy()),
    "contrast, one radius on the GPU": _contrasted(radius=_ONE),
    "contrast, temperature on the GPU": _contrasted(radius=1.0, temperature=_ONE),
    "contrast, learnt temperature": _contrasted(radius=1.0, temperature=torch.tensor(0.7, requires_grad=True)),
    "consistency, radius an array": (
        (_PIXELS, _PIXELS, _AT, _AT), lambda t: ops.pixel_consistency_loss(*t, radius=_EACH.numpy())
    ),
    "NT-Xent, temperature on the GPU": (
        (_ROWS, _ROWS, _ONE), lambda t: ops.nt_xent_loss(*t[:2], temperature=t[2])
    ),
    "InfoNCE, learnt temperature": (
        (_ROWS, _ROWS, torch.tensor(0.7, requires_grad=True)), lambda t: ops.info_nce_loss(*t[:2], temperature=t[2])
    ),
    "propagation, learnt power": (
        (_PIXELS, _PIXELS, torch.tensor(2.0, requires_grad=True)), lambda t: ops.pixel_propagation(*t[:2], power=t[2])
    ),
}  # fmt: skip
