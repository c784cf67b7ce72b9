# SPDX-License-Identifier: Apache-2.0
"""Runs Triton's interpreter with bfloat16 made right and every memory access checked.

    with interpreting() as interpreter:
        y = scale_bias(x, scale, bias)          # launches @triton.jit kernels on CPU tensors
    interpreter.assert_written(y=y)

The process must have TRITON_INTERPRET=1 since before Triton's import: `pytest.mark.interpreted` sees to that.

Triton has no public way to observe an interpreted kernel. The private names that are used, all here:
`triton.runtime.interpreter`: `InterpreterBuilder` (its operations are overridden in a subclass),
`interpreter_builder` (the one instance, which becomes that subclass), `GridExecutor` (one launch),
`ReduceScanOpInterface.apply`, `TensorHandle`; `triton._C.libtriton.ir`: `ROUNDING_MODE`, `INPUT_PRECISION`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as upstream

from . import bfloat16
from .errors import DeviceAssertion, IntegerOverflow, KernelFault, Unmodelled, UnsupportedTriton, UnwrittenOutput
from .shadow import Shadow, Site, describe_site, element_addresses

SUPPORTED = ((3, 5), (3, 9))
_TRITON_FOLDER = os.path.dirname(triton.__file__) + os.sep

# The operations below must exist upstream, else overriding them would silently do nothing.
_OVERRIDDEN = (
    "create_masked_load",
    "create_masked_store",
    "create_atomic_rmw",
    "create_atomic_cas",
    "create_assert",
    "create_descriptor_load",
    "binary_op",
    "unary_op",
    "ternary_op",
    "create_fma",
    "create_dot",
    "cast_impl",
    "create_fp_to_fp",
    "set_grid_dim",
)


def check_triton_version() -> None:
    """Raises UnsupportedTriton where the private names that this file rests on are not known to be right."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    low, high = SUPPORTED
    missing = [name for name in _OVERRIDDEN if not hasattr(upstream.InterpreterBuilder, name)]
    for name in ("interpreter_builder", "GridExecutor", "TensorHandle", "ReduceScanOpInterface"):
        if not hasattr(upstream, name):
            missing.append(name)
    if missing or not low <= version <= high:
        raise UnsupportedTriton(
            f"triton {triton.__version__}: the checked interpreter knows the internals of "
            f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
            + (f"; gone from triton.runtime.interpreter: {', '.join(missing)}" if missing else "")
            + "; compare the private names listed in interpret.py with the new version and extend SUPPORTED"
        )
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise UnsupportedTriton(
            f"triton {triton.__version__} with numpy {np.__version__}: the interpreter of Triton 3.5 and 3.6 "
            "fails at run-time loop bounds with numpy 2.4 and newer (install numpy<2.4 or Triton 3.7 to 3.9)"
        )


