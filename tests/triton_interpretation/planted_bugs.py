# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Plants one fault in each kernel, on the line marked BUG, and has their sound twins: the checkers' own test.

Every kernel works on one-dimensional tensors with BLOCK elements a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block(BLOCK: tl.constexpr):
    return tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_without_mask(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = block(BLOCK)
    x = tl.load(x_ptr + at)  # BUG: load_without_mask
    tl.store(y_ptr + at, x, mask=at < n)


@triton.jit
def load_before_start(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = block(BLOCK)
    left = tl.load(x_ptr + at - 1, mask=at < n, other=0.0)  # BUG: load_before_start
    tl.store(y_ptr + at, left, mask=at < n)


@triton.jit
def store_without_mask(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = block(BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + at, x)  # BUG: store_without_mask


@triton.jit
def store_one_too_far(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = block(BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + at + 1, x, mask=at < n)  # BUG: store_one_too_far


@triton.jit
def stored_by_a_helper(y_ptr, at):
    tl.store(y_ptr + at, at)  # BUG: helper_without_mask


@triton.jit
def helper_without_mask(y_ptr, n, BLOCK: tl.constexpr):
    stored_by_a_helper(y_ptr, block(BLOCK))


@triton.jit
def all_programs_store_one_block(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = block(BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + tl.arange(0, BLOCK), x)  # BUG: all_programs_store_one_block


@triton.jit
def left_neighbour(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """A race only where x and y are one tensor."""
    at = block(BLOCK)
    left = tl.load(x_ptr + at - 1, mask=(at > 0) & (at < n), other=0.0)  # BUG: left_neighbour
    tl.store(y_ptr + at, left, mask=at < n)


@triton.jit
def right_neighbour(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """The write comes after the read of another program: a race only where x and y are one tensor."""
    at = block(BLOCK)
    right = tl.load(x_ptr + at + 1, mask=at + 1 < n, other=0.0)
    tl.store(y_ptr + at, right, mask=at < n)  # BUG: right_neighbour


@triton.jit
def histogram(x_ptr, y_ptr, n, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    at = block(BLOCK)
    total = tl.sum(tl.load(x_ptr + at, mask=at < n, other=0.0))
    if ATOMIC:
        tl.atomic_add(y_ptr, total)
    else:
        tl.store(y_ptr, tl.load(y_ptr) + total)  # BUG: histogram


@triton.jit
def atomic_and_plain(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr, 1.0)
    if tl.program_id(0) == 1:
        tl.store(y_ptr, 0.0)  # BUG: atomic_and_plain


@triton.jit
def lanes_collide(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = block(BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + at // 2, x, mask=at < n)  # BUG: lanes_collide


@triton.jit
def tail_never_stored(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = block(BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(y_ptr + at, x, mask=at < n - 3)


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = block(BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def offset_in_int32(x_ptr, y_ptr, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    batch = tl.program_id(0)
    if WIDE:
        batch = batch.to(tl.int64)
    start = batch * stride  # BUG: offset_in_int32
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + at, tl.load(x_ptr + start + at))


@triton.jit
def asserts_positive(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = block(BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=1.0)
    tl.device_assert(x > 0, "x must be positive")  # BUG: asserts_positive
    tl.store(y_ptr + at, x, mask=at < n)


@triton.jit
def sum_in_storage_dtype(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < n, other=0.0)
    tl.store(y_ptr, tl.sum(x))  # BUG: sum_in_storage_dtype


@triton.jit
def scale_in_storage_dtype(x_ptr, y_ptr, n, alpha, beta, BLOCK: tl.constexpr):
    """alpha and beta are run-time floats: compiled, the products are float32, whatever x's type."""
    at = block(BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + at, x * alpha * beta, mask=at < n)


@triton.jit
def binary_in_storage_dtype(a_ptr, b_ptr, y_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if OPERATION == "add":
        y = a + b
    elif OPERATION == "sub":
        y = a - b
    elif OPERATION == "mul":
        y = a * b
    elif OPERATION == "div":
        y = a / b
    elif OPERATION == "max":
        y = tl.maximum(a, b)
    elif OPERATION == "less":
        y = (a < b).to(a.dtype)
    elif OPERATION == "fma":
        y = tl.fma(a, b, a)
    elif OPERATION == "negate":
        y = -a
    elif OPERATION == "clamp":
        y = tl.clamp(a, -1.0, 1.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))


@triton.jit
def convert(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n).to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def square_product(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(c_ptr + at, c)


@triton.jit
def never_compiles(x_ptr):
    tl.static_assert(False, "static assertion on purpose")


# Faults that only a compiled kernel shows


@triton.jit
def spills(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over both axes need the whole tile at once: too much for the registers of one warp."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + at)
    rows, columns = tl.sum(x, 1), tl.sum(x, 0)
    tl.store(y_ptr + at, (x - rows[:, None]) * (x - columns[None, :]))
