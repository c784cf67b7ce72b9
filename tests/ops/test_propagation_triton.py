# SPDX-License-Identifier: Apache-2.0
"""Tests pixel propagation's GPU kernels: executed on the CPU with every access checked, compiled for each
architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted here")

from medaccel.ops.propagation import op, reference, unsupported
from medaccel.ops.propagation import triton as kernels
from medaccel.ops.propagation.cases import Case, named
from tests.ops.checks import assert_twice_as_good, poisoned_memory
from tests.ops.largest import LargestStorage
from tests.triton_interpretation.aot import ARCHS, Build, assert_resources, compile_all

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from tests.triton_interpretation.interpret import Interpreter

HALF = (torch.bfloat16, torch.float16)
CASES = [
    *(Case(f"power_{power}", (2, 67, 19, 33), power) for power in (1.0, 2.0, 3.0, 2.5, 40.0)),
    Case("wide", (1, 40, 130, 64)),
    Case("widest", (1, 33, 200, 256)),
    *map(named, ("one_pixel", "one_channel", "no_values", "empty_batch", "no_pixels")),
]
FLOOR = {torch.float32: 3e-7, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


def with_kernels(tensors: tuple[Tensor, ...], power: float, interpreter: Interpreter | None = None) -> list[Tensor]:
    """The propagated values and the gradients to features and values."""
    x, v, g = tensors
    with poisoned_memory():
        y = op._forward_cuda(x, v, power)
        gradients = op._backward_cuda(g, x, v, power, True, True)
    if interpreter is not None and v.numel():
        interpreter.assert_written(y=y)
    return [y, *gradients]


def with_autograd(tensors: tuple[Tensor, ...], power: float) -> list[Tensor]:
    x, v = (t.detach().clone().requires_grad_() for t in tensors[:2])
    y = reference.pixel_propagation(x, v, power)
    return [y.detach(), *torch.autograd.grad(y, (x, v), tensors[2].to(y))]


def in_half(tensors: tuple[Tensor, ...], power: float, dtype: torch.dtype) -> list[Tensor]:
    """Computes in half precision as PyTorch trains: products of rounded factors, the rest in fp32."""
    x, v = (t.float().requires_grad_() for t in tensors[:2])
    unit = reference.unit(x).to(dtype)
    cosines = (unit @ unit.transpose(1, 2)).float()
    unlike = cosines <= 0
    weights = cosines.masked_fill(unlike, 1).pow(power).masked_fill(unlike, 0)
    y = (weights.to(dtype) @ v.to(dtype)).float()
    return [y.detach(), *torch.autograd.grad(y, (x, v), tensors[2].float())]


def flow(tensors: tuple[Tensor, ...], power: float) -> float:
    """The size of a term of the features' gradient; the terms cancel."""
    x, v, g = (t.double() for t in tensors)
    return float(g.abs().max() * v.abs().max() * v.shape[2] * power / x.norm(dim=-1).min()) if v.numel() else 0.0


def largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.float32, id=f"{case}-fp32") for case in CASES),
        *(pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}") for case in CASES[:6] for dtype in HALF),
    ],
)
def test_output_and_gradients_match_the_fp64_reference(interpreter: Interpreter, case: Case, dtype: torch.dtype):
    tensors = case.tensors(dtype)
    ours = with_kernels(tensors, case.power, interpreter)
    truth = with_autograd(tuple(t.double() for t in tensors), case.power)
    plain = with_autograd(tensors, case.power) if dtype == torch.float32 else in_half(tensors, case.power, dtype)
    for i, size in ((0, 1.0), (1, flow(tensors, case.power)), (2, 1.0)):
        assert ours[i].dtype == dtype
        assert_twice_as_good(ours[i], plain[i], truth[i], FLOOR[dtype], max(size, largest(truth[i])))