def _site() -> Site:
    """Returns the innermost line of kernel code on the stack."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_TRITON_FOLDER) and file != __file__:
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _active(mask: Any, shape: tuple[int, ...]) -> Any:
    return np.ones(shape, bool) if mask is None else np.broadcast_to(np.asarray(mask.data, bool), shape)


def _split(x: Any) -> tuple[Any, Any]:
    """Splits float32 numbers into two of TF32, whose sum they nearly are."""
    large = bfloat16.round_to_tf32(x.data)
    small = bfloat16.round_to_tf32(x.data - large)
    return upstream.TensorHandle(large, tl.float32), upstream.TensorHandle(small, tl.float32)


class _CheckedBuilder(upstream.InterpreterBuilder):
    """Executes a kernel's operations; holds, while a kernel runs, the launch and its shadow memory."""

    shadow: Shadow
    mend_bf16: bool

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(nx, ny, nz)
        self.shadow.grid = (nx, ny, nz)

    # Memory: what a lane touches is checked before it is touched.

    def _access(self, kind: str, pointers: Any, mask: Any, values: Any = None) -> None:
        element = pointers.get_element_ty()
        width = max(1, element.primitive_bitwidth // 8)
        active = _active(mask, pointers.data.shape)
        stored = None if values is None else np.broadcast_to(values.data, pointers.data.shape)[active]
        self.shadow.access(kind, pointers.data[active], width, self.grid_idx, _site(), stored)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        self._access("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, other, *args, **kwargs)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        self._access("store", ptrs, mask, value)
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, *args: Any) -> Any:
        if val.dtype.scalar == tl.bfloat16:
            self._refuse("an atomic on bfloat16 adds raw bits here: accumulate in float32")
        self._access("atomic", ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *args)

    def create_atomic_cas(self, ptr: Any, *args: Any) -> Any:
        self._access("atomic", ptr, None)
        return super().create_atomic_cas(ptr, *args)

    def create_atomic_load(self, *args: Any) -> Any:
        self._refuse("tl.atomic_load is not modelled")

    def create_atomic_store(self, *args: Any) -> Any:
        self._refuse("tl.atomic_store is not modelled")

    def create_atomic_poll(self, *args: Any) -> Any:
        self._refuse("tl.atomic_poll is not modelled: programs run one after the other here")

    def create_descriptor_load(self, desc: Any, *args: Any, **kwargs: Any) -> Any:
        if desc.padding == ir.PADDING_OPTION.PAD_NAN and desc.base.get_element_ty() == tl.bfloat16:
            self._refuse("a bfloat16 descriptor with NaN padding reads zeros here: pad with zeros")
        return super().create_descriptor_load(desc, *args, **kwargs)

    def create_assert(self, condition: Any, message: str) -> None:
        if bool(np.asarray(condition.data).all()):
            return
        kind = IntegerOverflow if "overflow detected" in message else DeviceAssertion
        raise kind(message, kernel=self.shadow.kernel, program=self.grid_idx, site=describe_site(_site()))

    def _refuse(self, reason: str) -> None:
        site = describe_site(_site())
        raise Unmodelled(reason, kernel=self.shadow.kernel, program=self.grid_idx, site=site)

    # bfloat16: upstream holds its patterns as uint16 and computes on them as if they were integers.

    def _is_bf16(self, *operands: Any) -> bool:
        return self.mend_bf16 and any(operand.dtype.scalar == tl.bfloat16 for operand in operands)

    def _float32(self, operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand.data
        return bfloat16.decode(operand.data)

    def _rounded(self, values: Any) -> Any:
        return upstream.TensorHandle(bfloat16.encode(np.asarray(values, np.float32)), tl.bfloat16)

    def get_bf16(self, value: float) -> Any:
        return self._rounded(np.array([value]))  # absent before 3.9

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if not self._is_bf16(lhs):
            return super().binary_op(lhs, rhs, op)
        result = op(self._float32(lhs), self._float32(rhs))
        return upstream.TensorHandle(result, tl.int1) if result.dtype == np.bool_ else self._rounded(result)

    def unary_op(self, arg: Any, op: Callable[..., Any]) -> Any:
        return self._rounded(op(self._float32(arg))) if self._is_bf16(arg) else super().unary_op(arg, op)

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Callable[..., Any]) -> Any:
        if op is np.where or not self._is_bf16(other):  # a selection moves patterns and needs no arithmetic
            return super().ternary_op(lhs, rhs, other, op)
        return self._rounded(op(self._float32(lhs), self._float32(rhs), self._float32(other)))

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if not self._is_bf16(z):
            return super().create_fma(x, y, z)
        product = self._float32(x).astype(np.float64) * self._float32(y)  # 16 bits: exact
        return self._rounded(product + self._float32(z))

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if not self.mend_bf16 or tl.bfloat16 not in (source, target):
            return super().cast_impl(src, dst_type)
        if target != tl.bfloat16:
            return super().cast_impl(upstream.TensorHandle(self._float32(src), tl.float32), dst_type)
        if source == tl.float64:
            self._refuse("float64 to bfloat16 would be rounded twice here: go through float32")
        return self._rounded(self._float32(src))

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        modelled = (tl.bfloat16, tl.float16, tl.float32)
        if not self.mend_bf16 or tl.bfloat16 not in (source, target) or {source, target} - set(modelled):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        if target == tl.bfloat16 and rounding_mode == ir.ROUNDING_MODE.RTZ:
            values = np.asarray(self._float32(src), np.float32)
            return upstream.TensorHandle(bfloat16.encode(values, toward_zero=True), tl.bfloat16)
        return self.cast_impl(src, dst_type)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if self._is_bf16(a, b):
            a, b = (upstream.TensorHandle(self._float32(operand), tl.float32) for operand in (a, b))
        elif a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            a, b = (upstream.TensorHandle(bfloat16.round_to_tf32(x.data), tl.float32) for x in (a, b))
        elif a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32x3:
            (a, small_a), (b, small_b) = _split(a), _split(b)
            for pair in ((small_a, b), (a, small_b)):
                d = super().create_dot(*pair, d, input_precision, max_num_imprecise_acc)
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)

    def create_dot_scaled(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse("tl.dot_scaled is not modelled")


class Interpreter:
    """Knows what a block of interpreted launches may do, and what it has written.

    Args:
        bounds: report accesses outside every tensor argument.
        races: report elements that several programs touch, one of them storing.
        overflow: report overflow of integers of up to 32 bits, and failed `tl.device_assert`.
        mend_bf16: compute bfloat16 as hardware does; False is Triton's own interpreter, for the proof that
            it is wrong.
    """

    def __init__(
        self, *, bounds: bool = True, races: bool = True, overflow: bool = True, mend_bf16: bool = True
    ) -> None:
        self.bounds, self.races, self.overflow, self.mend_bf16 = bounds, races, overflow, mend_bf16
        self.launches: list[str] = []  # kernel names, in order
        self._arguments: list[torch.Tensor] = []  # kept alive: a freed address could come back as another output
        self._written: list[Any] = []

    def assert_written(self, **outputs: torch.Tensor) -> None:
        """Raises UnwrittenOutput unless each tensor's every element was stored by some launch."""
        written = np.concatenate([np.empty(0, np.uint64), *self._written])
        for name, tensor in outputs.items():
            addresses = element_addresses(tensor)
            holes = np.flatnonzero(~np.isin(addresses, written))
            if holes.size:
                first = tuple(int(i) for i in np.unravel_index(holes[0], tensor.shape))
                launches = ", ".join(dict.fromkeys(self.launches)) or "no kernel"
                raise UnwrittenOutput(
                    f"{name}: {holes.size} of {addresses.size} elements were stored by no program ({launches} "
                    f"ran); the first is {name}[{', '.join(map(str, first))}]"
                )

    def launch(self, executor: _CheckedExecutor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs one launch with this interpreter's checks."""
        named = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = dict(_tensors(named))
        builder = upstream.interpreter_builder
        builder.shadow = Shadow(executor.fn.__name__, tensors, bounds=self.bounds, races=self.races)
        self.launches.append(executor.fn.__name__)
        self._arguments.extend(tensors.values())
        try:
            with np.errstate(all="ignore"):  # inf and NaN in masked lanes are no news on a GPU
                executor.run_all(*args, **kwargs)
        except triton.runtime.errors.TritonError as error:
            fault: BaseException | None = error
            while fault is not None and not isinstance(fault, KernelFault):
                fault = fault.__cause__
            raise error if fault is None else fault from None
        finally:
            self._written.append(builder.shadow.written_addresses())


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, (tuple, list)):
            yield from _tensors({f"{name}[{i}]": item for i, item in enumerate(value)})
        elif hasattr(value, "base"):  # a TensorDescriptor or a reinterpreted tensor
            yield from _tensors({name: value.base})
        if isinstance(value, torch.Tensor):
            yield name, value


class _CheckedExecutor(upstream.GridExecutor):
    """One launch; the class attribute is the interpreter in charge."""

    interpreter: Interpreter

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.interpreter.launch(self, args, kwargs)

    def run_all(self, *args: Any, **kwargs: Any) -> None:
        positional = [self._scalar(name, value) for name, value in zip(self.arg_names, args, strict=False)]
        super().__call__(*positional, **{name: self._scalar(name, value) for name, value in kwargs.items()})

    def _scalar(self, name: str, value: Any) -> Any:
        """A run-time float as the float32 that a compiled kernel gets.

        Upstream passes the Python float, which takes its partner's type: x * alpha would be computed in
        float16 here and in float32 on the GPU.
        """
        if not isinstance(value, float) or name in self.constexprs:
            return value
        return tl.tensor(upstream.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)


def _apply_reduction(self: Any, operands: Any) -> Any:
    for operand in operands if isinstance(operands, tuple) else (operands,):
        if isinstance(operand, tl.tensor) and operand.dtype.scalar == tl.bfloat16:
            upstream.interpreter_builder._refuse(
                "a reduction or scan in bfloat16 rounds at every step, in the hardware's order: cast to float32"
            )
    return _upstream_apply(self, operands)


_upstream_apply = upstream.ReduceScanOpInterface.apply


@contextlib.contextmanager
def _nan_filled_memory() -> Iterator[None]:
    """Fresh memory is NaN (integers: the largest value), so that an element nobody wrote shows."""
    # The same switch as torch.use_deterministic_algorithms, which spends three seconds on importing Inductor.
    switches: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), switches.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        switches.fill_uninitialized_memory = fill


