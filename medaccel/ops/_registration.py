# SPDX-License-Identifier: Apache-2.0
"""Registers the parts that every op shares: gradients, vmap's rule, and the refusal of unsupported derivatives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from medaccel.ops._transforms import tangent

ForwardMode = Callable[[tuple[Any, ...], tuple[Tensor | None, ...]], Any]


def register_gradients(
    lib: torch.library.Library,
    op: str,
    *,
    of: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    forward_mode: ForwardMode | None = None,
) -> None:
    """Gives an op and its gradient, `op` and `op`_backward in `lib`, their derivatives and their rule for vmap.

    Args:
        lib: the library that defines both.
        op: the op's name, without the namespace.
        of: the public function that it serves, for messages.
        setup_context, backward: the arguments of `torch.library.register_autograd`.
        forward_mode: maps the arguments and their tangents (None if one has none) to the outputs' tangents, or to
            None if the kernel can't compute these.
    """

    advice = f"run medaccel.ops.{of} under medaccel.use_reference(), whose plain PyTorch code has one"

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{of}: its gradient has no gradient (double backward is not written); {advice}")

    def nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    for name, what, rule, setup, forwards in (
        (op, f"{of}: its kernel", backward, setup_context, forward_mode),
        (f"{op}_backward", f"{of}: the kernel of its gradient", refuse, nothing, None),
    ):
        guarded: Any = _Guarded(lib, what, advice, forwards)
        torch.library.register_autograd(f"medaccel::{name}", rule, setup_context=setup, lib=guarded)
        torch.library.register_vmap(f"medaccel::{name}", _sample_by_sample(name), lib=lib)


class _Guarded:
    """Wraps a library so that its autograd kernels refuse cases that torch.library would answer with a zero or an
    internal error.

    torch.library has no rule for forward mode, which then takes an op's result for a constant, and its gradients
    don't support the transforms of torch.func. The public functions take the reference in these cases.
    """

    def __init__(self, lib: torch.library.Library, what: str, advice: str, forward_mode: ForwardMode | None):
        self._lib, self._what, self._advice, self._forward_mode = lib, what, advice, forward_mode

    def impl(self, op: str, kernel: Callable[..., Any], key: str, **options: Any) -> None:
        what, advice, forward_mode = self._what, self._advice, self._forward_mode

        def autograd(keyset: Any, *args: Any) -> Any:
            if forward_ad._current_level >= 0:
                tangents = tuple(tangent(a) for a in args)
                if any(t is not None for t in tangents):
                    primals = tuple(forward_ad.unpack_dual(a).primal if isinstance(a, Tensor) else a for a in args)
                    moved = None if forward_mode is None else forward_mode(primals, tangents)
                    if moved is None:
                        raise RuntimeError(f"{what} has no forward-mode derivative; {advice}")
                    return _dual(autograd(keyset, *primals), moved)
            if torch._C._are_functorch_transforms_active() and torch._C._any_requires_grad(*args):
                raise RuntimeError(f"{what} has no derivative for the transforms of torch.func; {advice}")
            return kernel(keyset, *args)

        self._lib.impl(op, autograd, key, **options)


def _dual(outputs: Any, tangents: Any) -> Any:
    if isinstance(outputs, Tensor):
        return forward_ad.make_dual(outputs, tangents)
    return tuple(forward_ad.make_dual(o, t) for o, t in zip(outputs, tangents, strict=True))


def _sample_by_sample(name: str) -> Callable[..., Any]:
    """Returns vmap's rule: one sample after the other, so that it needs no more memory than one sample."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        op, count = getattr(torch.ops.medaccel, name), info.batch_size

        def on(one: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, ...]:
            results = op(*(one(a, d) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))
            return (results,) if isinstance(results, Tensor) else results

        if count == 0:  # zeros stand for a sample, to learn the results' shapes
            samples = [on(lambda a, d: a.new_zeros(a.shape[:d] + a.shape[d + 1 :]))]
        else:
            samples = [on(lambda a, d: a.select(d, i)) for i in range(count)]  # noqa: B023 (called at once)
        stacked = tuple(_stacked(parts)[:count] for parts in zip(*samples, strict=True))
        return (stacked[0], 0) if len(stacked) == 1 else (stacked, (0,) * len(stacked))

    return rule


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    if parts[0].dtype != torch.float16:
        return torch.stack(parts)
    return torch.stack([part.float() for part in parts]).half()  # autocast on the CPU can't stack fp16
