# SPDX-License-Identifier: Apache-2.0
"""Tests the pixel-level contrastive loss: every implementation against the fp64 reference, gradients, properties."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import pixel_contrastive_loss
from medaccel.ops.pixel_contrast.cases import CASES, Views, named
from tests.ops.checks import EMULATED, IMPLEMENTATIONS, assert_twice_as_good, implementation, poisoned_memory

OP = torch.ops.medaccel.pixel_contrastive_loss.default
CPU = [name for name in IMPLEMENTATIONS if name not in EMULATED]  # the GPU's kernel has a suite of its own
FLOOR = {torch.float64: 1e-13, torch.float32: 3e-7}


def run(case: Views, tensors: tuple[Tensor, ...], reduction: str = "none") -> tuple[Tensor, Tensor]:
    """The loss and which pixels have a positive."""
    *features_and_coords, radius = tensors
    return pixel_contrastive_loss(
        *features_and_coords, radius=radius, temperature=case.temperature, reduction=reduction, return_valid=True
    )


def with_gradients(case: Views, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The loss by pixel, which have a positive, and the gradients to query and key."""
    query, key, *others = tensors
    wanted = (query.detach().requires_grad_(), key.detach().requires_grad_())
    loss, valid = run(case, (*wanted, *others))
    weights = torch.linspace(-0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), valid, *torch.autograd.grad(loss, wanted, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_match_the_fp64_reference(case: Views, name: str, dtype: torch.dtype):
    tensors = case.tensors(dtype)
    with use_reference():
        truth = with_gradients(case, (*(t.double() for t in tensors[:2]), *tensors[2:]))
        plain = with_gradients(case, tensors)
    with implementation(name), poisoned_memory():
        ours = with_gradients(case, tensors)
    assert torch.equal(ours[1], truth[1])
    # A gradient is a difference of two weighted means of unit vectors over temperature and length.
    scale = 1.0 if truth[2].numel() == 0 else float((1 / tensors[0].norm(dim=-1)).max()) / case.temperature
    for i, size in ((0, 1.0 / min(1.0, case.temperature)), (2, scale), (3, scale)):
        assert ours[i].dtype == dtype
        assert_twice_as_good(ours[i], plain[i], truth[i], FLOOR[dtype], size)


@pytest.mark.parametrize("coords", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CPU)
def test_distances_are_compared_in_the_coordinates_dtype(name: str, coords: torch.dtype):
    """Two pixels closer than the radius by less than fp32 resolves."""
    features = torch.ones(1, 2, 3)
    at = torch.tensor([[[0.0], [1.0 - 2.0**-30]]], dtype=torch.float64).to(coords)
    with implementation(name):
        loss = pixel_contrastive_loss(features, features, at, at, radius=1.0)
    assert float(loss) == pytest.approx(0.0 if coords == torch.float64 else math.log(2.0), abs=1e-6)


# --- cases that can be computed by hand ----------------------------------------------------------------------
@pytest.mark.parametrize("name", CPU)
def test_two_pixels_by_hand(name: str):
    """Cosines 0.6 and 0.8 with the two keys, of which the first is the positive."""
    query = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    key = torch.tensor([[[5.0, 0.0], [0.0, 0.1]]], dtype=torch.float64)
    at = torch.tensor([[[0.0]]]), torch.tensor([[[0.5], [2.0]]])
    with implementation(name):
        loss = pixel_contrastive_loss(query, key, *at, radius=1.0, temperature=0.5)
    expected = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(1.6)))
    assert float(loss) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", CPU)
def test_no_positive_gives_zero_zero_gradients_and_a_flag(name: str):
    case = named("no_overlap")
    query, key, *others = case.tensors()
    query.requires_grad_(), key.requires_grad_()
    with implementation(name):
        loss, valid = run(case, (query, key, *others), "mean")
    gradients = torch.autograd.grad(loss, (query, key))
    assert loss == 0
    assert not valid.any()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("name", CPU)
def test_identical_vectors_give_the_logarithm_of_the_share_of_positives(name: str):
    features = torch.ones(1, 5, 4)
    at = torch.arange(5.0).reshape(1, 5, 1)
    with implementation(name):
        loss = pixel_contrastive_loss(features, features, at, at, radius=1.5, temperature=0.1, reduction="none")
    share = torch.tensor([[2.0, 3.0, 3.0, 3.0, 2.0]]) / 5
    torch.testing.assert_close(loss, -share.log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CPU)
