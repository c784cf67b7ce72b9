# SPDX-License-Identifier: Apache-2.0
"""Computes one update of a diffusion sampler: the new sample, the predicted x0 and the noise, in one pass over
memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch
from medaccel.ops._arguments import describe, filled, learnt, whole
from medaccel.ops._transforms import host_values, wants_gradient
from medaccel.ops.diffusion_step import native, op, reference
from medaccel.ops.diffusion_step.checks import (
    NAMES,
    Coefficient,
    Tensors,
    check_clip,
    check_coefficients,
    check_place,
    check_tensors,
)
from medaccel.ops.diffusion_step.out import check_out

__all__ = ["check_coefficients", "check_tensors", "diffusion_step", "run", "unsupported"]


def unsupported(sample: Tensor) -> str | None:
    """Says in a sentence why no kernel serves `sample`; returns None if one does."""
    device = sample.device
    if device.type == "cpu":
        return _native.cpu_problem
    if device.type == "cuda":
        return _native.gpu_problem(device.index)
    return f"diffusion_step has no kernel for device {device.type!r}"


def diffusion_step(
    sample: Tensor,
    model_output: Tensor,
    *,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
    d: Coefficient,
    e: Coefficient,
    s: Coefficient,
    f: Coefficient = 0.0,
    previous: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    guide: Tensor | None = None,
    guide_scale: Coefficient | None = None,
    guide_std: Coefficient | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    sample_offset: int = 0,
    out: Tensor | tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes x0 = clip(a·x + b·m) and x′ = c·x0 + d·x + e·m + f·p + s·z: every sampler's update, in one pass.

    Args:
        sample: x, (B, …), floating point. fp32 and fp64 are computed in their own precision, bf16 and fp16 in fp32.
            Any strides; samples that aren't row-major are copied.
        model_output: m, like `sample` in shape. A half-precision one may go with a float32 sample, so that a network
            runs under autocast while the sample keeps its precision.
        a, b, c, d, e, f, s: numbers, or tensors () or (B,): a batch may have a time step of its own each. On a GPU,
            tensors that lie there are not read by the host.
        previous: p, an earlier step's x0 (multistep solvers), like `sample`.
        clip: (min, max) of x0, or None. A NaN stays one.
        noise: z, like `sample`. None: the kernel makes standard normals.
        mask: broadcastable to `sample`: nonzero = generate, 0 = keep. A kept voxel becomes guide_scale · guide +
            guide_std · z′, the guide noised to the new level. x0 is the prediction everywhere.
        guide: the volume that kept voxels keep, broadcastable to `sample`; needed with `mask`.
        guide_scale, guide_std: signal and noise of the new level. None: those of this step's result for a sample with
            the noise m, guide_scale = c + d/a and guide_std² = (e − d·b/a)² + s²; that is the new level if m is the
            noise (ε prediction), and the guide exactly if a step ends at level 0. Other predictions must give them.
        seed: the noise's seed, 64 bits (wrapped to int64), or one int64 element on the sample's device. None: drawn
            from torch's generator, if noise is needed at all.
        offset: 0 to 2⁶³ − 1; steps with different offsets have independent noise.
        sample_offset: number of the batch's first sample: a batch may be split, and keeps its noise.
        out: x′ is written here; or (x′, x0), with None for an unwanted x0. They may be `sample` and `model_output`
            themselves: the step then takes no memory at all. As with torch's own ``out=``, nothing may require grad
            while gradients are recorded, no two elements may share memory, and autograd notices if a tensor that it
            had kept is overwritten.

    Returns:
        (x′, x0), contiguous, in the dtype of `sample`; x0 is None only where `out` says so. Same bits whatever the
        number of threads.

    The noise of element i (row-major) of sample n is lane i mod 4 of Philox-4x32-10 with key `seed` and counter
    (⌊i/4⌋, sample_offset + n, offset low, offset high), by Box–Muller on the pairs (0, 1) and (2, 3), of uniforms
    (word + ½)·2⁻³²: the same for every dtype, device, number of threads and split of the batch. The guide's
    noise has the top bit of offset set.

    Raises:
        TypeError: a tensor is not floating point, or the seed is no number.
        ValueError: a shape, value, dtype or device makes no sense.

    Differentiable by `sample`, `model_output`, `previous`, `noise` and `guide` (in the reference also by the
    coefficients, which is then chosen). Sources: Ho et al., "Denoising diffusion probabilistic models", NeurIPS 2020;
    Song et al., "Denoising diffusion implicit models", ICLR 2021; Salmon et al., SC 2011 (Philox).

    >>> import torch, medaccel
    >>> x = torch.randn(1, 1, 32, 32, 32)
    >>> y, x0 = medaccel.ops.diffusion_step(x, 0.1 * x, a=1.1, b=-0.4, c=0.9, d=0.1, e=0.0, s=0.05, seed=7)
    >>> y.shape
    torch.Size([1, 1, 32, 32, 32])
    """
    if model_output is None:
        raise TypeError("diffusion_step: model_output is None; expected a floating-point tensor")
    tensors = check_tensors(sample, model_output, previous, noise, guide, mask)
    given = check_coefficients(NAMES, (a, b, c, d, e, f, s, guide_scale, guide_std))
    coefficients = _with_guide_level(guide is not None, given)
    limits = check_clip(clip)
    if out is None:
        return run(tensors, coefficients, limits, (seed, offset, sample_offset))
    pair = check_out(tensors, coefficients, out)
    return run(tensors, coefficients, limits, (seed, offset, sample_offset), pair)


