# SPDX-License-Identifier: Apache-2.0
"""Tests PixPro's loss: every CPU implementation against the fp64 reference, by hand, its gradients, its
properties."""

import contextlib

import pytest
import torch
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import pixel_consistency_loss
from medaccel.ops.pixel_consistency.cases import CASES, Views, named
from tests.ops.checks import EMULATED, IMPLEMENTATIONS, assert_twice_as_good, implementation, poisoned_memory

OP = torch.ops.medaccel.pixel_pair_similarity.default
CPU = [name for name in IMPLEMENTATIONS if name not in EMULATED]
FLOOR = {torch.float64: 1e-14, torch.float32: 2e-7}


def with_gradients(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    query, key, at_query, at_key, radius = tensors
    wanted = (query.detach().requires_grad_(), key.detach().requires_grad_())
    loss = pixel_consistency_loss(*wanted, at_query, at_key, radius=radius)
    return loss.detach(), *torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_match_the_fp64_reference(case: Views, name: str, dtype: torch.dtype):
    tensors = case.tensors(dtype)
    with use_reference():
        truth = with_gradients((*(t.double() for t in tensors[:2]), *tensors[2:]))
        plain = with_gradients(tensors)
    with implementation(name), poisoned_memory():
        ours = with_gradients(tensors)
    shortest = 1.0 if tensors[0].numel() == 0 else float(min(t.norm(dim=-1).min() for t in tensors[:2] if t.numel()))
    for actual, same, exact, scale in zip(ours, plain, truth, (1.0, 1 / shortest, 1 / shortest), strict=True):
        assert actual.dtype == dtype
        assert_twice_as_good(actual, same, exact, FLOOR[dtype], scale)


@pytest.mark.parametrize("name", CPU)
def test_pairs_by_hand(name: str):
    """Two pairs with cosines 1 and 0.6 in the first sample, one with −1 in the second: −(0.8 − 1) / 2."""
    query = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]], dtype=torch.float64)
    key = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0], [1.0, 0.0]]]).double()
    at_key = torch.tensor([[[0.5], [-0.5], [9.0]], [[0.0], [9.0], [-9.0]]])
    with implementation(name):
        loss = pixel_consistency_loss(query, key, torch.zeros(2, 1, 1), at_key, radius=1.0)
    assert float(loss) == pytest.approx(0.1, abs=1e-15)


@pytest.mark.parametrize("name", CPU)
def test_no_pair_gives_zero_and_zero_gradients(name: str):
    with implementation(name):
        loss, *gradients = with_gradients(named("no_overlap").tensors())
    assert loss == 0
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("name", CPU)
def test_the_loss_is_symmetric_in_the_views(name: str):
    query, key, at_query, at_key, radius = named("finer_view").tensors(torch.float64)
    with implementation(name):
        loss = pixel_consistency_loss(query, key, at_query, at_key, radius=radius)
        other = pixel_consistency_loss(key, query, at_key, at_query, radius=radius)
    torch.testing.assert_close(loss, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", CPU)
def test_zero_vectors_have_cosine_zero_and_a_nan_shows(name: str):
    query, key, *others = named("volume").tensors(torch.float64)
    query[0, 3] = 0
    with use_reference():
        truth = with_gradients((query, key, *others))
    with implementation(name):
        ours = with_gradients((query, key, *others))
        key[0, 5] = torch.nan
        assert with_gradients((query, key, *others))[0].isnan()
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert not ours[1][0, 3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype):
    query, key, *others = named("volume").tensors(dtype)
    loss, *gradients = with_gradients((query, key, *others))
    exact, *_ = with_gradients((query.float(), key.float(), *others))
    assert torch.equal(loss, exact)
    assert all(g.dtype == dtype for g in gradients)


def test_the_number_of_threads_changes_no_bit():
    tensors, threads, results = named("several_chunks").tensors(), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_pass_gradcheck():
    query, key, at_query, at_key, radius = Views("", (3, 4), 5).tensors(torch.float64)
    wanted = (query.requires_grad_(), key.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, k: pixel_consistency_loss(q, k, at_query, at_key, radius=radius), wanted
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["volume", "empty_batch", "sliced"])
def test_registration_passes_opcheck(name: str, requires_grad: bool):
    query, key, *others = named(name).tensors()
    if requires_grad:
        query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    torch.library.opcheck(OP, (query, key, *others))


def test_compiles_as_one_graph():
    query, key, at_query, at_key, radius = named("volume").tensors()
    call = lambda q: pixel_consistency_loss(q * 2, key, at_query, at_key, radius=radius)  # noqa: E731
    (ours,) = torch.autograd.grad(torch.compile(call, fullgraph=True)(query.requires_grad_()), query)
    torch.testing.assert_close(ours, torch.autograd.grad(call(query), query)[0])


def test_autocast_changes_nothing_and_double_backward_raises_a_sentence():
    query, key, at_query, at_key, radius = named("volume").tensors()
    expected = pixel_consistency_loss(query, key, at_query, at_key, radius=radius)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_consistency_loss(query.requires_grad_(), key, at_query, at_key, radius=radius)
    assert torch.equal(loss, expected)
    (g,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"pixel_consistency_loss: .*double backward"):
        g.sum().backward()


@pytest.mark.parametrize("forced", [False, True], ids=["native", "reference"])
def test_bad_input_is_refused_in_a_sentence(forced: bool):
    features, at = torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)
    with use_reference() if forced else contextlib.nullcontext():
        with pytest.raises(
            ValueError, match=r"pixel_consistency_loss: radius is -1.0; expected a finite number above"
        ):
            pixel_consistency_loss(features, features, at, at, radius=-1.0)
        with pytest.raises(ValueError, match=r"pixel_consistency_loss: key_coords has shape \(1, 5, 3\)"):
            pixel_consistency_loss(features, features, at, at[:1], radius=1.0)
