# SPDX-License-Identifier: Apache-2.0
"""Registers the diffusion step: schema, shapes without data, gradients, kernels per device.

Autocast has no rule here on purpose: the sampler's state keeps its precision, whatever the network computes in, and
the kernels take a half-precision `model_output` beside a float `sample` as they come.
"""

from typing import Any

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops._arguments import FLOATING, filled
from medaccel.ops._operands import Operands
from medaccel.ops._registration import register_gradients
from medaccel.ops._transforms import host_values
from medaccel.ops.diffusion_step import native

_lib = torch.library.Library("medaccel", "FRAGMENT")
# coefficients: float64 (9, B) or (9, 1), rows a b c d e f s guide_scale guide_std; key: int64 (3,), seed, offset and
# sample_offset. Both are tensors, each on either device, so that a new value compiles nothing anew. If need_x0 is
# false, the second output is empty.
_lib.define(
    "diffusion_step(Tensor sample, Tensor? model_output, Tensor? previous, Tensor? noise, Tensor? guide, "
    "Tensor? mask, Tensor coefficients, Tensor key, float? low, float? high, bool need_x0) -> (Tensor, Tensor)"
)
# sample and model_output are needed, and therefore kept by autograd, only if there is a clip.
_lib.define(
    "diffusion_step_backward(Tensor? grad_next, Tensor? grad_x0, Tensor? sample, Tensor? model_output, Tensor? mask, "
    "Tensor coefficients, float? low, float? high, bool need_sample, bool need_model_output) -> (Tensor, Tensor)"
)

# Rows of `coefficients`.
F, S, GUIDE_SCALE, GUIDE_STD = 5, 6, 7, 8


def clip_of(low: float | None, high: float | None) -> tuple[float, float] | None:
    """Returns the limits in the kernels' form."""
    return None if low is None or high is None else (low, high)


# --- checks --------------------------------------------------------------------------------------------------
_BYTES = (torch.bool, torch.uint8)
_DOUBLE, _FLOAT = (torch.float64,), tuple(dtype for dtype in FLOATING if dtype != torch.float64)


def _check_coefficients(operands: Operands, coefficients: Tensor, batch: int) -> None:
    """Checks for float64 (9, B) or (9, 1), on either device."""
    operands.rank("coefficients", coefficients, (2,), "(9, B) or (9, 1)")
    columns = 1 if coefficients.shape[1] == 1 else batch
    host = operands if coefficients.device.type != "cpu" else Operands(operands.name, "coefficients", coefficients)
    host.tensor("coefficients", coefficients, (GUIDE_STD + 1, columns), _DOUBLE)


def _check(operands: Operands, like: Tensor, tensors: dict[str, Tensor | None], mask: Tensor | None) -> None:
    """Checks that tensors have one shape and one class of precision, by which the arithmetic's is chosen."""
    operands.rank("sample" if like is tensors.get("sample") else "grad_next", like, range(1, 65), "(B, …)")
    dtypes = _DOUBLE if like.dtype == torch.float64 else _FLOAT
    for argument, tensor in tensors.items():
        operands.optional(argument, tensor, like.shape, dtypes)
    operands.optional("mask", mask, like.shape, _BYTES)


def _check_key(operands: Operands, key: Tensor, batch: int) -> None:
    operands.rank("key", key, (1,), "(3,)")
    host = operands if key.device.type != "cpu" else Operands(operands.name, "key", key, (torch.int64,))
    host.tensor("key", key, (3,), (torch.int64,))
    if key.device.type == "cpu":
        sample_offset = key.tolist()[2]
        if not 0 <= sample_offset <= 2**32 - batch:
            operands.refuse("key", f"has sample_offset {sample_offset}", f"0 to 2^32 - {batch}")


