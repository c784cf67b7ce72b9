# SPDX-License-Identifier: Apache-2.0
"""Planted bugs prove that every check of the interpreter fires, on the right line, and only where it should."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted here")

from . import kernels, planted_bugs
from .errors import (
    DeviceAssertion,
    IntegerOverflow,
    KernelFault,
    LaneRace,
    OutOfBounds,
    ProgramRace,
    Unmodelled,
    UnsupportedTriton,
    UnwrittenOutput,
)
from .interpret import check_triton_version, interpreting

if TYPE_CHECKING:
    from .interpret import Interpreter

pytestmark = [pytest.mark.slow, pytest.mark.interpreted]

BLOCK = 16
N = 40  # two and a half blocks


def launch(name: str, x: torch.Tensor, y: torch.Tensor, **constants: Any) -> None:
    getattr(planted_bugs, name)[(3,)](x, y, N, BLOCK=BLOCK, **constants)


def fault_of(name: str, kind: type[KernelFault], x: torch.Tensor, y: torch.Tensor, **constants: Any) -> str:
    """The message of the fault, which must be of that kind, in that kernel, on the line marked with its name."""
    with pytest.raises(kind) as caught:
        launch(name, x, y, **constants)
    lines = Path(planted_bugs.__file__).read_text().splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if text.endswith(f"# BUG: {name}"))
    assert caught.value.kernel == name
    assert caught.value.site.startswith(f"planted_bugs.py:{line} ")
    return str(caught.value)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(1.0, N + 1)


@pytest.fixture
def y() -> torch.Tensor:
    return torch.zeros(N)


# Bounds


def test_load_without_mask_is_out_of_bounds(interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor) -> None:
    message = fault_of("load_without_mask", OutOfBounds, x, y)
    assert "program (2, 0, 0)" in message
    assert "load outside every tensor argument by 8 of 16 active lanes" in message
    assert "0 bytes past the end of x_ptr (40,)" in message


def test_load_before_the_start_is_out_of_bounds(interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor) -> None:
    assert "4 bytes before x_ptr" in fault_of("load_before_start", OutOfBounds, x, y)


def test_store_without_mask_is_out_of_bounds_and_does_not_happen(interpreter: Interpreter) -> None:
    room = torch.zeros(2 * N)
    fault_of("store_without_mask", OutOfBounds, torch.ones(N), room[:N])
    assert room[N:].eq(0).all()


def test_store_one_too_far_is_out_of_bounds(interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor) -> None:
    assert "by 1 of 8 active lanes" in fault_of("store_one_too_far", OutOfBounds, x, y)


def test_step_into_the_gap_of_a_strided_view_is_out_of_bounds(interpreter: Interpreter, y: torch.Tensor) -> None:
    every_second = torch.ones(2 * N)[::2]
    with pytest.raises(OutOfBounds, match="between the elements of x_ptr"):
        launch("copy", every_second, y)


def test_fault_in_a_device_function_names_its_line_and_the_kernel(interpreter: Interpreter) -> None:
    y = torch.zeros(N, dtype=torch.int32)
    with pytest.raises(OutOfBounds, match=r"helper_without_mask, program \(2, 0, 0\).*BUG: helper_without_mask"):
        planted_bugs.helper_without_mask[(3,)](y, N, BLOCK=BLOCK)


def test_masked_lanes_may_point_anywhere(interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor) -> None:
    planted_bugs.copy[(20,)](x, y, N, BLOCK=BLOCK)
    assert torch.equal(x, y)


def test_empty_tensors_have_no_elements_to_touch(interpreter: Interpreter) -> None:
    with pytest.raises(OutOfBounds, match="no tensor argument with elements"):
        launch("copy", torch.empty(0), torch.empty(0))


# Races


def test_programs_that_store_one_block_race(interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor) -> None:
    message = fault_of("all_programs_store_one_block", ProgramRace, x, y)
    assert "program (1, 0, 0)" in message
    assert "store of y_ptr[0] races with a store by program (0, 0, 0) at planted_bugs.py:" in message


def test_reading_what_another_program_wrote_is_a_race(interpreter: Interpreter, x: torch.Tensor) -> None:
    assert "load of x_ptr[15] races with a store" in fault_of("left_neighbour", ProgramRace, x, x)


def test_writing_what_another_program_read_is_a_race(interpreter: Interpreter, x: torch.Tensor) -> None:
    message = fault_of("right_neighbour", ProgramRace, x, x)
    assert "store of x_ptr[16] races with a load by program (0, 0, 0)" in message


@pytest.mark.parametrize("name", ["left_neighbour", "right_neighbour", "copy"])
def test_shared_reads_and_own_writes_are_no_race(
    interpreter: Interpreter, name: str, x: torch.Tensor, y: torch.Tensor
) -> None:
    launch(name, x, y)
    interpreter.assert_written(y=y)


def test_working_in_place_on_own_elements_is_no_race(interpreter: Interpreter, x: torch.Tensor) -> None:
    launch("copy", x, x)


def test_accumulating_without_atomics_is_a_race(interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor) -> None:
    fault_of("histogram", ProgramRace, x, y, ATOMIC=False)


def test_accumulating_with_atomics_is_no_race(interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor) -> None:
    launch("histogram", x, y, ATOMIC=True)
    assert y[0] == x.sum()


def test_plain_store_to_an_atomic_counter_is_a_race(
    interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor
) -> None:
    assert "races with an atomic by program" in fault_of("atomic_and_plain", ProgramRace, x, y)


def test_launches_do_not_race_with_each_other(interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor) -> None:
    launch("copy", x, y)
    launch("left_neighbour", y, x)
    assert interpreter.launches == ["copy", "left_neighbour"]


def test_lanes_that_write_different_values_to_one_element_are_reported(
    interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor
) -> None:
    assert "different values to y_ptr[0]" in fault_of("lanes_collide", LaneRace, x, y)


def test_lanes_that_write_the_same_value_are_fine(interpreter: Interpreter, y: torch.Tensor) -> None:
    planted_bugs.lanes_collide[(1,)](torch.full((N,), float("nan")), y, N, BLOCK=BLOCK)
    assert y[: BLOCK // 2].isnan().all()


# Unwritten output


def test_elements_that_no_program_stored_are_named(interpreter: Interpreter, x: torch.Tensor) -> None:
    y = torch.empty_like(x)
    launch("tail_never_stored", x, y)
    with pytest.raises(UnwrittenOutput, match=r"y: 3 of 40 elements .*tail_never_stored ran.* first is y\[37\]"):
        interpreter.assert_written(y=y)
    assert y[37:].isnan().all()
    assert not y[:37].isnan().any()


def test_an_integer_output_is_checked_too(interpreter: Interpreter, x: torch.Tensor) -> None:
    y = torch.empty(5, 8, dtype=torch.int64)
    launch("tail_never_stored", x.long(), y)
    with pytest.raises(UnwrittenOutput, match=r"first is y\[4, 5\]"):
        interpreter.assert_written(y=y)


def test_an_output_that_no_kernel_saw_counts_as_unwritten(interpreter: Interpreter) -> None:
    with pytest.raises(UnwrittenOutput, match="40 of 40 elements were stored by no program"):
        interpreter.assert_written(y=torch.zeros(N))


def test_fresh_memory_is_nan_inside_and_the_switch_is_restored_outside() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with interpreting():
        assert torch.empty(1000).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


# Integers


@pytest.fixture
def distant_samples() -> torch.Tensor:
    """Makes (3, 16) bytes with a batch stride of 2^30 + 64, of which only the touched pages take memory."""
    stride = 2**30 + 64
    no_reserve = 0x4000  # MAP_NORESERVE: in the mmap module from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, 2 * stride + BLOCK, flags=flags), dtype=torch.int8)
    samples = memory.as_strided((3, BLOCK), (stride, 1))
    samples.copy_(torch.arange(3 * BLOCK, dtype=torch.int8).view(3, BLOCK))
    return samples


def read_samples(samples: torch.Tensor, *, wide: bool) -> torch.Tensor:
    y = torch.empty(samples.shape, dtype=samples.dtype)
    planted_bugs.offset_in_int32[(3,)](samples, y, samples.stride(0), BLOCK=BLOCK, WIDE=wide)
    return y


def test_offset_beyond_int32_is_reported_where_it_overflows(
    interpreter: Interpreter, distant_samples: torch.Tensor
) -> None:
    with pytest.raises(IntegerOverflow, match=r"program \(2, 0, 0\).*BUG: offset_in_int32.*int32 overflow"):
        read_samples(distant_samples, wide=False)


def test_offset_beyond_int32_is_out_of_bounds_where_overflow_is_not_checked(
    distant_samples: torch.Tensor,
) -> None:
    with interpreting(overflow=False), pytest.raises(OutOfBounds, match="bytes before x_ptr"):
        read_samples(distant_samples, wide=False)


def test_offset_in_int64_reaches_every_sample(interpreter: Interpreter, distant_samples: torch.Tensor) -> None:
    assert torch.equal(read_samples(distant_samples, wide=True), distant_samples)


def test_device_assertion_is_reported(interpreter: Interpreter, x: torch.Tensor, y: torch.Tensor) -> None:
    x[20] = -1
    assert "x must be positive" in fault_of("asserts_positive", DeviceAssertion, x, y)


# Number formats


def storage_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def every_bfloat16() -> torch.Tensor:
    """Numbers over the whole range with all mantissas: the interpreter works on their bit patterns."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-40, 40, (4096,), generator=generator)
    return (torch.randn(4096, generator=generator) * 2.0**exponents).bfloat16()