@contextlib.contextmanager
def interpreting(**checks: bool) -> Iterator[Interpreter]:
    """Runs the Triton kernels that are launched inside on CPU tensors, checked.

    Args:
        checks: switches of `Interpreter`, all on by default.

    Raises:
        UnsupportedTriton: Triton's version, or TRITON_INTERPRET was not set when it was imported.
        KernelFault: (a subclass, from inside the block) what a kernel did wrong.
    """
    check_triton_version()
    if not isinstance(tl.sum, upstream.InterpretedFunction):
        raise UnsupportedTriton(
            "interpreting: this process imported Triton without TRITON_INTERPRET=1, so its kernels are compiled "
            "ones (mark the test with pytest.mark.interpreted, which runs it in a process of its own)"
        )
    interpreter = Interpreter(**checks)
    builder = upstream.interpreter_builder
    plain, options = type(builder), builder.options
    executor = type("_Executor", (_CheckedExecutor,), {"interpreter": interpreter})
    builder.__class__, builder.mend_bf16 = _CheckedBuilder, interpreter.mend_bf16
    builder.options = dataclasses.replace(options, debug=interpreter.overflow)
    saved_executor, upstream.GridExecutor = upstream.GridExecutor, executor
    if interpreter.mend_bf16:
        upstream.ReduceScanOpInterface.apply = _apply_reduction
    try:
        with _nan_filled_memory():
            yield interpreter
    finally:
        upstream.ReduceScanOpInterface.apply = _upstream_apply
        upstream.GridExecutor = saved_executor
        builder.options = options
        builder.__class__ = plain
