# SPDX-License-Identifier: Apache-2.0
"""Tests the pixel consistency's GPU kernels: executed on the CPU with every access checked, compiled for each
architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted here")

from medaccel.ops.pixel_consistency import op, reference, unsupported
from medaccel.ops.pixel_consistency import triton as kernels
from medaccel.ops.pixel_contrast.cases import Views, named
from tests.ops.checks import assert_twice_as_good, poisoned_memory
from tests.ops.largest import LargestStorage
from tests.triton_interpretation.aot import ARCHS, Build, assert_resources, compile_all

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from tests.triton_interpretation.interpret import Interpreter

HALF = (torch.bfloat16, torch.float16)
CASES = [
    Views("volume", (4, 5, 7), 64),
    Views("image", (13, 17), 20, radius=1.5),
    Views("signal", (200,), 8),
    Views("finer_view", (3, 4, 3), 24, key_sizes=(5, 7, 6), zoom=0.6),
    Views("half_overlap", (6, 6, 6), 16, shift=3.2),
    Views("all_near", (5, 4, 5), 16, radius=100.0),
    Views("wide", (3, 3, 8), 300),
    *map(named, ("no_overlap", "one_pixel", "one_channel", "empty_batch", "no_queries", "no_keys")),
    Views("sliced", (3, 4, 6), 12, view="sliced"),
    Views("channels_first", (3, 4, 6), 12, view="channels_first"),
]


def with_kernels(tensors: tuple, grad: Tensor, interpreter: Interpreter | None = None) -> list[Tensor]:
    """The sums, their numbers of pairs, and the gradients to query and key."""
    with poisoned_memory():
        sums, counts = op._forward_cuda(*tensors)
        gradients = op._backward_cuda(grad, *tensors, True, True)
    if interpreter is not None and sums.numel() and tensors[1].numel():
        interpreter.assert_written(sums=sums, counts=counts)
    return [sums, counts, *gradients]


def with_autograd(tensors: tuple, grad: Tensor) -> list[Tensor]:
    wanted = tuple(t.detach().clone().requires_grad_() for t in tensors[:2])
    sums, counts = reference.pair_similarity(*wanted, *tensors[2:])
    return [sums.detach(), counts, *torch.autograd.grad(sums, wanted, grad.to(sums))]


def incoming(tensors: tuple) -> Tensor:
    shape = tensors[0].shape[:2]
    return torch.linspace(-0.5, 2.0, shape[0] * shape[1]).reshape(shape)


def sizes(tensors: tuple) -> tuple[float, ...]:
    """The sizes of a cosine, a number of pairs, and a term of either gradient."""
    shortest = [float(t.float().norm(dim=-1).min()) if t.numel() else 1.0 for t in tensors[:2]]
    return 1.0, 0.0, 2 / shortest[0], 2 / shortest[1]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.float32, id=f"{case}-fp32") for case in CASES),
        *(pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}") for case in CASES[:2] for dtype in HALF),
    ],
)
def test_sums_and_gradients_match_the_fp64_reference(interpreter: Interpreter, case: Views, dtype: torch.dtype):
    tensors = case.tensors(dtype)
    grad = incoming(tensors)
    ours = with_kernels(tensors, grad, interpreter)
    truth = with_autograd((*(t.double() for t in tensors[:2]), *tensors[2:]), grad)
    # Half precision is computed in fp32 and rounded once.
    plain = with_autograd((*(t.float() for t in tensors[:2]), *tensors[2:]), grad)
    plain[2:] = [g.to(dtype) for g in plain[2:]]
    assert [t.dtype for t in ours] == [torch.float32, torch.float32, dtype, dtype]
    pairs = float(truth[1].max()) if truth[1].numel() else 0.0
    for actual, same, exact, size in zip(ours, plain, truth, sizes(tensors), strict=True):
        assert_twice_as_good(actual, same, exact, 3e-7, size * pairs)


@pytest.mark.interpreted
@pytest.mark.parametrize("coords", [torch.float32, torch.float64])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_pairs_at_the_radius_itself_are_the_references(interpreter: Interpreter, axes: int, coords: torch.dtype):
    """Many pixels lie at the radius but for the last bit, where a contracted product would decide otherwise."""
    grid = (
        torch.cartesian_prod(*[torch.arange(6 if axes > 1 else 90, dtype=coords)] * axes).reshape(1, -1, axes) * 0.1
    )
    x = torch.randn(1, grid.shape[1], 4, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 3):
        for radius in (0.1 * steps, 0.1 * steps * axes**0.5):
            tensors = (x, x, grid, grid, torch.full((1,), radius, dtype=coords))
            assert torch.equal(kernels.forward(*tensors)[1], reference.pair_similarity(*tensors)[1])


@pytest.mark.interpreted
def test_blocks_that_are_far_apart_are_passed_over(interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch):
    case = Views("", (12, 8, 8), 8, batch=1)
    tensors = case.tensors()
    products = []
    builder = __import__("triton.runtime.interpreter", fromlist=["x"]).interpreter_builder
    plain = type(builder).create_dot
    monkeypatch.setattr(
        type(builder), "create_dot", lambda self, *args: products.append(self.grid_idx) or plain(self, *args)
    )
    kernels.forward(*tensors)
    blocks = 24  # half a plane each: a pixel's near ones lie in its own plane and those beside it
    assert blocks <= len(products) <= 6 * blocks < blocks**2 / 4 + 1


@pytest.mark.interpreted
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_features_changes_nothing(interpreter: Interpreter, scale: float):
    query, key, *geometry = CASES[3].tensors(torch.float64)
    query[0, 1] = 0
    plain = with_kernels((query.float(), key.float(), *geometry), incoming((query,)))
    scaled = with_kernels(((query * scale).float(), (key * scale).float(), *geometry), incoming((query,)))
    for i, factor in enumerate((1, 1, scale, scale)):
        expected = plain[i].double()
        size = float(expected.abs().max())
        torch.testing.assert_close(scaled[i].double() * factor, expected, rtol=0, atol=5e-7 * size)
    assert not scaled[2][0, 1].any()


@pytest.mark.interpreted
def test_a_nan_reaches_the_pixels_that_are_near_to_it_alone(interpreter: Interpreter):
    query, key, at_query, at_key, radius = CASES[0].tensors()
    at_query = at_query.clone()
    at_query[1, 4, 1] = torch.nan  # is near to nothing
    tensors = (query, key, at_query, at_key, radius)
    clean = with_kernels(tensors, incoming(tensors))
    near = reference.near(at_query, at_key, radius)
    assert clean[1][1, 4] == 0
    assert torch.equal(clean[1], near.sum(dim=-1).float())
    key = key.clone()
    key[0, 40, 3], key[1, 7] = torch.nan, torch.inf
    ill = torch.zeros(key.shape[:2], dtype=torch.bool)
    ill[0, 40] = ill[1, 7] = True
    meets = (near & ill[:, None, :]).any(dim=-1)
    assert meets.any()
    sums, counts, by_query, by_key = with_kernels((query, key, at_query, at_key, radius), incoming(tensors))
    assert torch.equal(sums.isnan(), meets)
    assert torch.equal(by_query.isnan(), meets[..., None].expand_as(by_query))
    assert torch.equal(by_key.isnan(), ill[..., None].expand_as(by_key))
    for actual, expected, fine in ((sums, clean[0], ~meets), (by_query, clean[2], ~meets), (by_key, clean[3], ~ill)):
        assert torch.equal(actual[fine], expected[fine])
    assert torch.equal(counts, clean[1])


@pytest.mark.interpreted
def test_infinite_coordinates_and_radii_give_the_references_pairs(interpreter: Interpreter):
    query, key, at_query, at_key, radius = CASES[0].tensors()
    at_query, at_key = at_query.clone(), at_key.clone()
    at_query[0, 3, 0], at_key[0, 8, 0], at_query[1, :70] = torch.inf, torch.inf, -torch.inf
    for factor in (1.0, 1e18, 1e30):
        tensors = (query, key, at_query, at_key, radius * factor)
        assert torch.equal(kernels.forward(*tensors)[1], reference.pair_similarity(*tensors)[1])


@pytest.mark.interpreted
def test_repeated_gradients_have_the_same_bits_and_only_wanted_ones_are_made(interpreter: Interpreter):
    tensors = CASES[3].tensors()
    grad = incoming(tensors)
    everything = kernels.backward(grad, *tensors, True, True)
    for needs in ((True, False), (False, True), (True, True)):
        gradients = kernels.backward(grad, *tensors, *needs)
        for gradient, all_of_them, need in zip(gradients, everything, needs, strict=True):
            assert torch.equal(gradient, all_of_them) if need else gradient.numel() == 0
    assert interpreter.launches.count("gradient_kernel") == 6


@pytest.mark.interpreted
def test_memory_is_linear_in_the_pixels(interpreter: Interpreter):
    tensors = Views("", (9, 8, 7), 16, batch=1).tensors()
    with LargestStorage() as seen:
        with_kernels(tensors, incoming(tensors))
    assert seen.bytes == 4 * 504 * 16  # fp32 rows, of 16 channels


# --- compiled -------------------------------------------------------------------------------------------------
def build(name: str, arch: int, coords: str = "*fp32", own: bool = True, **others: int) -> Build:
    arguments = {
        "boxes": ("coords_ptr", "boxes_ptr"),
        "forward": (
            *("query_ptr", "key_ptr", "query_coords_ptr", "key_coords_ptr", "query_boxes_ptr", "key_boxes_ptr"),
            *("radius_ptr", "sums_ptr", "counts_ptr"),
        ),
        "gradient": (
            *("other_ptr", "weight_ptr", "coords_ptr", "other_coords_ptr", "boxes_ptr", "other_boxes_ptr"),
            *("radius_ptr", "grad_ptr"),
        ),
    }[name]
    places = ("coords", "boxes", "radius")
    signature = {a: coords if any(p in a for p in places) else "*fp32" for a in arguments}
    constants: dict[str, object] = {"AXES": 3, "BLOCK": kernels.BLOCK}
    if name != "boxes":
        constants |= {"C": 64, "BLOCK_C": kernels.BLOCK_C}
    if name == "gradient":
        constants["OWN_WEIGHT"] = own
    for size in ("N",) if name == "boxes" else ("N", "M"):
        if size not in others:
            signature[size] = "i32"
    kernel = f"medaccel.ops.pixel_consistency.triton:{name}_kernel"
    return Build(kernel, arch, signature, constants | others, kernels.NUM_WARPS, 1, fp_fusion=False)


KERNELS = ("boxes", "forward", "gradient")


def test_the_kernels_fit_every_architecture_without_spills(triton_cache: Path):
    builds = [build(name, arch, coords) for name in KERNELS for arch in ARCHS for coords in ("*fp32", "*fp64")]
    for arch in ARCHS:
        builds += [build("forward", arch, C=channels, AXES=axes) for channels, axes in ((48, 1), (304, 2))]
        builds.append(build("gradient", arch, own=False, C=48))
    builds += [build(name, 90, N=1, M=1) for name in ("forward", "gradient")]  # constants for Triton
    results = compile_all(builds, triton_cache)
    # sm_86 and consumer GPUs run the same tiles in 99 KiB.
    assert_resources(results, shared=dict.fromkeys(ARCHS, 99 * 1024))
    assert not any(result.atomics for result in results)
    assert max(result.registers for result in results) <= 168  # three blocks of four warps an SM


def test_distances_are_not_contracted(triton_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Contracted distances would choose other pairs at the radius itself than the reference does."""
    launches = []

    class Recorder:
        def __getitem__(self, grid: object) -> object:
            return lambda *arguments, **options: launches.append(options["enable_fp_fusion"])

    for name in KERNELS:
        monkeypatch.setattr(kernels, f"{name}_kernel", Recorder())
    tensors = CASES[0].tensors()
    with_kernels(tensors, incoming(tensors))
    assert launches == [False] * 7
    # Without channels there are no products but the distances'.
    distances = build("forward", 90, C=0)
    alone, contracted, whole = compile_all(
        [distances, replace(distances, fp_fusion=True), build("forward", 90)], triton_cache
    )
    assert alone.contractions == 0
    assert contracted.contractions > 0
    assert whole.contractions > 0  # the product's own


@pytest.mark.parametrize(
    ("dtype", "sentence"),
    [
        (torch.float64, "the Triton kernel computes in fp32 and has none for torch.float64"),
        (torch.float32, "cuda:6 is sm_75; the Triton kernel needs sm_80 or newer"),
    ],
)
def test_what_the_kernel_does_not_serve_is_said(dtype: torch.dtype, sentence: str, monkeypatch: pytest.MonkeyPatch):
    class OnGPU(torch.Tensor):
        device = torch.device("cuda:6")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    query = torch.empty(1, 2, 300).as_subclass(OnGPU)
    assert str(unsupported(query, query.to(dtype))).startswith(sentence)
    assert str(unsupported(query.to(dtype))).startswith(sentence)