# --- kernels -------------------------------------------------------------------------------------------------
def _dense_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _forward(
    sample: Tensor,
    model_output: Tensor | None,
    previous: Tensor | None,
    noise: Tensor | None,
    guide: Tensor | None,
    mask: Tensor | None,
    coefficients: Tensor,
    key: Tensor,
    low: float | None,
    high: float | None,
    need_x0: bool,
) -> tuple[Tensor, Tensor]:
    operands = Operands("diffusion_step", "sample", sample)
    others = {"model_output": model_output, "previous": previous, "noise": noise, "guide": guide}
    _check(operands, sample, {"sample": sample, **others}, mask)
    if (mask is None) != (guide is None):
        operands.refuse("mask" if mask is None else "guide", "is None", "both mask and guide, or neither")
    _check_coefficients(operands, coefficients, sample.shape[0])
    _check_key(operands, key, sample.shape[0])
    x_next = _dense_like(sample)
    x0 = _dense_like(sample) if need_x0 else None
    inputs = (sample, model_output, previous, noise, guide, mask)
    clip = clip_of(low, high)
    if x_next.numel() > 0:
        if _native.on_gpu_path(sample):
            native.diffusion_step_forward_gpu(inputs, coefficients, clip, key, x_next, x0)
        else:
            values = coefficients.flatten().tolist()
            native.diffusion_step_forward(inputs, values, clip, key.tolist(), x_next, x0)
    return x_next, sample.new_empty(0) if x0 is None else x0


def _backward_op(
    grad_next: Tensor | None,
    grad_x0: Tensor | None,
    sample: Tensor | None,
    model_output: Tensor | None,
    mask: Tensor | None,
    coefficients: Tensor,
    low: float | None,
    high: float | None,
    need_sample: bool,
    need_model_output: bool,
) -> tuple[Tensor, Tensor]:
    grad = _given(grad_next, grad_x0)
    operands = Operands("diffusion_step_backward", "grad_next" if grad is grad_next else "grad_x0", grad)
    kept = {"sample": sample, "model_output": model_output}
    _check(operands, grad, {"grad_next": grad_next, "grad_x0": grad_x0, **kept}, mask)
    if low is not None and high is not None and sample is None:
        operands.refuse("sample", "is None", "the forward pass' sample, which a clip needs")
    _check_coefficients(operands, coefficients, grad.shape[0])
    grad_sample = _dense_like(grad) if need_sample else None
    grad_model_output = _dense_like(grad) if need_model_output else None
    inputs = (grad_next, grad_x0, sample, model_output, mask)
    clip = clip_of(low, high)
    if grad.numel() > 0 and (need_sample or need_model_output):
        if _native.on_gpu_path(grad):
            native.diffusion_step_backward_gpu(inputs, coefficients, clip, grad_sample, grad_model_output)
        else:
            values = coefficients.flatten().tolist()
            native.diffusion_step_backward(inputs, values, clip, grad_sample, grad_model_output)
    return (
        grad.new_empty(0) if grad_sample is None else grad_sample,
        grad.new_empty(0) if grad_model_output is None else grad_model_output,
    )


def _given(grad_next: Tensor | None, grad_x0: Tensor | None) -> Tensor:
    grad = grad_x0 if grad_next is None else grad_next
    if grad is None:
        raise ValueError("diffusion_step_backward: grad_next and grad_x0 are None; expected one of them at least")
    return grad


for _device in ("CPU", "CUDA"):
    _lib.impl("diffusion_step", _forward, _device)
    _lib.impl("diffusion_step_backward", _backward_op, _device)


# --- shapes without data -------------------------------------------------------------------------------------
@torch.library.register_fake("medaccel::diffusion_step", lib=_lib)
def _(
    sample: Tensor,
    model_output: Tensor | None,
    previous: Tensor | None,
    noise: Tensor | None,
    guide: Tensor | None,
    mask: Tensor | None,
    coefficients: Tensor,
    key: Tensor,
    low: float | None,
    high: float | None,
    need_x0: bool,
) -> tuple[Tensor, Tensor]:
    return _dense_like(sample), _dense_like(sample) if need_x0 else sample.new_empty(0)