def scaled(x: torch.Tensor, alpha: float = 1.5, beta: float = 3.0) -> torch.Tensor:
    y = torch.empty_like(x)
    planted_bugs.scale_in_storage_dtype[(1,)](x, y, x.numel(), alpha, beta, BLOCK=4096)
    return y


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div", "max", "less", "fma", "negate", "clamp"])
def test_bfloat16_arithmetic_has_the_bits_of_hardware(interpreter: Interpreter, operation: str) -> None:
    a, b = every_bfloat16(), every_bfloat16().flip(0)
    expected = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "div": lambda: a / b,
        "max": lambda: torch.maximum(a, b),
        "less": lambda: (a < b).bfloat16(),
        "fma": lambda: (a.double() * b.double() + a.double()).float().bfloat16(),
        "negate": lambda: -a,
        "clamp": lambda: a.clamp(-1.0, 1.0),
    }[operation]()
    y = torch.empty_like(a)
    planted_bugs.binary_in_storage_dtype[(1,)](a, b, y, OPERATION=operation, BLOCK=4096)
    assert torch.equal(storage_bits(y), storage_bits(expected))


def test_bfloat16_is_wrong_in_the_unmended_interpreter() -> None:
    a, b = every_bfloat16(), every_bfloat16().flip(0)
    for mended in (False, True):
        with interpreting(mend_bf16=mended):
            y = torch.empty_like(a)
            planted_bugs.binary_in_storage_dtype[(1,)](a, b, y, OPERATION="add", BLOCK=4096)
        right = storage_bits(y) == storage_bits(a + b)
        assert right.all() if mended else right.float().mean() < 0.5


