# SPDX-License-Identifier: Apache-2.0
"""Tests shifted-window attention: every CPU implementation against the fp64 reference, its gradients, its
properties."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import shifted_window_attention
from medaccel.ops._philox import philox_4x32_10
from medaccel.ops.window_attention import reference
from medaccel.ops.window_attention.cases import CASES, Case, named, relative_position_index
from tests.ops.checks import EMULATED, IMPLEMENTATIONS, assert_twice_as_good, implementation, poisoned_memory

OP = torch.ops.medaccel.shifted_window_attention.default
CPU = [name for name in IMPLEMENTATIONS if name not in EMULATED]  # the GPU's kernel has a suite of its own
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-7}


def run(case: Case, qkv: Tensor, table: Tensor, index: Tensor, pad: Tensor | None) -> Tensor:
    return shifted_window_attention(qkv, table, index, pad_qkv=pad, **case.options())


def with_gradients(case: Case, tensors: tuple, grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients to qkv, bias_table and, where there is one, pad_qkv."""
    qkv, table, index, pad = (t if t is None or not t.is_floating_point() else t.detach() for t in tensors)
    wanted = [t.requires_grad_() for t in (qkv, table, pad) if t is not None]
    y = run(case, qkv, table, index, pad)
    gradients = torch.autograd.grad(y, wanted, grad.to(y.dtype), materialize_grads=True, allow_unused=True)
    return (y.detach(), *gradients)