_CONTIGUOUS = torch.contiguous_format


def run(
    tensors: Tensors,
    coefficients: Sequence[Coefficient],
    limits: tuple[float, float] | None,
    place: tuple[int | Tensor | None, int, int],
    out: tuple[Tensor, Tensor | None] | None = None,
    need_x0: bool = True,
) -> tuple[Tensor, Tensor]:
    """Runs the step on checked tensors; `place` holds seed, offset and sample_offset. Without need_x0 the second
    result is empty."""
    sample = tensors[0]
    place = check_place(place, sample.shape[0])
    low, high = (None, None) if limits is None else limits
    # A clip is not linear; its derivative is the reference's.
    linear, others = (tensors, coefficients) if limits is None else ((), (*tensors, *coefficients))
    by_kernel = _dispatch.kernel_serves(*others, linear=linear) and unsupported(sample) is None
    if by_kernel and _is_direct(tensors, coefficients, place[0]):
        return _run_direct(tensors, coefficients, limits, place, out, need_x0)
    by_kernel = by_kernel and not any(isinstance(value, Tensor) and wants_gradient(value) for value in coefficients)
    rows = _rows(coefficients, sample, by_kernel)
    key = _key(place, sample, _needs_noise(tensors, coefficients), by_kernel)
    if by_kernel:
        need_x0 = need_x0 and (out is None or out[1] is not None)
        x_next, x0 = torch.ops.medaccel.diffusion_step(*tensors, rows, key, low, high, need_x0)
    else:
        x_next, x0 = reference.diffusion_step(*tensors, rows, key, low, high)
    if out is None:
        return x_next, x0
    out[0].copy_(x_next)
    if out[1] is not None:
        out[1].copy_(x0)
    return out  # type: ignore[return-value]


def _is_direct(tensors: Tensors, coefficients: Sequence[Coefficient], seed: int | Tensor | None) -> bool:
    """Tells whether the CPU kernel can be called without torch's dispatch: nothing to record, trace or read
    elsewhere."""
    return (
        not _native.on_gpu_path(tensors[0])
        and not isinstance(seed, Tensor)
        and not any(isinstance(value, Tensor) for value in coefficients)
        and all(t is None or _dispatch.plain_eager(t) for t in tensors)
    )


def _run_direct(
    tensors: Tensors,
    coefficients: Sequence[Coefficient],
    limits: tuple[float, float] | None,
    place: tuple[int | Tensor | None, int, int],
    out: tuple[Tensor, Tensor | None] | None,
    need_x0: bool,
) -> tuple[Tensor, Tensor]:
    sample = tensors[0]
    written = out is not None and all(t is None or (t.is_contiguous() and _dispatch.plain_eager(t)) for t in out)
    if out is not None and written:
        x_next, x0 = out
        # These tensors no longer hold the values that autograd kept: its check must notice.
        torch.autograd.graph.increment_version([t for t in out if t is not None])
    else:
        need_x0 = need_x0 if out is None else out[1] is not None
        x_next = torch.empty_like(sample, memory_format=_CONTIGUOUS)
        x0 = torch.empty_like(sample, memory_format=_CONTIGUOUS) if need_x0 else None
    seed = place[0]
    if seed is None:
        seed = int(_drawn_seed(sample)) if _needs_noise(tensors, coefficients) else 0
    key = (_wrapped(seed), *place[1:])
    if sample.numel() > 0:
        values = [float(value) for value in coefficients]
        native.diffusion_step_forward(tensors, values, limits, key, x_next, x0)
    if out is not None and not written:
        out[0].copy_(x_next)
        if out[1] is not None and x0 is not None:
            out[1].copy_(x0)
        return out  # type: ignore[return-value]
    return x_next, x0  # type: ignore[return-value]