@pytest.mark.interpreted
@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
def test_products_of_fp32_follow_torchs_precision(
    interpreter: Interpreter, precision: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "dot_precision", lambda dtype: precision)
    case = Case("", (2, 67, 19, 33))
    tensors = case.tensors()
    ours, truth = with_kernels(tensors, case.power), with_autograd(tuple(t.double() for t in tensors), case.power)
    unit = 4e-7 if precision == "tf32x3" else 2.0**-10
    for actual, exact, size in zip(ours, truth, (1.0, flow(tensors, case.power), 1.0), strict=True):
        error = float((actual - exact).abs().max())
        assert error <= 3 * unit * max(size, largest(exact))
        assert precision == "tf32x3" or error > 1e-6 * largest(exact)
    for power, channels in ((2.5, 19), (2.0, 130)):  # what three products don't serve is multiplied in fp32
        problem = kernels._Problem(tensors[0].repeat(1, 1, channels // 19 + 1), tensors[1], power)
        assert problem.precision == ("ieee" if precision == "tf32x3" else precision)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.bfloat16, 1e25), (torch.float16, 1e-3)]
)
def test_the_scale_of_the_features_and_of_the_values_changes_no_direction(
    interpreter: Interpreter, dtype: torch.dtype, scale: float
):
    case = Case("", (1, 40, 12, 8))
    x, v, g = case.tensors(torch.float64)
    x[0, 1] = 0
    y, by_x, by_v = (t.double() for t in with_kernels((x.to(dtype), v.to(dtype), g.to(dtype)), 2.0))
    eps = 8 * torch.finfo(dtype).eps
    scaled = with_kernels(((x * scale).to(dtype), v.to(dtype), g.to(dtype)), 2.0)
    moved = with_kernels((x.to(dtype), (v * scale).to(dtype), g.to(dtype)), 2.0)
    for actual, expected in (
        (scaled[0].double(), y),
        (scaled[1].double() * scale, by_x),
        (moved[0].double() / scale, y),
        (moved[1].double() / scale, by_x),
        (moved[2].double(), by_v),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=eps * float(expected.abs().max()))
    assert not scaled[1][0, 1].any()


@pytest.mark.interpreted
def test_what_flows_may_leave_fp16s_range(interpreter: Interpreter):
    """A gradient scaler's factor: g · v is beyond 65504, and the features' gradient, over their length, is not."""
    x, v, g = Case("", (1, 40, 12, 8)).tensors(torch.float64)
    tensors = tuple(t.half() for t in (x * 2000, v * 100, g * 2000))
    ours, truth = with_kernels(tensors, 2.0)[1], with_autograd(tuple(t.double() for t in tensors), 2.0)[1]
    assert float((tensors[2].double() @ tensors[1].double().mT).abs().max()) > 2 * 65504
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=4e-3 * float(truth.abs().max()))


@pytest.mark.interpreted
@pytest.mark.parametrize("power", [1.0, 2.0, 1 + 1e-9, 1.5, 3e38])
def test_zero_and_opposite_vectors_take_nothing_and_a_nan_reaches_its_sample(interpreter: Interpreter, power: float):
    x, v, g = Case("", (2, 40, 6, 5)).tensors()
    x[0, 7] = 0
    x[0, 9] = -x[0, 8]
    y, by_x, by_v = with_kernels((x, v, g), power)
    assert not y[0, 7].any()
    assert not by_x[0, 7].any()
    assert all(t.isfinite().all() for t in (y, by_x, by_v)) or power > 2
    x[1, 3, 2] = torch.nan
    z, with_nan, _ = with_kernels((x, v, g), power)
    assert torch.equal(z[0], y[0]) or power > 2
    assert z[1].isnan().all()
    assert with_nan[1].isnan().all()
    assert not with_nan[0].isnan().any() or power > 2


@pytest.mark.interpreted
def test_repeated_gradients_have_the_same_bits_and_only_wanted_ones_are_made(interpreter: Interpreter):
    x, v, g = CASES[1].tensors()
    everything = kernels.backward(g, x, v, 2.0, True, True)
    assert torch.equal(kernels.forward(x, v, 2.0), kernels.forward(x, v, 2.0))
    for needs in ((True, False), (False, True), (True, True)):
        gradients = kernels.backward(g, x, v, 2.0, *needs)
        for gradient, all_of_them, need in zip(gradients, everything, needs, strict=True):
            assert torch.equal(gradient, all_of_them) if need else gradient.numel() == 0
    assert interpreter.launches.count("features_kernel") == 3


@pytest.mark.interpreted
def test_views_gradients_without_strides_and_mixed_dtypes_are_taken(interpreter: Interpreter):
    x, v, _ = Case("", (2, 40, 8, 6)).tensors()
    views = (x.mT.contiguous().mT, v.expand(2, -1, -1)[:, :, ::2], torch.ones(()).expand(2, 40, 3))
    dense = tuple(t.contiguous() for t in views)
    for a, b in zip(with_kernels(views, 2.0), with_kernels(dense, 2.0), strict=True):
        assert torch.equal(a, b)
    mixed = (x, v.bfloat16(), v.bfloat16())
    exact = with_kernels(tuple(t.float() for t in mixed), 2.0)
    for a, b, dtype in zip(
        with_kernels(mixed, 2.0), exact, (torch.bfloat16, torch.float32, torch.bfloat16), strict=True
    ):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_linear_in_the_pixels(interpreter: Interpreter, dtype: torch.dtype):
    pixels = 500
    x, v, g = Case("", (1, pixels, 16, 16)).tensors(dtype)
    with LargestStorage() as seen:
        with_kernels((x, v, g), 2.0)
    assert seen.bytes == 4 * pixels * 16  # fp32 rows, of 16 channels


