# SPDX-License-Identifier: Apache-2.0
"""Every op under every transform of torch's: the right result, or a sentence that names medaccel.use_reference()."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import medaccel
from medaccel import ops
from tests.ops.transform_cases import AT, CASES, DIFFERENTIABLE, INDEX, QKV, REGISTERED, ROWS, TABLE, Case, X
from tests.ops.transforms import TRANSFORMS, close, differences, directions, loss, unless_refused


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_a_transform(transform: str, name: str):
    TRANSFORMS[transform](CASES[name])


# --- the dispatcher's views --------------------------------------------------------------------------------------
def _behind(t: Tensor) -> Tensor:
    """The conjugate of a complex tensor's imaginary part is negated lazily: t itself, as a view of another memory."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "negated": lambda t: torch._neg_view(-t),
    "imaginary part of a conjugate": _behind,
    "real part": lambda t: torch.complex(t, torch.full_like(t, torch.nan)).real,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "subclass": torch.nn.Parameter,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("view", VIEWS)
def test_of_a_view_is_that_of_a_dense_copy(view: str, name: str):
    case = CASES[name]
    tensors = case.tensors()
    for i, t in enumerate(tensors):
        if i in case.positive and view == "zero tensor":
            continue  # a temperature or a σ of 0
        viewed = VIEWS[view](t)
        # The zero tensor's clone is one too.
        dense = torch.zeros_like(t) if view == "zero tensor" else viewed.detach().clone().resolve_neg().contiguous()
        others = tensors[:i], tensors[i + 1 :]
        close(case(*others[0], viewed, *others[1]), case(*others[0], dense, *others[1]))
        if view != "zero tensor":
            ours, expected = (gradients_by(case, others, v) for v in (VIEWS[view](t), dense))
            close(ours, expected)


def gradients_by(case: Case, others: tuple[tuple[Tensor, ...], ...], viewed: Tensor) -> Tensor:
    leaf = viewed.detach().requires_grad_()
    return torch.autograd.grad(loss(case, *others[0], leaf, *others[1]), leaf)[0]


@pytest.mark.parametrize("view", [name for name in VIEWS if name != "subclass"])
def test_incoming_gradients_may_be_views(view: str):
    for case in CASES.values():
        leaves = [t.clone().requires_grad_() for t in case.tensors()]
        y = case(*leaves)
        g = VIEWS[view](torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
        dense = torch.zeros_like(y) if view == "zero tensor" else g.clone().resolve_neg().contiguous()
        ours = torch.autograd.grad(y, leaves, g, retain_graph=True)
        close(ours, torch.autograd.grad(y, leaves, dense))


# --- torch.compile -----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.numbers])
def test_compiles_as_one_graph_with_symbols_for_sizes_and_numbers(name: str):
    case = CASES[name]
    compiled = torch.compile(case.call, dynamic=True, fullgraph=True, backend="aot_eager")
    for numbers in (case.numbers, case.others):
        leaves = [t.requires_grad_() for t in case.tensors()]
        y, expected = compiled(*leaves, *numbers), case.call(*leaves, *numbers)
        close(y, expected)
        ours, theirs = (torch.autograd.grad(z.square().sum(), leaves) for z in (y, expected))
        close(ours, theirs)


@pytest.mark.parametrize("name", ["gaussian_filter", "nt_xent_loss", "diffusion_step", "instance_norm_act"])
@pytest.mark.slow
def test_transforms_within_compiled_code(name: str):
    case = CASES[name]
    tensors = case.tensors()
    tangents = directions(tensors)[-1]

    def all_of_them(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.func.jvp(case, tensors, tangents)[1],
            torch.func.grad(lambda *t: loss(case, *t))(*tensors),
            torch.vmap(lambda *t: case(*t))(*(torch.stack([t, 2 * t]) for t in tensors)),  # Dynamo wants a function
        )

    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    close(compiled(*tensors), all_of_them(*tensors))


# --- the registered ops, called past the public functions --------------------------------------------------------
@pytest.mark.parametrize("name", REGISTERED)
def test_a_registered_op_is_right_or_refuses_with_a_sentence(name: str):
    op, arguments = getattr(torch.ops.medaccel, name), REGISTERED[name]
    for i, t in enumerate(arguments):
        if not any(t is d for d in DIFFERENTIABLE):
            continue

        def f(t: Tensor, i: int = i) -> Tensor:
            result = op(*arguments[:i], t, *arguments[i + 1 :])
            return result if isinstance(result, Tensor) else result[0]

        d = torch.randn_like(t)
        refused = "no forward-mode derivative"
        ours = unless_refused(lambda: torch.func.jvp(f, (t,), (d,))[1], RuntimeError, refused)  # noqa: B023
        if ours is not None:
            close(ours, differences(f, (t,), (d,)), 1e-7)
        with pytest.raises(RuntimeError, match=r"torch\.func; run .* under medaccel\.use_reference\(\)"):
            torch.func.grad(lambda t: f(t).sum())(t)
        close(torch.vmap(f)(torch.stack([t, 0.7 * t])), torch.stack([f(t), f(0.7 * t)]))


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name: str):
    leaves = (a.clone().requires_grad_() if any(a is d for d in DIFFERENTIABLE) else a for a in REGISTERED[name])
    torch.library.opcheck(getattr(torch.ops.medaccel, name), tuple(leaves))