def test_conversion_to_bfloat16_truncates_in_the_unmended_interpreter() -> None:
    x = torch.tensor([1 + 3 * 2**-9, 1 + 2**-8, 1 + 3 * 2**-8])  # above half, two ties
    for mended in (False, True):
        with interpreting(mend_bf16=mended):
            y = torch.empty(3, dtype=torch.bfloat16)
            planted_bugs.convert[(1,)](x, y, 3, BLOCK=4)
        assert torch.equal(y, x.bfloat16()) == mended


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.int32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_conversions_have_the_bits_of_torch(
    interpreter: Interpreter, source: torch.dtype, target: torch.dtype
) -> None:
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(4)) * 1000).to(source)
    y = torch.empty(1000, dtype=target)
    planted_bugs.convert[(1,)](x, y, 1000, BLOCK=1024)
    assert torch.equal(y, x.to(target))


def test_bfloat16_dot_is_wrong_in_the_unmended_interpreter() -> None:
    a, b = (torch.randint(-4, 5, (32, 32), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for mended in (False, True):
        with interpreting(mend_bf16=mended):
            c = kernels.matmul(a.bfloat16(), b.bfloat16())
        assert torch.equal(c, (a @ b).bfloat16()) == mended


def test_sum_in_bfloat16_is_refused(interpreter: Interpreter, x: torch.Tensor) -> None:
    half = x[:BLOCK].bfloat16()
    message = fault_of("sum_in_storage_dtype", Unmodelled, half, torch.zeros(1).bfloat16())
    assert "cast to float32" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_runtime_floats_are_float32_as_in_a_compiled_kernel(interpreter: Interpreter, dtype: torch.dtype) -> None:
    x = torch.tensor([60000.0, -3.0]).to(dtype)
    alpha, beta = 4.0, 0.25  # in float16, 60000 * 4 would be infinite
    assert torch.equal(scaled(x, alpha, beta), x)


def test_tf32_products_lose_bits_as_on_hardware(interpreter: Interpreter) -> None:
    a = torch.full((16, 16), 1 + 2**-12)
    for precision, expected in (("ieee", 1 + 2**-12), ("tf32", 1.0)):
        c = torch.empty_like(a)
        planted_bugs.square_product[(1,)](a, torch.eye(16), c, PRECISION=precision, BLOCK=16)
        assert torch.equal(c, torch.full_like(c, expected))


# The harness itself


def test_a_newer_triton_is_refused_with_the_names_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.99.0")
    with pytest.raises(UnsupportedTriton, match=r"triton 3\.99\.0: .* 3\.5 to 3\.9; compare the private names"):
        check_triton_version()


def test_a_triton_without_a_name_that_is_overridden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("triton.runtime.interpreter.InterpreterBuilder.create_masked_store")
    with pytest.raises(UnsupportedTriton, match=r"gone from triton\.runtime\.interpreter: create_masked_store"):
        check_triton_version()


def test_checks_can_be_switched_off_one_by_one(x: torch.Tensor) -> None:
    with interpreting(races=False):
        launch("left_neighbour", x, x)


def test_an_error_of_triton_itself_stays_as_it_is(interpreter: Interpreter, x: torch.Tensor) -> None:
    with pytest.raises(Exception, match="static assertion on purpose"):
        planted_bugs.never_compiles[(1,)](x)
