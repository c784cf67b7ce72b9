# SPDX-License-Identifier: Apache-2.0
"""Tests NT-Xent and InfoNCE: every CPU implementation against the fp64 reference, by hand, and across processes."""

import contextlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import info_nce_loss, nt_xent_loss
from medaccel.ops.nt_xent.cases import CASES, Case
from tests.ops.checks import EMULATED, IMPLEMENTATIONS, assert_twice_as_good, implementation, poisoned_memory

OP = torch.ops.medaccel.similarity_lse.default
CPU = [name for name in IMPLEMENTATIONS if name not in EMULATED]
FLOOR = {torch.float64: 1e-13, torch.float32: 3e-7}
LOSSES = {"nt_xent": nt_xent_loss, "info_nce": info_nce_loss}
ROOT = Path(__file__).resolve().parents[2]


def with_gradients(loss: str, a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, ...]:
    wanted = (a.detach().requires_grad_(), b.detach().requires_grad_())
    value = LOSSES[loss](*wanted, temperature=temperature)
    return value.detach(), *torch.autograd.grad(value, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_match_the_fp64_reference(loss: str, case: Case, name: str, dtype: torch.dtype):
    for temperature in {0.02, case.temperature}:
        a, b = case.tensors(dtype)
        with use_reference():
            truth = with_gradients(loss, a.double(), b.double(), temperature)
            plain = with_gradients(loss, a, b, temperature)
        with implementation(name), poisoned_memory():
            ours = with_gradients(loss, a, b, temperature)
        for actual, same, exact in zip(ours, plain, truth, strict=True):
            assert actual.dtype == dtype
            # lse and cosine cancel: both are as large as 1 / temperature.
            assert_twice_as_good(actual, same, exact, FLOOR[dtype], 1 / temperature)


@pytest.mark.parametrize("name", CPU)
def test_two_pairs_by_hand(name: str):
    """Right angles between the pairs: Σ over the others is e^(1/τ) + 2."""
    z = torch.tensor([[2.0, 0.0], [0.0, 0.3]], dtype=torch.float64)
    with implementation(name):
        loss, other = nt_xent_loss(z, z, temperature=0.5), info_nce_loss(z, z, temperature=0.5)
    assert float(loss) == pytest.approx(math.log(math.exp(2.0) + 2) - 2, rel=1e-14)
    assert float(other) == pytest.approx(math.log(math.exp(2.0) + 1) - 2, rel=1e-14)


@pytest.mark.parametrize("name", CPU)
def test_identical_vectors_give_the_logarithm_of_their_number(name: str):
    z = torch.ones(6, 3, dtype=torch.float64)
    with implementation(name):
        loss = nt_xent_loss(z, z)
        other, bound = info_nce_loss(z, z, return_bound=True)
    assert float(loss) == pytest.approx(math.log(11), rel=1e-14)
    assert float(other) == pytest.approx(math.log(6), rel=1e-14)
    assert float(bound) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("name", CPU)
def test_the_loss_is_symmetric_in_the_views_and_blind_to_lengths(name: str):
    a, b = Case("", 17, 8).tensors(torch.float64)
    with implementation(name):
        loss = nt_xent_loss(a, b)
        torch.testing.assert_close(nt_xent_loss(b, a), loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(nt_xent_loss(3 * a, b * torch.rand(17, 1).double()), loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", CPU)
def test_one_pair_has_no_negatives(name: str):
    a, b = Case("", 1, 8).tensors(torch.float64)
    with implementation(name):
        value, *gradients = with_gradients("nt_xent", a, b, 0.5)
    assert abs(float(value)) < 1e-14
    assert all(g.abs().max() < 1e-14 for g in gradients)


@pytest.mark.parametrize("name", CPU)
def test_zero_vectors_have_cosine_zero_and_no_gradient(name: str):
    a, b = Case("", 5, 8).tensors(torch.float64)
    a[2] = 0
    with use_reference():
        truth = with_gradients("nt_xent", a, b, 0.5)
    with implementation(name):
        ours = with_gradients("nt_xent", a, b, 0.5)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    assert (ours[1][2] == 0).all()


@pytest.mark.parametrize("name", CPU)
def test_a_nan_makes_the_loss_nan(name: str):
    a, b = Case("", 40, 8).tensors(torch.float32)
    a[3, 1] = torch.nan
    with implementation(name):
        assert nt_xent_loss(a, b).isnan()
        assert info_nce_loss(a, b).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CPU)
def test_small_temperatures_stay_finite_in_half_precision(name: str, dtype: torch.dtype):
    a, b = Case("", 50, 16).tensors(dtype)
    with implementation(name):
        value, *gradients = with_gradients("nt_xent", a, b, 0.01)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(g.isfinite().all() and g.dtype == dtype for g in gradients)


def test_the_number_of_threads_changes_no_bit():
    a, b = Case("", 700, 24).tensors(torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients("nt_xent", a, b, 0.1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_gradients_pass_gradcheck():
    wanted = [t.requires_grad_() for t in Case("", 4, 3).tensors(torch.float64)]
    assert torch.autograd.gradcheck(nt_xent_loss, wanted)
    assert torch.autograd.gradcheck(info_nce_loss, wanted)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("self_offset", [-1, 0, 2])
def test_registration_passes_opcheck(self_offset: int, requires_grad: bool):
    a, b = torch.randn(2, 5, 7), torch.randn(2, 9, 7)
    torch.library.opcheck(OP, (a.requires_grad_(requires_grad), b.requires_grad_(requires_grad), 0.3, self_offset))


def test_double_backward_raises_a_sentence():
    a, b = Case("", 4, 3).tensors(torch.float64)
    (g,) = torch.autograd.grad(nt_xent_loss(a.requires_grad_(), b), a, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_compiles_as_one_graph():
    wanted = [t.requires_grad_() for t in Case("", 12, 8).tensors(torch.float32)]
    compiled = torch.compile(lambda a, b: nt_xent_loss(a * 2, b).square(), fullgraph=True)
    ours = torch.autograd.grad(compiled(*wanted), wanted)
    expected = torch.autograd.grad(nt_xent_loss(*wanted).square(), wanted)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_autocast_changes_nothing():
    a, b = Case("", 12, 8).tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent_loss(a, b)
    assert torch.equal(loss, nt_xent_loss(a, b))


BAD = {
    "one axis": ((torch.zeros(4), torch.zeros(4)), {}, ValueError, r"z1 has shape \(4,\); expected \(N, C\)"),
    "no channels": ((torch.zeros(4, 0), torch.zeros(4, 0)), {}, ValueError, r"z1 has shape \(4, 0\); .* C >= 1"),
    "shapes": ((torch.zeros(4, 3), torch.zeros(5, 3)), {}, ValueError, r"z2 has shape \(5, 3\); expected \(4, 3\)"),
    "integers": ((torch.zeros(4, 3), torch.zeros(4, 3).int()), {}, TypeError, "z2 is torch.int32"),
    "device": (
        (torch.zeros(4, 3), torch.zeros(4, 3, device="meta")),
        {},
        ValueError,
        "z2 is on meta and z1 on cpu; expected the same device",
    ),
    "temperature": ((torch.zeros(4, 3),) * 2, {"temperature": 0}, ValueError, "temperature is 0; expected a finite"),
    "NaN": ((torch.zeros(4, 3),) * 2, {"temperature": math.nan}, ValueError, "temperature is nan"),
}


@pytest.mark.parametrize("forced", [False, True], ids=["native", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_a_sentence(what: str, forced: bool):
    arguments, options, error, match = BAD[what]
    with use_reference() if forced else contextlib.nullcontext(), pytest.raises(error, match=match):
        nt_xent_loss(*arguments, **options)


# --- across processes ----------------------------------------------------------------------------------------
# Each process has its share of the batch and a DDP model; rank 0 compares with the whole batch in one process.
WORKER = """
import sys
import torch
import torch.distributed as dist
from medaccel.ops import info_nce_loss, nt_xent_loss

rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
group = dist.group.WORLD
x, y = torch.randn(2, 6 * world, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

def model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)).double()

for loss in (nt_xent_loss, info_nce_loss):
    whole = model()
    expected = loss(whole(x), whole(y))
    expected.backward()
    net = torch.nn.parallel.DistributedDataParallel(model())
    mine = slice(6 * rank, 6 * rank + 6)
    both = net(torch.cat([x[mine], y[mine]]))
    value = loss(both[:6], both[6:], group=group)
    value.backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    error = abs(float(mean / world - expected))
    for a, b in zip(net.parameters(), whole.parameters()):
        error = max(error, float((a.grad - b.grad).abs().max()))
    assert error <= 1e-12, (loss.__name__, error)
try:
    nt_xent_loss(torch.randn(2 + rank, 4), torch.randn(2 + rank, 4), group=group)
except ValueError as refused:
    assert "expected the same number on each" in str(refused), refused
    print("held")
dist.barrier()
# What holds the group goes before it: else one process in ten ended with "terminate called without an active
# exception", after all was done.
del net, both, value, group
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_give_the_loss_and_gradients_of_one(world: int, tmp_path: Path):
    commands = [
        [sys.executable, "-c", WORKER, str(rank), str(world), str(tmp_path / "store")] for rank in range(world)
    ]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process in processes:
        out, error = process.communicate(timeout=180)
        assert process.returncode == 0, error
        assert "held" in out


@pytest.fixture
def group_of_one() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("error::UserWarning")  # torch warns where a communication has no gradient
@pytest.mark.parametrize("loss", [nt_xent_loss, info_nce_loss])
def test_with_a_group_second_derivatives_are_right_and_transforms_refused(
    loss: Callable[..., Tensor], group_of_one: dist.ProcessGroup
):
    a, b = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with use_reference():
        assert torch.autograd.gradgradcheck(lambda a, b: loss(a, b, group=group_of_one), (a, b))
    refused = r"_loss: group is given under vmap, another transform of torch\.func"
    with pytest.raises(ValueError, match=refused):
        torch.func.jvp(lambda a: loss(a, a, group=group_of_one), (b,), (b,))
    with pytest.raises(ValueError, match=refused):
        torch.func.grad(lambda a: loss(a, a, group=group_of_one))(a.detach())
    with pytest.raises(ValueError, match=refused):
        torch.vmap(lambda a: loss(a, a, group=group_of_one))(torch.stack([b, b]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a.detach(), b.detach())
        with pytest.raises(ValueError, match=refused):
            loss(dual, dual, group=group_of_one)