# --- what the table leaves out -----------------------------------------------------------------------------------
def step(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return ops.diffusion_step(x, x, a=1.1, b=-0.4, c=0.9, d=0.1, e=0.2, s=0.3, **options)


def test_out_is_written_in_every_mode_and_refused_under_transforms():
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    expected = step(x, seed=3)
    dense, strided, negated = (
        torch.empty_like(x),
        torch.empty(2, 1, 4, 8).double()[..., ::2],
        torch._neg_view(x.clone()),
    )
    for out in (dense, strided, negated):
        assert step(x, seed=3, out=out)[0] is out
        close(out, expected[0])
    with torch.inference_mode():
        close(step(x, seed=3, out=dense)[0], expected[0])
    compiled = torch.compile(lambda x, out: step(x, seed=3, out=out)[0], fullgraph=True, backend="aot_eager")
    close(compiled(x, dense), expected[0])

    refused = "diffusion_step: out is given under vmap, another transform"
    stacked = torch.stack([x, x])
    with pytest.raises(ValueError, match=refused):
        torch.vmap(lambda x: step(x, seed=3, out=torch.empty_like(x))[0])(stacked)
    with pytest.raises(ValueError, match=refused):
        torch.vmap(lambda x: step(x, seed=3, out=dense)[0])(stacked)
    with pytest.raises(ValueError, match=refused):
        torch.func.jvp(lambda x: step(x, seed=3, out=torch.empty(x.shape).double())[0], (x,), (x,))
    with pytest.raises(ValueError, match=refused):
        torch.func.grad(lambda x: step(x, seed=3, out=torch.empty(x.shape).double())[0].sum())(x)
    with forward_ad.dual_level():
        for dual, out in ((forward_ad.make_dual(x, x), dense), (x, forward_ad.make_dual(dense, x))):
            with pytest.raises(ValueError, match=refused):
                step(dual, seed=3, out=out)
        close(step(x, seed=3, out=dense)[0], expected[0])  # nothing of it is differentiated


def test_noise_under_vmap_follows_its_randomness():
    x = torch.zeros(3, 2, 1, 4, 4)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: step(x)[0])(x)
    same = torch.vmap(lambda x: step(x)[0], randomness="same")(x)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    different = torch.vmap(lambda x: step(x)[0], randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    seeds = torch.arange(3)
    close(
        torch.vmap(lambda x, seed: step(x, seed=seed)[0])(x, seeds),
        torch.stack([step(x[0], seed=i)[0] for i in range(3)]),
    )


@pytest.mark.parametrize(
    "options", [{}, {"approx": "scalespace"}, {"approx": "sampled", "normalize": True, "mode": "reflect"}]
)
def test_vmap_over_sigma_gives_each_sample_its_own_reach(options: dict[str, Any]):
    x, sigmas = torch.randn(1, 1, 9, 12, dtype=torch.float64), torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)
    expected = torch.stack([ops.gaussian_filter(x, float(s), **options) for s in sigmas])

    def f(s: Tensor) -> Tensor:
        return ops.gaussian_filter(x, s, **options)

    close(torch.vmap(f)(sigmas), expected)
    with medaccel.use_reference():
        close(torch.vmap(f)(sigmas), expected)
    derivatives = torch.vmap(lambda s: torch.func.jvp(f, (s,), (torch.ones_like(s),))[1])(sigmas)
    close(derivatives[1:], torch.stack([differences(f, (s,), (torch.ones_like(s),)) for s in sigmas[1:]]), 1e-7)
    with pytest.raises(ValueError, match=r"sigma\[\d\] is -0\.7"):
        torch.vmap(lambda s: torch.func.grad(lambda s: f(s).sum())(s))(sigmas * torch.tensor([1, -1, 1]))