def test_one_pixel_is_its_own_positive_and_costs_nothing(name: str):
    one = torch.randn(1, 1, 8)
    with implementation(name):
        loss = pixel_contrastive_loss(one, -one, torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), radius=0.1)
    assert 0 <= float(loss) < 1e-6


# --- properties ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CPU)
def test_pixels_without_a_positive_are_left_out(name: str, reduction: str):
    case = named("half_overlap")
    tensors = case.tensors(torch.float64)
    with implementation(name):
        each, valid = run(case, tensors)
        reduced, _ = run(case, tensors, reduction)
    assert 0 < valid.sum() < valid.numel()
    assert (each[~valid] == 0).all()
    expected = each[valid].mean() if reduction == "mean" else each[valid].sum()
    torch.testing.assert_close(reduced, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", CPU)
def test_the_length_of_features_does_not_matter(name: str):
    case = named("volume")
    query, key, *others = case.tensors(torch.float64)
    with implementation(name):
        loss, _ = run(case, (query, key, *others))
        scaled, _ = run(case, (query * 1e3, key * torch.rand(2, key.shape[1], 1, dtype=torch.float64), *others))
    torch.testing.assert_close(scaled, loss, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CPU)
def test_the_order_of_the_keys_does_not_matter(name: str):
    """Shuffled, no block of keys fills a small box."""
    case = named("volume")
    query, key, at_query, at_key, radius = case.tensors(torch.float64)
    order = torch.randperm(key.shape[1])
    with implementation(name):
        loss, valid = run(case, (query, key, at_query, at_key, radius))
        shuffled, still = run(case, (query, key[:, order], at_query, at_key[:, order], radius))
    assert torch.equal(valid, still)
    torch.testing.assert_close(shuffled, loss, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CPU)
def test_samples_are_independent(name: str):
    case = named("finer_view")
    tensors = case.tensors()
    with implementation(name):
        together = with_gradients(case, tensors)
        alone = with_gradients(case, tuple(t[:1] for t in tensors))
    assert torch.equal(together[0][:1], alone[0])


@pytest.mark.parametrize("name", CPU)
def test_a_zero_vector_has_cosine_zero_and_no_gradient(name: str):
    case = named("volume")
    query, key, *others = case.tensors(torch.float64)
    query[0, 5], key[1, 7] = 0, 0
    with use_reference():
        truth = with_gradients(case, (query, key, *others))
    with implementation(name):
        ours = with_gradients(case, (query, key, *others))
    for a, b in zip(ours[::2], truth[::2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert (ours[2][0, 5] == 0).all()
    assert (ours[3][1, 7] == 0).all()


@pytest.mark.parametrize("name", CPU)
def test_a_nan_reaches_the_loss_of_the_pixels_that_meet_it(name: str):
    case = named("half_overlap")
    query, key, *others = case.tensors()
    key[1, 3] = torch.nan
    with implementation(name):
        loss, valid = run(case, (query, key, *others))
        mean, _ = run(case, (query, key, *others), "mean")
    assert not loss[0].isnan().any()
    assert torch.equal(loss[1].isnan(), valid[1])
    assert mean.isnan()


@pytest.mark.parametrize("name", CPU)
def test_a_coordinate_that_is_nan_is_near_to_nothing(name: str):
    case = named("volume")
    query, key, at_query, at_key, radius = case.tensors()
    at_query = at_query.clone()
    at_query[0, 17, 1] = torch.nan
    with implementation(name):
        loss, valid = run(case, (query, key, at_query, at_key, radius))
    assert not valid[0, 17]
    assert valid.sum() == valid.numel() - 1
    assert loss.isfinite().all()


@pytest.mark.parametrize("temperature", [0.01, 0.001])
@pytest.mark.parametrize("name", CPU)
def test_small_temperatures_stay_finite_in_half_precision(name: str, temperature: float):
    query, key, *others = named("volume").tensors(torch.float16)
    case = Views("", (6, 7, 8), 64, temperature=temperature)
    with implementation(name):
        loss, _, *gradients = with_gradients(case, (query, key, *others))
    with use_reference():
        truth = with_gradients(case, (query.double(), key.double(), *others))
    assert loss.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.float16] * 2
    assert all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CPU[1:])
def test_the_number_of_threads_changes_no_bit(name: str):
    case = named("several_chunks")
    tensors = case.tensors()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with implementation(name):
                results.append(with_gradients(case, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    channels=st.integers(1, 40),
    axes=st.integers(1, 3),
    radius=st.sampled_from([0.01, 0.2, 1.0]),
    temperature=st.sampled_from([0.02, 0.3, 5.0]),
)
def test_random_shapes_match_the_reference(pixels, channels: int, axes: int, radius: float, temperature: float):
    case = Views("", (), channels, temperature=temperature)
    n, m = pixels
    tensors = (
        *(torch.randn(2, count, channels, dtype=torch.float64) for count in pixels),
        *(torch.rand(2, count, axes) for count in (n, m)),
        torch.tensor([radius, 2 * radius]),
    )
    with use_reference():
        truth = with_gradients(case, tensors)
    for a, b in zip(with_gradients(case, tensors), truth, strict=True):
        # The shortest of so many random vectors multiplies its gradient.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# --- torch's machinery ---------------------------------------------------------------------------------------
def test_gradients_pass_gradcheck():
    case = Views("", (3, 4), 5)
    query, key, *others = case.tensors(torch.float64)
    wanted = (query.requires_grad_(), key.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: run(case, (q, k, *others), "mean")[0], wanted)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["volume", "image", "empty_batch", "no_keys", "sliced", "half_overlap"])
def test_registration_passes_opcheck(name: str, requires_grad: bool):
    case = named(name)
    query, key, *others = case.tensors()
    if requires_grad:
        query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    torch.library.opcheck(OP, (query, key, *others, 0.3))


@pytest.mark.parametrize("wanted", [("query",), ("key",)], ids=str)
@pytest.mark.parametrize("name", CPU)
def test_only_the_wanted_gradients_are_computed(name: str, wanted: tuple[str, ...]):
    case = named("finer_view")
    query, key, *others = case.tensors()
    with implementation(name):
        _, _, *everything = with_gradients(case, case.tensors())
        tensors = {"query": query, "key": key}
        for argument in wanted:
            tensors[argument].requires_grad_()
        loss, _ = run(case, (query, key, *others))
        loss.backward(torch.linspace(-0.5, 2.0, loss.numel()).reshape(loss.shape))
    for (argument, tensor), expected in zip(tensors.items(), everything, strict=True):
        assert (tensor.grad is not None) == (argument in wanted)
        if argument in wanted:
            torch.testing.assert_close(tensor.grad, expected)


def test_only_linear_memory_is_kept_for_backward():
    case = named("volume")
    query, key, *others = case.tensors()
    kept = 0

    def count(t: Tensor) -> Tensor:
        nonlocal kept
        kept += t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        loss = OP(query.requires_grad_(), key, *others, 0.3)[0]
    assert kept == sum(t.numel() for t in (query, key, *others)) + 2 * loss.numel()


def test_double_backward_raises_a_sentence():
    case = named("image")
    query, *others = case.tensors()
    query.requires_grad_()
    (g,) = torch.autograd.grad(run(case, (query, *others), "mean")[0], query, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str):
    case = named("finer_view")
    query, key, *others = case.tensors()
    wanted = (query.requires_grad_(), key.requires_grad_())
    call = lambda q, k: run(case, (q * 2, k, *others), "mean")[0].square()  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    ours = torch.autograd.grad(compiled(*wanted), wanted)
    for a, b in zip(ours, torch.autograd.grad(call(*wanted), wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("forced", [False, True], ids=["native", "reference"])
def test_autocast_changes_nothing(forced: bool):
    case = named("volume")
    tensors = case.tensors()
    with use_reference() if forced else contextlib.nullcontext():
        expected, _ = run(case, tensors)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = run(case, tensors)
    assert torch.equal(loss, expected)


def test_features_of_two_dtypes_are_computed_in_the_finer():
    case = named("volume")
    query, key, *others = case.tensors(torch.bfloat16)
    loss, _ = run(case, (query, key.double(), *others))
    exact, _ = run(case, (query.double(), key.double(), *others))
    assert torch.equal(loss, exact)


def test_zero_stride_gradient_is_taken():
    case = named("volume")
    query, *others = case.tensors()
    query.requires_grad_()
    loss, _ = run(case, (query, *others))
    (ours,) = torch.autograd.grad(loss, query, torch.ones(()).expand(loss.shape))
    (expected,) = torch.autograd.grad(run(case, (query, *others))[0], query, torch.ones(loss.shape))
    assert torch.equal(ours, expected)


def test_a_device_without_kernel_is_served_by_the_reference():
    tensors = tuple(t.to("meta") for t in named("volume").tensors())
    with torch.autocast("cpu", torch.bfloat16):
        loss, valid = run(named("volume"), tensors)
    assert loss.device.type == valid.device.type == "meta"