# --- compiled -------------------------------------------------------------------------------------------------
POINTERS = {"half": "*bf16", "tf32": "*fp32", "tf32x3": "*fp32", "ieee": "*fp32"}


def build(
    name: str, arch: int, precision: str, channels: int, values: int, dtype: str | None = None, power: int = 2
) -> Build:
    widest = kernels.padded_channels(max(channels, values))
    tile = kernels.TILES[precision][widest][name]
    signature = dict.fromkeys(("unit_ptr", "value_ptr", "grad_ptr"), dtype or POINTERS[precision])
    signature |= {"sums_ptr": "*fp32" if name == "features" else signature["unit_ptr"], "N": "i32", "power": "fp32"}
    if name == "sum":
        del signature["grad_ptr"]
    width = channels if name == "features" else values
    constants: dict[str, object] = {
        "C": channels,
        "D": values,
        "WIDTH": width,
        "BLOCK": kernels.padded_channels(width),
    }
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "POWER": power}
    constants["PRECISION"] = "ieee" if precision == "half" else precision
    kernel = f"medaccel.ops.propagation.triton:{name}_kernel"
    return Build(kernel, arch, signature, constants, tile.num_warps, tile.num_stages)


NAMES = ("sum", "features")


def widest_of_each_tile(widths: dict[int, dict[str, kernels.Tile]], name: str) -> list[int]:
    """The channels of each distinct tile at its widest: fewer need less of everything."""
    return list({tiles[name]: channels for channels, tiles in widths.items()}.values())


def test_every_tile_fits_every_architecture_without_spills(triton_cache: Path):
    builds = [
        build(name, arch, precision, channels, channels)
        for name in NAMES
        for arch in ARCHS
        for precision, widths in kernels.TILES.items()
        for channels in widest_of_each_tile(widths, name)
    ]
    # fp16's own product; any power; channels that fill no block; unequal widths; one pixel, a constant for Triton.
    builds += [build("features", arch, "half", 64, 64, "*fp16") for arch in ARCHS]
    builds += [build("features", 80, "half", n, n, "*fp16") for n in (32, 128, 256)]
    for name in NAMES:
        builds += [build(name, 80, precision, 64, 64, power=0) for precision in ("half", "tf32", "ieee")]
        builds += [build(name, 80, precision, n, n) for precision in ("half", "ieee") for n in (48, 144)]
        builds += [build(name, 80, "half", n, m) for n, m in ((16, 256), (256, 16))]
        ragged = build(name, 80, "half", 48, 48)  # rows of 37 channels, filled up
        builds.append(replace(ragged, constants={**ragged.constants, "WIDTH": 37}))
        sound = build(name, 90, "half", 64, 64)
        one = {key: kind for key, kind in sound.signature.items() if key != "N"}
        builds.append(replace(sound, signature=one, constants={**sound.constants, "N": 1}))
    results = compile_all(builds, triton_cache)
    # sm_86 and consumer GPUs run the same tiles in 99 KiB.
    assert_resources(results, shared=dict.fromkeys(ARCHS, 99 * 1024))
    for result in results:
        assert not result.atomics
        assert bool(result.matrix_instructions) == (
            result.build.constants["PRECISION"] != "ieee" or (result.build.signature["unit_ptr"] != "*fp32")
        )
        if result.build.arch >= 90 and result.build.constants["C"] == 64:
            blocks = 65536 // (result.registers * 32 * result.build.num_warps)
            assert blocks >= 2, f"{result.build}: {result.registers} registers leave {blocks} block an SM"


@pytest.mark.parametrize(
    ("dtype", "channels", "values", "sentence"),
    [
        (torch.float64, 64, 64, "the Triton kernel computes in fp32 and has none for torch.float64"),
        (torch.float32, 64, 300, "the Triton kernel has up to 256 channels, not 300"),
        (torch.float32, 300, 64, "the Triton kernel has up to 256 channels, not 300"),
        (torch.float32, 64, 64, "cuda:5 is sm_75; the Triton kernel needs sm_80 or newer"),
    ],
)
def test_what_the_kernel_does_not_serve_is_said(
    dtype: torch.dtype, channels: int, values: int, sentence: str, monkeypatch: pytest.MonkeyPatch
):
    class OnGPU(torch.Tensor):
        device = torch.device("cuda:5")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    x = torch.empty(1, 2, channels).as_subclass(OnGPU)
    v = torch.empty(1, 2, values, dtype=dtype).as_subclass(OnGPU)
    assert str(unsupported(x, v)).startswith(sentence)
    assert str(unsupported(x.to(dtype) if dtype == torch.float64 else x, v)).startswith(sentence)