def random_gradient(case: Case, qkv: Tensor) -> Tensor:
    shape = (*qkv.shape[:-1], qkv.shape[-1] // 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def in_dtype(tensors: tuple, dtype: torch.dtype) -> tuple:
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_the_fp64_reference(case: Case, name: str, dtype: torch.dtype):
    tensors = case.tensors(dtype)
    grad = random_gradient(case, tensors[0])
    with use_reference():
        truth = with_gradients(case, in_dtype(tensors, torch.float64), grad)
        plain = with_gradients(case, tensors, grad)
    with implementation(name), poisoned_memory():
        ours = with_gradients(case, tensors, grad)
    # The gradients are sums of terms grad · v · weight that cancel: entirely, where a row has one key.
    terms = float(grad.abs().max() * tensors[0].abs().max()) if grad.numel() else 0.0
    for actual, same_precision, exact in zip(ours, plain, truth, strict=True):
        assert actual.dtype == dtype
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        assert_twice_as_good(actual, same_precision, exact, FLOOR[dtype], max(largest, terms))
    assert ours[0].is_contiguous()


@pytest.mark.parametrize("name", CPU)
def test_monais_own_block_agrees(name: str):
    from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask, get_window_size

    for sizes in ((9, 10, 11), (3, 8, 9), (8, 8, 8), (9, 10)):
        rank = len(sizes)
        block = SwinTransformerBlock(12, 3, (4,) * rank, (2,) * rank).double()
        torch.nn.init.normal_(block.attn.qkv.bias)
        x = torch.randn(2, *sizes, 12, dtype=torch.float64)
        window, shift = get_window_size(sizes, (4,) * rank, (2,) * rank)
        padded = [math.ceil(s / w) * w for s, w in zip(sizes, window, strict=True)]
        expected = block.forward_part1(x, compute_mask(padded, window, shift, x.device))
        attention, tokens = block.attn, math.prod(window)
        with implementation(name):
            y = shifted_window_attention(
                attention.qkv(block.norm1(x)),
                attention.relative_position_bias_table,
                attention.relative_position_index[:tokens, :tokens],
                window_size=window,
                shift_size=shift,
                pad_qkv=attention.qkv.bias,
            )
        torch.testing.assert_close(attention.proj(y), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients_pass_gradcheck(spread: float, dropout_p: float):
    case = Case("", (3, 4), (2, 3), (1, 1), 2, 2, dropout_p=dropout_p, spread=spread)
    qkv, table, index, pad = case.tensors(torch.float64)
    wanted = tuple(t.requires_grad_() for t in (qkv, table, pad))
    assert torch.autograd.gradcheck(lambda q, t, p: run(case, q, t, index, p), wanted)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["padded_shifted", "image", "dropout", "empty_batch", "sliced", "zeros_as_padding"])
def test_registration_passes_opcheck(name: str, requires_grad: bool):
    case = named(name)
    qkv, table, index, pad = case.tensors()
    if requires_grad:
        qkv, table = qkv.detach().requires_grad_(), table.requires_grad_()
    o = case.options()
    seed, window, shift = o["dropout_seed"], list(case.window), list(case.shift)
    torch.library.opcheck(OP, (qkv, table, index, pad, seed, window, shift, 0.3, case.dropout_p))


@pytest.mark.parametrize("wanted", [("qkv",), ("table",), ("pad",), ("table", "pad")], ids=str)
def test_only_the_wanted_gradients_are_computed(wanted: tuple[str, ...]):
    case = named("padded")
    qkv, table, index, pad = case.tensors()
    tensors = {"qkv": qkv, "table": table, "pad": pad}
    with use_reference():
        everything = dict(
            zip(tensors, with_gradients(case, case.tensors(), random_gradient(case, qkv))[1:], strict=True)
        )
    for key in wanted:
        tensors[key].requires_grad_()
    run(case, qkv, table, index, pad).backward(random_gradient(case, qkv).float())
    for key, tensor in tensors.items():
        assert (tensor.grad is not None) == (key in wanted)
        if key in wanted:
            torch.testing.assert_close(tensor.grad, everything[key], rtol=1e-4, atol=1e-5)


def test_only_linear_memory_is_kept_for_backward():
    case = named("whole_windows_shifted")
    qkv, table, index, pad = case.tensors()
    kept = 0

    def count(t: Tensor) -> Tensor:
        nonlocal kept
        kept += t.numel() if t.is_floating_point() else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = run(case, qkv.requires_grad_(), table, index, pad)
    rows = 8 * 64 * case.heads  # the log-sum-exp of 8 windows of 64 tokens
    assert kept == qkv.numel() + table.numel() + pad.numel() + y.numel() + rows


def test_double_backward_raises_a_sentence():
    case = named("image")
    qkv, table, index, pad = case.tensors()
    qkv.requires_grad_()
    (g,) = torch.autograd.grad(run(case, qkv, table, index, pad).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_zero_stride_gradient_is_taken():
    case = named("padded_shifted")
    qkv, table, index, pad = case.tensors()
    qkv.requires_grad_()
    (ours,) = torch.autograd.grad(run(case, qkv, table, index, pad).sum(), qkv)
    with use_reference():
        (truth,) = torch.autograd.grad(run(case, qkv, table, index, pad).sum(), qkv)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CPU)
def test_half_precision_is_computed_in_fp32_and_rounded_once(name: str, dtype: torch.dtype):
    case = named("padded_shifted")
    qkv, table, index, pad = case.tensors(dtype)
    with implementation(name):
        y = run(case, qkv, table, index, pad)
        exact = run(case, qkv.float(), table.float(), index, pad.float())
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_integer_index_of_any_strides_gives_the_same_bits(dtype: torch.dtype):
    case = Case("", (5, 6), (3, 3), (1, 1), 2, 8)
    qkv, table, index, pad = case.tensors()
    expected = run(case, qkv, table, index, pad)
    strided = torch.zeros(18, 9, dtype=dtype)
    strided[::2] = index.T.to(dtype)
    assert torch.equal(run(case, qkv, table, strided[::2].T, pad), expected)


# --- properties ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CPU)
def test_a_nan_stays_within_its_window(name: str):
    case = Case("", (9, 8, 10), (4, 4, 4), (2, 2, 2), 1, 8)
    for part in range(3):
        qkv, table, index, pad = case.tensors()
        qkv[0, 4, 3, 5, 8 * part] = torch.nan
        with implementation(name):
            y = run(case, qkv, table, index, pad)
        window = torch.zeros(9, 8, 10, dtype=torch.bool)
        window[2:6, 2:6, 2:6] = True
        if part == 0:  # a query is its own row's alone
            window[:] = False
            window[4, 3, 5] = True
        assert torch.equal(y[0].isnan().any(dim=-1), window)


@pytest.mark.parametrize("name", CPU)
def test_windows_are_independent_of_each_other(name: str):
    case = Case("", (4, 8, 12), (4, 4, 4), (0, 0, 0), 2, 8)
    qkv, table, index, pad = case.tensors()
    windows = reference.partition(qkv, case.window)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = reference.unpartition(windows[:, order], case.sizes, case.window)
    with implementation(name):
        y, z = run(case, qkv, table, index, pad), run(case, shuffled, table, index, pad)
    assert torch.equal(reference.partition(z, case.window), reference.partition(y, case.window)[:, order])


@pytest.mark.parametrize("name", CPU)
def test_padding_changes_nothing_outside_its_window(name: str):
    case = Case("", (8, 10), (4, 4), (0, 0), 2, 8)
    qkv, table, index, pad = case.tensors()
    with implementation(name):
        y, z = run(case, qkv, table, index, pad), run(case, qkv, table, index, pad + 1)
    assert torch.equal(y[:, :, :8], z[:, :, :8])
    assert not torch.equal(y[:, :, 8:], z[:, :, 8:])


@pytest.mark.parametrize("name", CPU[1:])
def test_regions_that_scores_could_bridge_see_each_other_as_in_monai(name: str):
    """−100 is not −∞: a score that is 150 higher wins in spite of it."""
    qkv = torch.zeros(1, 8, 3, dtype=torch.float64)
    qkv[0, :, 2] = torch.arange(8.0)
    qkv[0, 0, 1], qkv[0, 6, 0] = 150.0, 1.0  # the first token's key, for a query of the last window's other region
    args = (qkv, torch.zeros(7, 1, dtype=torch.float64), relative_position_index((4,)))
    with implementation(name):
        y = shifted_window_attention(*args, window_size=(4,), shift_size=(2,), scale=1.0)
    assert float(y[0, 6, 0]) == pytest.approx(0.0, abs=1e-12)  # token 0's value, not the mean of 6 and 7


@pytest.mark.parametrize("name", CPU[1:])
@pytest.mark.parametrize("case_name", ["padded_shifted", "dropout", "large_scores"])
def test_bits_do_not_depend_on_the_number_of_threads_or_the_run(name: str, case_name: str):
    case = named(case_name)
    tensors = case.tensors()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            with implementation(name):
                results.append(with_gradients(case, tensors, random_gradient(case, tensors[0])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


# --- dropout -------------------------------------------------------------------------------------------------
def test_philox_gives_the_published_words():
    """Random123's known answers for ten rounds (its kat_vectors)."""
    zero = torch.zeros((), dtype=torch.int64)
    words = philox_4x32_10(zero, (zero, zero, zero, zero))
    assert [f"{int(w):08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = torch.tensor(0xFFFFFFFF)
    words = philox_4x32_10(torch.tensor(-1), (ones, ones, ones, ones))
    assert [f"{int(w):08x}" for w in words] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    counter = tuple(torch.tensor(c) for c in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
    words = philox_4x32_10(torch.tensor(0x299F31D0A4093822), counter)
    assert [f"{int(w):08x}" for w in words] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


@pytest.mark.parametrize("name", CPU)
def test_dropout_keeps_the_mean_and_drops_what_it_says(name: str):
    case = Case("", (16, 16), (8, 8), (0, 0), 4, 8, batch=4, dropout_p=0.25)
    qkv, table, index, pad = case.tensors()
    qkv[..., :64] = 0  # all weights alike
    qkv[..., 64:] = 1  # and all values: an output is the share of weights that were kept, over 0.75
    with implementation(name):
        kept = run(case, qkv, 0 * table, index, pad).mean(dim=-1) * 0.75
    n = 4 * 16 * 16 * 4 * 64
    assert abs(float(kept.mean()) - 0.75) <= 5 * math.sqrt(0.25 * 0.75 / n)


def test_dropout_depends_on_the_seed_alone():
    case = named("dropout")
    tensors = case.tensors()
    options = {**case.options(), "pad_qkv": tensors[3]}
    a = shifted_window_attention(*tensors[:3], **options)
    torch.manual_seed(5)
    assert torch.equal(a, shifted_window_attention(*tensors[:3], **options))
    options["dropout_seed"] = torch.tensor(1)
    assert not torch.equal(a, shifted_window_attention(*tensors[:3], **options))


def test_checkpointing_drops_the_same_weights_again():
    case = named("dropout")
    qkv, table, index, pad = case.tensors()
    qkv.requires_grad_()
    call = lambda q: run(case, q, table, index, pad).sin()  # noqa: E731
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(call, qkv, use_reentrant=False).sum(), qkv)
    (once,) = torch.autograd.grad(call(qkv).sum(), qkv)
    assert torch.equal(again, once)


@settings(max_examples=60, deadline=None)
@given(
    axes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    spread=st.sampled_from([0.1, 1.0, 20.0]),
)
def test_random_shapes_match_the_reference(axes: list, heads: int, head_dim: int, spread: float):
    sizes, window, shift = zip(*((s, w, h % w) for s, w, h in axes), strict=True)
    case = Case("", sizes, window, shift, heads, head_dim, spread=spread)
    tensors = case.tensors(torch.float64)
    grad = random_gradient(case, tensors[0])
    with use_reference():
        truth = with_gradients(case, tensors, grad)
    for a, b in zip(with_gradients(case, tensors, grad), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * float(b.abs().max().clamp(min=1)))


# --- torch's machinery ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str):
    case = named("padded_shifted")
    qkv, table, index, pad = case.tensors()
    wanted = [t.requires_grad_() for t in (qkv, table, pad)]
    call = lambda q, t, p: (run(case, q * 2, t, index, p) + 1).square()  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    ours = torch.autograd.grad(compiled(*wanted).sum(), wanted)
    for a, b in zip(ours, torch.autograd.grad(call(*wanted).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_qkv_and_keeps_the_bias_table():
    case = named("padded_shifted")
    qkv, table, index, pad = case.tensors()
    wanted = [t.requires_grad_() for t in (qkv, table, pad)]
    with torch.autocast("cpu", torch.bfloat16):
        y = run(case, qkv, table, index, pad)
    assert y.dtype == torch.bfloat16
    exact = run(case, qkv.detach().bfloat16().float(), table.detach(), index, pad.detach())
    assert torch.equal(y, exact.bfloat16())
    gradients = torch.autograd.grad(y.float().sum(), wanted)
    assert all(g.dtype == torch.float32 for g in gradients)


def test_vmap_runs_over_samples():
    case = named("image")
    qkv, table, index, pad = case.tensors()
    mapped = torch.vmap(lambda q: run(case, q[None], table, index, pad)[0])(qkv)
    assert torch.equal(mapped, run(case, qkv, table, index, pad))
