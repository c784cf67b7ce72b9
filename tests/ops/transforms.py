# SPDX-License-Identifier: Apache-2.0
"""torch's transforms and modes, each as a function that runs one case of an op under it and compares.

Each is held to what the kernels give without it: derivatives to finite differences and to plain autograd, vmap to a
loop over samples.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import medaccel
from tests.ops.transform_cases import Case


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def unless_refused(f: Callable[[], Any], error: type[Exception], part: str) -> Any:
    """Returns the result of f; None if it refuses with a sentence that tells the way out."""
    try:
        return f()
    except error as refusal:
        message = str(refusal)
    assert "medaccel.use_reference()" in message
    assert part in message
    return None


def loss(case: Case, *tensors: Tensor) -> Tensor:
    """A scalar that is not linear in the op's result."""
    y = case(*tensors)
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum() + y.square().sum() / 2


def gradients(case: Case, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns gradients by plain autograd, so by the kernels."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(loss(case, *leaves), leaves)


def moved(tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...], step: float) -> tuple[Tensor, ...]:
    return tuple(t + step * d for t, d in zip(tensors, tangents, strict=True))


def differences(f: Callable[..., Any], tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """The derivative of f along the tangents by central differences, good to about 1e-9."""
    step = 1e-5
    ahead, behind = f(*moved(tensors, tangents, step)), f(*moved(tensors, tangents, -step))
    if isinstance(ahead, Tensor):
        return (ahead - behind) / (2 * step)
    return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))