@torch.library.register_fake("medaccel::diffusion_step_backward", lib=_lib)
def _(
    grad_next: Tensor | None,
    grad_x0: Tensor | None,
    sample: Tensor | None,
    model_output: Tensor | None,
    mask: Tensor | None,
    coefficients: Tensor,
    low: float | None,
    high: float | None,
    need_sample: bool,
    need_model_output: bool,
) -> tuple[Tensor, Tensor]:
    grad = _given(grad_next, grad_x0)
    return (
        _dense_like(grad) if need_sample else grad.new_empty(0),
        _dense_like(grad) if need_model_output else grad.new_empty(0),
    )


# --- gradients -----------------------------------------------------------------------------------------------
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    sample, model_output, previous, noise, guide, mask, coefficients, _, ctx.low, ctx.high, ctx.need_x0 = inputs
    clipped = ctx.low is not None and any(ctx.needs_input_grad[:2])
    ctx.dtypes = [None if t is None else t.dtype for t in (sample, model_output, previous, noise, guide)]
    ctx.save_for_backward(sample if clipped else None, model_output if clipped else None, mask, coefficients)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_next: Tensor | None, grad_x0: Tensor | None) -> tuple[Tensor | None, ...]:
    sample, model_output, mask, coefficients = ctx.saved_tensors
    if not ctx.need_x0:
        grad_x0 = None  # a compiler makes zeros for the empty output
    wanted = ctx.needs_input_grad[:5]
    grads: list[Tensor | None] = [None] * 5
    if grad_next is None and grad_x0 is None:
        return (*grads, *[None] * 6)
    if any(wanted[:2]):
        both = torch.ops.medaccel.diffusion_step_backward(
            grad_next, grad_x0, sample, model_output, mask, coefficients, ctx.low, ctx.high, *wanted[:2]
        )
        grads[:2] = [g.to(dtype) if want else None for g, dtype, want in zip(both, ctx.dtypes, wanted, strict=False)]
    if grad_next is not None and any(wanted[2:]):
        # These gradients depend on x′ alone, and are rarely needed: plain PyTorch computes them.
        generated = grad_next if mask is None else grad_next * mask.bool()
        for i, row, grad in ((2, F, generated), (3, S, generated), (4, GUIDE_SCALE, grad_next - generated)):
            if wanted[i]:
                grads[i] = (_factor(coefficients[row], grad) * grad).to(ctx.dtypes[i])
    return (*grads, *[None] * 6)


def _factor(row: Tensor, grad: Tensor) -> Tensor:
    """Returns a coefficient that multiplies `grad` (B, …); one number on the CPU stays there, as torch passes it by
    value."""
    row = row.to(grad.dtype)
    if row.device != grad.device and row.shape[0] == 1:
        return row.reshape(())
    if row.device != grad.device:
        known = host_values(row)
        row = row.to(grad.device) if known is None else filled(known.tolist(), grad.dtype, grad.device)
    return row.reshape(-1, *[1] * (grad.dim() - 1))


def _forward_mode(primals: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor] | None:
    """Differentiates in forward mode: without a clip the step is linear in its tensors; by the coefficients only the
    reference has a derivative."""
    sample, model_output, _, _, guide, mask, coefficients, key, low, high, need_x0 = primals
    d_sample, d_model_output, d_previous, d_noise, d_guide, _, d_coefficients, *_ = tangents
    if low is not None or high is not None or d_coefficients is not None:
        return None
    # The kernel's own random numbers are constants. They are not set to 0 in place, which torch.func.linearize loses.
    constant = (GUIDE_STD,) if d_noise is not None else (GUIDE_STD, S)
    rows = coefficients.unbind()
    factors = torch.stack([torch.zeros_like(row) if i in constant else row for i, row in enumerate(rows)])
    output: tuple[Tensor, Tensor] = torch.ops.medaccel.diffusion_step(
        _or_zeros(d_sample, sample),
        None if model_output is None else _or_zeros(d_model_output, model_output),
        d_previous,
        d_noise,
        None if guide is None else _or_zeros(d_guide, guide),
        mask,
        factors,
        key,
        None,
        None,
        need_x0,
    )
    return output


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


register_gradients(
    _lib,
    "diffusion_step",
    of="diffusion_step",
    setup_context=_setup_context,
    backward=_backward,
    forward_mode=_forward_mode,
)
