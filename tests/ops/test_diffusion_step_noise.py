# SPDX-License-Identifier: Apache-2.0
"""The diffusion step's noise: its words, its statistics, and what it doesn't depend on."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medaccel.ops import diffusion_step
from medaccel.ops.diffusion_step import reference
from medaccel.ops.diffusion_step.cases import named
from tests.ops.checks import (
    EMULATED,
    HERE,
    IMPLEMENTATIONS,
    implementation,
    max_error,
)
from tests.ops.diffusion_steps import CPU, KERNELS, with_gradients


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **place: Any) -> Tensor:
    x = torch.zeros(shape, dtype=dtype)
    return diffusion_step(x, x, a=0, b=0, c=0, d=0, e=0, s=1, **place)[0]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_normals_come_from_the_published_words(name: str):
    """Random123's known answer for counter 0, key 0, through Box–Muller by hand."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    u = [(w + 0.5) / 2**32 for w in words]
    expected = []
    for i in (0, 2):
        radius = math.sqrt(-2 * math.log(u[i]))
        expected += [radius * math.cos(2 * math.pi * u[i + 1]), radius * math.sin(2 * math.pi * u[i + 1])]
    with implementation(name):
        for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
            got = noise((1, 4), dtype, seed=0)
            assert max_error(got, torch.tensor([expected], dtype=torch.float64)) < bound


@pytest.mark.parametrize("name", KERNELS)
def test_normals_have_the_stated_error(name: str):
    shape = (2, 3, 40, 41) if name in EMULATED else (4, 64, 64, 64)
    key = torch.tensor([99, 4, 0])
    truth = reference.normals(shape, key)
    with implementation(name):
        for dtype, digits, bound in ((torch.float32, 24, 5.0), (torch.float64, 53, 10.0)):
            z = noise(shape, dtype, seed=99, offset=4).double()
            pairs = [
                t.reshape(shape[0], -1)[:, : math.prod(shape[1:]) // 2 * 2].unflatten(1, (-1, 2)) for t in (z, truth)
            ]
            radius = pairs[1].norm(dim=-1, keepdim=True)
            # In double the reference itself errs by as much.
            assert float(((pairs[0] - pairs[1]) / radius).abs().max()) <= bound * 2.0**-digits


def test_every_implementation_makes_the_same_normals():
    for dtype, ulps in ((torch.float32, 2), (torch.float64, 2)):
        results = []
        for name in HERE[1:]:
            with implementation(name):
                results.append(noise((2, 1, 11, 12, 13), dtype, seed=-7, offset=2**40, sample_offset=5))
        eps = torch.finfo(dtype).eps
        for other in results[1:]:
            assert max_error(other, results[0]) <= ulps * 4 * eps  # normals below 4


@pytest.mark.parametrize("name", CPU)
def test_a_batch_may_be_split_and_a_seed_wraps(name: str):
    with implementation(name):
        whole = noise((5, 3, 7), seed=-3, offset=9)
        parts = [noise((n, 3, 7), seed=-3, offset=9, sample_offset=at) for at, n in ((0, 2), (2, 3))]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(noise((5, 3, 7), seed=2**64 - 3, offset=9), whole)
        assert torch.equal(noise((5, 3, 7), seed=torch.tensor([-3]), offset=9), whole)
        assert torch.equal(noise((5, 21), seed=-3, offset=9).reshape(5, 3, 7), whole)


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("case_name", ["several_blocks", "everything", "per_sample"])
def test_bits_do_not_depend_on_the_number_of_threads(name: str, case_name: str):
    case = named(case_name)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with implementation(name):
                results.append(with_gradients(case, case.tensors()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_normals_are_standard_normal():
    scipy = pytest.importorskip("scipy.stats")
    z = noise((16, 65536), torch.float64, seed=2024).flatten()
    n = z.numel()
    # Standard errors of the first four moments of n standard normals.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - expected) < 4 * math.sqrt(variance / n)
    assert scipy.kstest(z.numpy(), "norm").pvalue > 1e-3
    # Nothing is lost beyond 4 sigma: 63 of 2^20 are expected there.
    assert 35 < int((z.abs() > 4).sum()) < 100


def test_neighbours_steps_samples_and_guide_are_uncorrelated():
    n = 1 << 18
    z = noise((2, n), torch.float64, seed=5, offset=1)
    other_step = noise((1, n), torch.float64, seed=5, offset=2)[0]
    other_seed = noise((1, n), torch.float64, seed=6, offset=1)[0]
    far_step = noise((1, n), torch.float64, seed=5, offset=1 + 2**32)[0]
    zeros = torch.zeros(1, n, dtype=torch.float64)
    keep = torch.zeros(1, n, dtype=torch.bool)
    options = {"a": 0, "b": 0, "c": 0, "d": 0, "e": 0, "s": 0, "guide_scale": 0, "guide_std": 1}
    of_guide = diffusion_step(zeros, zeros, mask=keep, guide=zeros, seed=5, offset=1, **options)[0][0]
    key = torch.tensor([5, 1, 0])
    assert max_error(of_guide[:100], reference.normals((1, 100), key, of_guide=True)[0]) < 1e-14
    pairs = {f"lag {k}": (z[0, :-k], z[0, k:]) for k in (1, 2, 3, 4, 5, 128)}
    pairs |= {"samples": (z[0], z[1]), "steps": (z[0], other_step), "seeds": (z[0], other_seed)}
    pairs |= {"offset's high half": (z[0], far_step), "guide": (z[0], of_guide)}
    pairs["squares"] = (z[0, :-1].square() - 1, (z[0, 1:].square() - 1) / 2)
    for what, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) < 4.5 / math.sqrt(len(a)), what


def test_without_a_seed_torchs_generator_decides_and_is_not_asked_in_vain():
    torch.manual_seed(3)
    first = noise((1, 40))
    assert not torch.equal(first, noise((1, 40)))
    torch.manual_seed(3)
    assert torch.equal(first, noise((1, 40)))
    state = torch.get_rng_state()
    x = torch.ones(1, 4)
    diffusion_step(x, x, a=1, b=0, c=1, d=0, e=0, s=0)
    diffusion_step(x, x, a=1, b=0, c=1, d=0, e=0, s=1, noise=x)
    assert torch.equal(torch.get_rng_state(), state)