def directions(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Tangents of one tensor alone, for each, and of all together."""
    generator = torch.Generator().manual_seed(9)
    every = tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors)
    alone = [tuple(d if i == j else torch.zeros_like(d) for j, d in enumerate(every)) for i in range(len(every))]
    return [*alone, every] if len(every) > 1 else [every]


# --- forward mode ------------------------------------------------------------------------------------------------
def jvp(case: Case) -> None:
    tensors = case.tensors()
    for tangents in directions(tensors):
        expected = differences(case, tensors, tangents)
        place = [i for i, d in enumerate(tangents) if d.any()]

        def f(*some: Tensor, place: list[int] = place) -> Tensor:  # the others are not wrapped
            return case(*(some[place.index(i)] if i in place else t for i, t in enumerate(tensors)))

        value, derivative = torch.func.jvp(f, tuple(tensors[i] for i in place), tuple(tangents[i] for i in place))
        close(value, case(*tensors))
        close(derivative, expected, 1e-7)
        close(torch.func.jvp(case, tensors, tangents)[1], expected, 1e-7)


def dual_tensors(case: Case, requires_grad: bool = False) -> None:
    tensors = case.tensors()
    for tangents in directions(tensors):
        leaves = [t.clone().requires_grad_(requires_grad) for t in tensors]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) if d.any() else t for t, d in zip(leaves, tangents, strict=True)]
            y, derivative = forward_ad.unpack_dual(case(*duals))
            close(derivative.detach(), differences(case, tensors, tangents), 1e-7)
            close(y.detach(), case(*tensors))
            if requires_grad:
                ours = torch.autograd.grad(y.square().sum(), leaves)
        if requires_grad:
            close(ours, torch.autograd.grad(case(*leaves).square().sum(), leaves))


def dual_tensors_that_require_grad(case: Case) -> None:
    dual_tensors(case, requires_grad=True)


def dual_tensors_without_grad_mode(case: Case) -> None:
    with torch.no_grad():
        dual_tensors(case)


def jvp_of_jvp(case: Case) -> None:
    tensors, tangents = case.tensors(), directions(case.tensors())[-1]

    def along(*primals: Tensor) -> Tensor:
        return torch.func.jvp(lambda *p: loss(case, *p), primals, tangents)[1]

    expected = sum((g * d).sum() for g, d in zip(second_derivative(case, tensors, tangents), tangents, strict=True))
    close(torch.func.jvp(along, tensors, tangents)[1], expected, 1e-6)


def jvp_of_vmap_and_vmap_of_jvp(case: Case) -> None:
    tensors, tangents = case.tensors(), directions(case.tensors())[-1]
    stacked, along = ([torch.stack([t, 0.7 * t]) for t in some] for some in (tensors, tangents))
    expected = torch.stack(
        [
            differences(case, tuple(scale * t for t in tensors), tuple(scale * d for d in tangents))
            for scale in (1, 0.7)
        ]
    )
    close(torch.func.jvp(torch.vmap(case), tuple(stacked), tuple(along))[1], expected, 1e-7)
    close(torch.vmap(lambda *both: torch.func.jvp(case, *both)[1])(tuple(stacked), tuple(along)), expected, 1e-7)


def linearize(case: Case) -> None:
    tensors, tangents = case.tensors(), directions(case.tensors())[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch.fx's about its own constants
        linear = unless_refused(
            lambda: torch.func.linearize(case, *tensors), ValueError, "numbers where the reference"
        )
        if linear is None:
            return
        value, derivative = linear
        close(value, case(*tensors))
        close(derivative(*tangents), differences(case, tensors, tangents), 1e-7)


def second_derivative(case: Case, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The Hessian of `loss` times the tangents, from the kernels' gradients."""
    result: tuple[Tensor, ...] = differences(lambda *t: gradients(case, *t), tensors, tangents)
    return result


# --- reverse mode ------------------------------------------------------------------------------------------------
def grad(case: Case) -> None:
    tensors = case.tensors()
    every = tuple(range(len(tensors)))
    expected = gradients(case, *tensors)
    close(torch.func.grad(lambda *t: loss(case, *t), argnums=every)(*tensors), expected)
    for i in every:
        close(torch.func.grad_and_value(lambda *t: loss(case, *t), argnums=i)(*tensors)[0], expected[i])
    close(torch.func.vjp(lambda *t: loss(case, *t), *tensors)[1](torch.ones((), dtype=torch.float64)), expected)


def grad_by_parameters(case: Case) -> None:
    """functional_call, and tensors outside that require grad too."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = torch.nn.ParameterList([torch.nn.Parameter(t) for t in case.tensors()])

        def forward(self) -> Tensor:
            return loss(case, *self.all)

    module, expected = Module(), gradients(case, *case.tensors())
    first = {"all.0": module.all[0].detach()}
    ours = torch.func.grad(lambda p: torch.func.functional_call(module, p, ()))(first)
    close(ours["all.0"], expected[0])


def jacobians(case: Case) -> None:
    tensors = case.tensors()
    every = tuple(range(len(tensors)))
    tangents = directions(tensors)[-1]
    expected = differences(case, tensors, tangents)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        parts = jacobian(case, argnums=every)(*tensors)
        total = sum(
            torch.tensordot(j, d, d.dim()) if d.dim() else j * d for j, d in zip(parts, tangents, strict=True)
        )
        close(total, expected, 1e-7)


def hessian(case: Case) -> None:
    tensors = case.tensors()
    expected = second_derivative(case, tensors, directions(tensors)[0])[0]
    for h in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        matrix = h(lambda t: loss(case, t, *tensors[1:]))(tensors[0])
        close(torch.tensordot(matrix, directions(tensors)[0][0], tensors[0].dim()), expected, 1e-6)


def jvp_of_grad(case: Case) -> None:
    tensors, tangents = case.tensors(), directions(case.tensors())[-1]
    every = tuple(range(len(tensors)))
    gradient = torch.func.grad(lambda *t: loss(case, *t), argnums=every)
    close(torch.func.jvp(gradient, tensors, tangents)[1], second_derivative(case, tensors, tangents), 1e-6)


def double_backward(case: Case) -> None:
    """Differentiates twice by plain autograd, through the kernels: most of them must refuse in a sentence."""
    tensors, tangents = case.tensors(), directions(case.tensors())[-1]
    leaves = [t.clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(loss(case, *leaves), leaves, create_graph=True)
    total = sum((g * d).sum() for g, d in zip(first, tangents, strict=True))
    ours = unless_refused(lambda: torch.autograd.grad(total, leaves), RuntimeError, "double backward")
    if ours is not None:
        close(ours, second_derivative(case, tensors, tangents), 1e-6)
    with medaccel.use_reference():
        first = torch.autograd.grad(loss(case, *leaves), leaves, create_graph=True)
        total = sum((g * d).sum() for g, d in zip(first, tangents, strict=True))
        ours = torch.autograd.grad(total, leaves)
    close(ours, second_derivative(case, tensors, tangents), 1e-6)


def backward_of_torch_funcs_gradient(case: Case) -> None:
    tensors, tangents = case.tensors(), directions(case.tensors())[-1]
    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    first = torch.func.grad(lambda *t: loss(case, *t), argnums=tuple(range(len(leaves))))(*leaves)
    total = sum((g * d).sum() for g, d in zip(first, tangents, strict=True))
    close(torch.autograd.grad(total, leaves), second_derivative(case, tensors, tangents), 1e-6)


def derivatives_of_a_recorded_backward_pass(case: Case) -> None:
    """The graph was recorded outside: only its backward kernels see the transform."""
    leaves = [t.clone().requires_grad_() for t in case.tensors()]
    y = case(*leaves)

    def backward(g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, g, retain_graph=True)

    g = torch.ones_like(y)
    expected = backward(0.3 * g)  # linear in g
    rows = torch.autograd.grad(y, leaves, torch.stack([g, 0.3 * g]), is_grads_batched=True, retain_graph=True)
    close(tuple(row[1] for row in rows), expected)
    close(tuple(row[1] for row in torch.vmap(backward)(torch.stack([g, 0.3 * g]))), expected)
    for derive in (
        lambda: torch.func.jvp(backward, (g,), (0.3 * g,))[1],
        lambda: dual_backward(backward, g, 0.3 * g),
    ):
        ours = unless_refused(derive, RuntimeError, "the kernel of its gradient has no")
        if ours is not None:
            close(ours, expected)


def dual_backward(backward: Callable[[Tensor], tuple[Tensor, ...]], g: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        results = backward(forward_ad.make_dual(g, d))
        unpacked = [forward_ad.unpack_dual(r).tangent for r in results]
        return tuple(torch.zeros_like(r) if t is None else t for r, t in zip(results, unpacked, strict=True))


def gradcheck(case: Case) -> None:
    """torch's own check, of both modes and batched; of second derivatives by the reference."""
    leaves = [t.requires_grad_() for t in case.tensors()]
    batched = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(case, leaves, check_forward_ad=True, check_batched_forward_grad=True, **batched)
    with medaccel.use_reference():
        assert torch.autograd.gradgradcheck(case, leaves, **batched)


# --- vmap --------------------------------------------------------------------------------------------------------
def vmap(case: Case) -> None:
    tensors = case.tensors()
    scales = (1.0, 0.7, 1.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = torch.stack([case(*(s * t for t in tensors)) for s in scales])
        for dim in (0, -1):
            stacked = [torch.stack([s * t for s in scales], dim=dim) for t in tensors]
            close(torch.vmap(case, in_dims=dim)(*stacked), expected)
        nested = [torch.stack([torch.stack([s * t for s in scales])] * 2) for t in tensors]
        close(torch.vmap(torch.vmap(case))(*nested), torch.stack([expected] * 2))
        for i in range(len(tensors)):
            only = torch.stack([s * tensors[i] for s in scales])
            ours = torch.vmap(case, in_dims=tuple(0 if j == i else None for j in range(len(tensors))))(
                *(only if j == i else t for j, t in enumerate(tensors))
            )
            close(ours, torch.stack([case(*tensors[:i], s * tensors[i], *tensors[i + 1 :]) for s in scales]))


def vmap_over_no_sample(case: Case) -> None:
    tensors = case.tensors()
    if case(*tensors).dim() == 0:
        return  # torch's own division of a mapped scalar fails there
    y = torch.vmap(case, in_dims=(0, *[None] * (len(tensors) - 1)))(tensors[0][None][:0], *tensors[1:])
    assert y.shape == (0, *case(*tensors).shape)


def backward_through_vmap(case: Case) -> None:
    tensors = case.tensors()
    leaves = [torch.stack([t, 0.7 * t]).requires_grad_() for t in tensors]
    total = torch.vmap(lambda *t: loss(case, *t))(*leaves).sum()
    ours = torch.autograd.grad(total, leaves)
    for i, scale in enumerate((1, 0.7)):
        close(tuple(g[i] for g in ours), gradients(case, *(scale * t for t in tensors)))


def gradients_per_sample(case: Case) -> None:
    tensors = case.tensors()
    every = tuple(range(len(tensors)))
    per_sample = torch.vmap(torch.func.grad(lambda *t: loss(case, *t), argnums=every))
    ours = per_sample(*(torch.stack([t, 0.7 * t]) for t in tensors))
    for i, scale in enumerate((1, 0.7)):
        close(tuple(g[i] for g in ours), gradients(case, *(scale * t for t in tensors)))


def autocast_and_half_precision(case: Case) -> None:
    """Whatever serves the call, the result has the same dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = tuple(t.to(dtype) for t in case.tensors())
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                expected = case(*tensors)
                value, derivative = torch.func.jvp(case, tensors, tensors)
                mapped = torch.vmap(case)(*(t[None] for t in tensors))
            assert expected.dtype == value.dtype == derivative.dtype == mapped.dtype
            close(mapped[0], expected, 1e-5 if dtype == torch.float32 and not enabled else 2e-2)
            assert derivative.isfinite().all()


# --- modes -------------------------------------------------------------------------------------------------------
def inference_mode(case: Case) -> None:
    tensors = case.tensors()
    expected = case(*tensors)
    with torch.inference_mode():
        assert torch.equal(case(*tensors), expected)
        inside = case(*case.tensors())
    assert inside.is_inference()
    assert torch.equal(inside, expected)


def deterministic_algorithms(case: Case) -> None:
    tensors = case.tensors()
    expected = gradients(case, *tensors)
    torch.use_deterministic_algorithms(True)
    try:
        again = gradients(case, *tensors)
        torch.func.jvp(case, tensors, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def checkpointing(case: Case) -> None:
    tensors = case.tensors()
    for reentrant in (False, True):
        leaves = [t.clone().requires_grad_() for t in tensors]
        total = checkpoint(lambda *t: loss(case, *t), *leaves, use_reentrant=reentrant)
        close(
            torch.autograd.grad(total, leaves) if not reentrant else backward(total, leaves),
            gradients(case, *tensors),
        )


def backward(total: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    total.backward()
    return tuple(leaf.grad for leaf in leaves)  # type: ignore[misc]


TRANSFORMS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        *(jvp, dual_tensors, dual_tensors_that_require_grad, dual_tensors_without_grad_mode, jvp_of_jvp),
        *(jvp_of_vmap_and_vmap_of_jvp, linearize, grad, grad_by_parameters, jacobians, hessian, jvp_of_grad),
        *(double_backward, gradcheck, backward_of_torch_funcs_gradient, derivatives_of_a_recorded_backward_pass),
        *(vmap, vmap_over_no_sample, backward_through_vmap, gradients_per_sample, autocast_and_half_precision),
        *(inference_mode, deterministic_algorithms, checkpointing),
    )
}