def pixel_losses(radius: Any, coords: Tensor = AT) -> Tensor:
    a = ops.pixel_contrastive_loss(ROWS, 2 * ROWS + 1, coords, AT, radius=radius)
    return a + ops.pixel_consistency_loss(ROWS, 2 * ROWS + 1, coords, AT, radius=radius)


def test_radius_and_coordinates_are_mapped_and_have_no_derivative():
    radii = torch.tensor([0.3, 0.6], dtype=torch.float64)
    close(torch.vmap(pixel_losses)(radii), torch.stack([pixel_losses(float(r)) for r in radii]))
    coords = torch.stack([AT, 3 * AT])
    close(torch.vmap(lambda at: pixel_losses(0.5, at))(coords), torch.stack([pixel_losses(0.5, at) for at in coords]))
    with pytest.raises(ValueError, match=r"radius is -0\.6"):
        torch.vmap(pixel_losses)(-radii.flip(0))
    for derive in (
        lambda: torch.func.jvp(pixel_losses, (radii[0],), (radii[0],)),
        lambda: torch.func.grad(pixel_losses)(radii[0]),
    ):
        with pytest.raises(ValueError, match="radius requires grad"):
            derive()
    value, derivative = torch.func.jvp(lambda at: pixel_losses(0.5, at), (AT,), (AT,))
    close(value, pixel_losses(0.5))
    assert not derivative.any()
    assert not torch.func.grad(lambda at: pixel_losses(0.5, at))(AT).any()


def test_a_number_that_a_transform_works_on_is_refused_not_read():
    with pytest.raises(ValueError, match=r"instance_norm_act: eps is under vmap, another transform"):
        torch.func.jvp(lambda e: ops.instance_norm_act(X, eps=e), (torch.tensor(0.1),), (torch.tensor(1.0),))
    with pytest.raises(ValueError, match=r"instance_norm_act: negative_slope is under vmap, another transform"):
        torch.vmap(lambda s: ops.instance_norm_act(X, negative_slope=s))(torch.tensor([0.1, 0.2]))
    with forward_ad.dual_level():
        truncated = forward_ad.make_dual(torch.tensor(3.0), torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"gaussian_filter: truncated is under vmap, another transform"):
            ops.gaussian_filter(X, 1.0, truncated=truncated)
    # Constants within a transform are numbers as ever.
    torch.func.jvp(lambda x: ops.instance_norm_act(x, eps=torch.tensor(0.1)), (X,), (X,))


def test_vmap_over_window_indices_checks_all_of_them():
    def f(index: Tensor) -> Tensor:
        return ops.shifted_window_attention(QKV, TABLE, index, window_size=(2, 2), shift_size=(1, 1))

    both = torch.stack([INDEX, INDEX.flip(0)])
    close(torch.vmap(f)(both), torch.stack([f(i) for i in both]))
    for context in (torch.no_grad(), medaccel.use_reference()):
        with context, pytest.raises(ValueError, match="bias_index has values"):
            torch.vmap(f)(both + 5)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_second_derivatives_are_finite_where_a_power_has_a_corner(power: float):
    x = ROWS[:1]
    h = torch.func.hessian(lambda f: ops.pixel_propagation(f, x, power=power).sum())(x)
    assert h.isfinite().all()
    with_zero = x.clone()
    with_zero[0, 2] = 0
    for f in (ops.nt_xent_loss, ops.info_nce_loss):
        assert torch.func.jacfwd(lambda a: f(a, with_zero[0]))(with_zero[0]).isfinite().all()  # noqa: B023
