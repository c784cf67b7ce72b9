# SPDX-License-Identifier: Apache-2.0
"""Autograd notices where the diffusion step writes, and its ``out=`` is refused wherever torch's own is."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medaccel import use_reference
from medaccel.diffusion import VESDE, VPSDE, DDIMScheduler, DDPMScheduler, Sampler
from medaccel.diffusion.samplers import State
from medaccel.ops import diffusion_step

STEP: dict[str, Any] = {"a": 1.1, "b": -0.4, "c": 0.9, "d": 0.1, "e": 0.0, "s": 0.0}
SHAPE = (2, 1, 4, 6)


def fresh(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_reference() if request.param == "reference" else contextlib.nullcontext():
        yield


# --- autograd notices -------------------------------------------------------------------------------------------
OUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "x": lambda x, other: x,
    "(x, None)": lambda x, other: (x, None),
    "(x, other)": lambda x, other: (x, other),
    "(other, x)": lambda x, other: (other, x),
    "[x, other]": lambda x, other: [x, other],
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("out", OUTS)
def test_what_autograd_has_kept_may_not_be_overwritten_unnoticed(out: str, mode: Any, path: None):
    weight = fresh(1).requires_grad_()
    x = fresh()
    kept = (weight * x).sum()  # keeps x for weight's gradient
    with mode():
        diffusion_step(x, x.clone(), out=OUTS[out](x, torch.empty_like(x)), **STEP)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("view", ["whole", "part", "transposed"])
def test_writing_through_a_view_counts_for_its_base(view: str, path: None):
    base = torch.zeros(3, 1, 4, 6)
    target = {"whole": base, "part": base[1:], "transposed": base.transpose(2, 3)}[view]
    before = base._version
    x = torch.randn(target.shape)
    with torch.no_grad():
        y, _ = diffusion_step(x, x, out=target, **STEP)
    assert y is target
    assert base._version > before
    assert torch.equal(target, diffusion_step(x, x, **STEP)[0])


def test_versions_of_what_is_only_read_stay(path: None):
    x, m, out = fresh(0), fresh(1), fresh(2)
    versions = x._version, m._version
    diffusion_step(x, m, out=out, **STEP)
    assert (x._version, m._version) == versions


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_schedulers_in_place_are_noticed(scheduler: Any):
    steps = scheduler(num_train_timesteps=10)
    steps.set_timesteps(10)
    weight, x = fresh(1).requires_grad_(), fresh()
    kept = (weight * x).sum()
    with torch.no_grad():
        steps.step(fresh(2), 9, x, out=(x, None))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("method", ["ancestral", "ddim", "euler_maruyama", "dpm_solver_2m"])
def test_samplers_in_place_are_noticed(method: str):
    weight, x = fresh(1).requires_grad_(), fresh()
    kept = (weight * x).sum()
    sampler = Sampler(VPSDE(steps=100) if method != "euler_maruyama" else VESDE(steps=100), method)
    next(iter(sampler.run(lambda x, t: 0.1 * x, State(x), [9, 4, -1], seed=1)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


# --- refusals ---------------------------------------------------------------------------------------------------
def in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return fresh()


def from_shared_memory(first: int) -> Tensor:
    """Two of these lie in one NumPy array, under storages of their own."""
    return torch.from_numpy(MEMORY[first : first + 48]).reshape(SHAPE)


MEMORY = np.zeros(200, dtype=np.float32)
BUFFER = torch.zeros(2, 3, 4, 6)
PAIR = fresh()

# name: (arguments besides the step's, error's text); sample and model_output are fresh where they are not given.
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "a leaf": (lambda: {"out": fresh().requires_grad_()}, ValueError, r"out\[0\] requires a gradient"),
    "with history": (lambda: {"out": fresh().requires_grad_() * 1}, ValueError, r"out\[0\] requires a gradient"),
    "x0 a leaf": (lambda: {"out": (fresh(), fresh().requires_grad_())}, ValueError, r"out\[1\] requires a gradient"),
    "sample with gradient": (
        lambda: {"sample": fresh().requires_grad_(), "out": fresh()},
        ValueError,
        r"an input requires a gradient \(sample\)",
    ),
    "coefficient with gradient": (
        lambda: {"c": torch.tensor(0.5, requires_grad=True), "out": fresh()},
        ValueError,
        r"an input requires a gradient \(c\)",
    ),
    "an inference tensor": (
        lambda: {"out": in_inference_mode()},
        ValueError,
        r"out\[0\] was made in torch.inference",
    ),
    "x0 an inference tensor": (lambda: {"out": (fresh(), in_inference_mode())}, ValueError, r"out\[1\] was made in"),
    "expanded": (lambda: {"out": torch.zeros(1, 1, 1, 6).expand(SHAPE)}, ValueError, r"elements share memory"),
    "x0 expanded": (lambda: {"out": (fresh(), fresh()[:1].expand(SHAPE))}, ValueError, r"out\[1\] has strides"),
    "expanded sample in place": (
        lambda: (lambda x: {"sample": x, "out": x})(torch.zeros(1, 1, 4, 6).expand(SHAPE)),
        ValueError,
        "elements share memory",
    ),
    "sliding windows": (
        lambda: {"out": torch.zeros(60).as_strided(SHAPE, (20, 1, 3, 1))},
        ValueError,
        "elements share memory",
    ),
    "a zero tensor": (lambda: {"out": torch._efficientzerotensor(SHAPE)}, ValueError, "zero tensors"),
    "partly the sample": (
        lambda: {"sample": BUFFER[:, :1], "out": BUFFER.flatten()[1:97].as_strided(SHAPE, (72, 24, 6, 1), 1)},
        ValueError,
        "shares memory with sample",
    ),
    "the sample, transposed": (
        lambda: (lambda x: {"sample": x, "model_output": x.clone(), "out": x.mT})(torch.zeros(2, 1, 5, 5)),
        ValueError,
        "shares memory with sample",
    ),
    "partly the model's output": (
        lambda: {"model_output": from_shared_memory(0), "out": from_shared_memory(10)},
        ValueError,
        "shares memory with model_output",
    ),
    "partly the mask": (
        lambda: (
            lambda x: {
                "out": x,
                "mask": x.view(torch.uint8)[..., :6],
                "guide": fresh(),
                "guide_scale": 1.0,
                "guide_std": 0.0,
            }
        )(fresh()),
        ValueError,
        "shares memory with mask",
    ),
    "one element of the guide": (
        lambda: (
            lambda x: {
                "out": x,
                "mask": fresh() > 0,
                "guide": x[:1, :1, :1, :1],
                "guide_scale": 1.0,
                "guide_std": 0.0,
            }
        )(fresh()),
        ValueError,
        "shares memory with guide",
    ),
    "partly each other": (
        lambda: {"out": (from_shared_memory(0), from_shared_memory(40))},
        ValueError,
        r"out\[0\] and out\[1\] share memory",
    ),
    "twice the same": (lambda: {"out": (PAIR, PAIR)}, ValueError, r"out\[0\] and out\[1\] share memory"),
    "another shape": (
        lambda: {"out": torch.zeros(2, 1, 4, 7)},
        ValueError,
        r"out\[0\] is torch.float32 \(2, 1, 4, 7\)",
    ),
    "an empty one": (lambda: {"out": torch.zeros(0)}, ValueError, r"out\[0\] is torch.float32 \(0,\)"),
    "another dtype": (lambda: {"out": fresh().double()}, ValueError, r"out\[0\] is torch.float64"),
    "another device": (lambda: {"out": fresh().to("meta")}, ValueError, r"on meta; expected the sample's"),
    "integers": (lambda: {"out": fresh().int()}, TypeError, r"out\[0\] is torch.int32"),
    "sparse": (lambda: {"out": fresh().to_sparse()}, TypeError, r"out\[0\] is torch.float32 in the layout"),
    "one of a pair": (lambda: {"out": (fresh(),)}, TypeError, "out is tuple; expected a tensor, or"),
    "three": (lambda: {"out": (fresh(), fresh(), fresh())}, TypeError, "out is tuple; expected a tensor, or"),
    "no x′": (lambda: {"out": (None, fresh())}, TypeError, "out is tuple; expected a tensor, or"),
    "a word": (lambda: {"out": "x"}, TypeError, "out is 'x'; expected a tensor, or"),
    "an array": (lambda: {"out": np.zeros(SHAPE)}, TypeError, "expected a tensor, or"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_out_that_makes_no_sense_is_refused_in_a_sentence(what: str, path: None):
    arguments, error, match = REFUSED[what]
    with pytest.raises(error, match=match):
        diffusion_step(**{"sample": fresh(1), "model_output": fresh(2), **STEP, **arguments()})


# --- what is allowed --------------------------------------------------------------------------------------------
def test_without_gradients_a_leaf_may_be_written_as_by_torch(path: None):
    x, leaf = fresh(), fresh(1).requires_grad_()
    with torch.no_grad():
        diffusion_step(x, x, out=leaf, **STEP)
    assert torch.equal(leaf, diffusion_step(x, x, **STEP)[0])


def test_inference_tensors_may_be_written_in_inference_mode(path: None):
    with torch.inference_mode():
        x = fresh()
        expected = diffusion_step(x, x, **STEP)[0]
        assert torch.equal(diffusion_step(x, x, out=x, **STEP)[0], expected)


@pytest.mark.parametrize("name", ["negated", "parameter", "channels last"])
def test_an_out_that_the_kernel_cannot_write_is_written_by_torch(name: str, path: None):
    x = fresh()
    memory = torch.zeros(SHAPE)
    target = {
        "negated": lambda: torch._neg_view(memory),
        "parameter": lambda: torch.nn.Parameter(memory, requires_grad=False),
        "channels last": lambda: memory.to(memory_format=torch.channels_last),
    }[name]()
    diffusion_step(x, x, out=target, **STEP)
    assert torch.equal(target.clone(), diffusion_step(x, x, **STEP)[0])


def test_neighbouring_memory_is_no_overlap(path: None):
    x = fresh()
    diffusion_step(x, x, out=(from_shared_memory(0), from_shared_memory(48)), **STEP)
    assert torch.equal(from_shared_memory(0), diffusion_step(x, x, **STEP)[0])


def test_writing_in_place_compiles_as_one_graph():
    def step(x: Tensor, m: Tensor) -> Tensor:
        return diffusion_step(x, m, out=x, **STEP)[0]

    x, m = fresh(0), fresh(1)
    expected = diffusion_step(x, m, **STEP)[0]
    torch.compile(step, backend="aot_eager", fullgraph=True)(x, m)
    torch.testing.assert_close(x, expected)