def _rows(coefficients: Sequence[Coefficient], sample: Tensor, by_value: bool) -> Tensor:
    """Returns the coefficients in float64: (9, 1) if each is one number, else (9, B).

    They lie on the sample's device; or on the CPU if the host has them all and the kernel takes them `by_value`.
    """
    tensors = []
    for name, value in zip(NAMES, coefficients, strict=True):
        if not isinstance(value, Tensor):
            continue
        tensors.append(value)
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, sample.shape[0])):
            raise ValueError(
                f"diffusion_step: {name} has shape {tuple(value.shape)}; expected a number or ({sample.shape[0]},), "
                "one a sample"
            )
    on_host = by_value and all(value.device.type == "cpu" for value in tensors)
    device = torch.device("cpu") if on_host else sample.device
    if not tensors:
        return filled([float(value) for value in coefficients], torch.float64, device)[:, None]
    columns = 1 if all(value.numel() == 1 for value in tensors) else sample.shape[0]
    made: dict[str, Tensor] = {}
    return torch.stack([_row(value, device, made).expand(columns) for value in coefficients])


def _row(value: Coefficient, device: torch.device, made: dict[str, Tensor]) -> Tensor:
    """Returns a coefficient in float64 on `device`; what the host knows is not copied there, which would wait."""
    if not isinstance(value, Tensor):
        return filled([float(value)], torch.float64, device, made)
    if value.device.type == "cpu" and device.type != "cpu" and not learnt(value) and value.numel() > 0:
        known = host_values(value)
        if known is not None:
            return filled(known.flatten().tolist(), torch.float64, device, made)
    return value.to(device, torch.float64)


def _needs_noise(tensors: Tensors, coefficients: Sequence[Coefficient]) -> bool:
    """Tells whether the kernel may have to make random numbers; a tensor's value isn't read."""

    def is_zero(value: Coefficient) -> bool:
        return not isinstance(value, Tensor) and value == 0

    return (tensors[3] is None and not is_zero(coefficients[op.S])) or (
        tensors[4] is not None and not is_zero(coefficients[op.GUIDE_STD])
    )


def _drawn_seed(sample: Tensor) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=sample.device)


def _wrapped(seed: object) -> int:
    """Wraps a 64-bit seed to int64, or raises an error in a sentence."""
    value = whole("diffusion_step", "seed", seed, "an integer, an int64 tensor or None")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"diffusion_step: seed is {value}; expected one of 64 bits")
    return value - 2**64 if value >= 2**63 else value


def _key(place: tuple[int | Tensor | None, int, int], sample: Tensor, drawn: bool, by_value: bool) -> Tensor:
    """Returns seed, offset and sample_offset as int64 (3,).

    They lie on the CPU if the host knows the seed and the kernel takes it `by_value`, else on the sample's device.
    """
    seed, offset, sample_offset = place
    if seed is None and drawn:
        seed = _drawn_seed(sample)
    if not isinstance(seed, Tensor):
        words = [_wrapped(0 if seed is None else seed), offset, sample_offset]
        return filled(words, torch.int64, torch.device("cpu") if by_value else sample.device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != sample.device:
        raise ValueError(
            f"diffusion_step: seed is {describe(seed)} of shape {tuple(seed.shape)} on {seed.device}; expected one "
            f"int64 element on {sample.device}"
        )
    return torch.cat([seed.reshape(1), filled([offset, sample_offset], torch.int64, seed.device)])


def _with_guide_level(guided: bool, coefficients: tuple[Coefficient | None, ...]) -> tuple[Coefficient, ...]:
    """Returns the coefficients with signal and noise of the level that the step leads to; see `diffusion_step`."""
    a, b, c, d, e, _, s, scale, std = coefficients
    step: tuple[Coefficient, ...] = coefficients[:7]  # type: ignore[assignment]
    if not guided:
        return *step, 0.0, 0.0
    if scale is not None and std is not None:
        return *step, scale, std
    assert not any(value is None for value in (a, b, c, d, e, s))
    if not isinstance(a, Tensor) and a == 0:
        raise ValueError(
            "diffusion_step: guide_scale or guide_std is None and a is 0, so that the new level can't be known from "
            "the coefficients; expected both"
        )
    if scale is None:
        scale = c + d / a  # type: ignore[operator, arg-type]
    if std is None:
        square = (e - d * b / a) ** 2 + s**2  # type: ignore[operator]
        std = square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)
    return *step, scale, std
