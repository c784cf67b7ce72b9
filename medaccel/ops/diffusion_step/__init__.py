# SPDX-License-Identifier: Apache-2.0
"""One update of a diffusion sampler: the new sample, the predicted x0 and the noise, in one pass over memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch
from medaccel.ops.diffusion_step import op, reference

Coefficient = float | Tensor
_NAMES = ("a", "b", "c", "d", "e", "f", "s", "guide_scale", "guide_std")


def unsupported(sample: Tensor) -> str | None:
    """None where a kernel serves `sample`; else why not, in a sentence."""
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
    """x0 = clip(a·x + b·m) and x′ = c·x0 + d·x + e·m + f·p + s·z: every sampler's update, in one pass.

    Args:
        sample: x, (B, …), floating point. fp32 and fp64 are computed in their own precision, bf16 and fp16 in fp32.
            Any strides; what isn't row-major within a sample is copied.
        model_output: m, like `sample` in shape. A half-precision one may go with a float32 sample, so that a network
            runs under autocast while the sample keeps its precision.
        a, b, c, d, e, f, s: numbers, or tensors () or (B,): a batch may have a time step of its own each. On a GPU,
            tensors that lie there are not read by the host.
        previous: p, an earlier step's x0 (multistep solvers), like `sample`.
        clip: (min, max) of x0, or None. A NaN stays one.
        noise: z, like `sample`. None: standard normals are made in the kernel.
        mask: broadcastable to `sample`: nonzero = generate, 0 = keep. A kept voxel becomes guide_scale · guide +
            guide_std · z′, the guide noised to the new level. x0 is the prediction everywhere.
        guide: the volume that kept voxels keep, broadcastable to `sample`; needed with `mask`.
        guide_scale, guide_std: signal and noise of the new level. None: what this step makes of a sample with the
            noise m, guide_scale = c + d/a and guide_std² = (e − d·b/a)² + s²; that is the new level where m is the
            noise (ε prediction), and the guide exactly where a step ends at level 0. Other predictions give them.
        seed: of the noise, 64 bits (wrapped to int64), or one int64 element on the sample's device. None: drawn from
            torch's generator, if noise is needed at all.
        offset: 0 to 2⁶³ − 1; steps with different offsets have independent noise.
        sample_offset: number of the batch's first sample: a batch may be split, and keeps its noise.
        out: x′ is written here; or (x′, x0), with None for an x0 that nobody wants. They may be `sample` and
            `model_output` themselves: the step then takes no memory at all. Not differentiable.

    Returns:
        (x′, x0), contiguous, in the dtype of `sample`; x0 is None only where `out` says so. Same bits whatever the
        number of threads.

    The noise of element i (row-major) of sample n is lane i mod 4 of Philox-4x32-10 with key `seed` and counter
    (⌊i/4⌋, sample_offset + n, offset low, offset high), by Box–Muller on the pairs (0, 1) and (2, 3), of uniforms
    (word + ½)·2⁻³²: the same for every dtype, device, number of threads and split of the batch. The guide's has the
    top bit of offset set.

    Raises:
        TypeError: a tensor that is not floating point, or a seed that is no number.
        ValueError: a shape, value, dtype or device that makes no sense.

    Differentiable by `sample`, `model_output`, `previous`, `noise` and `guide` (in the reference also by the
    coefficients, which is then chosen). Sources: Ho et al., "Denoising diffusion probabilistic models", NeurIPS 2020;
    Song et al., "Denoising diffusion implicit models", ICLR 2021; Salmon et al., SC 2011 (Philox).

    >>> import torch, medaccel
    >>> x = torch.randn(1, 1, 32, 32, 32)
    >>> y, x0 = medaccel.ops.diffusion_step(x, 0.1 * x, a=1.1, b=-0.4, c=0.9, d=0.1, e=0.0, s=0.05, seed=7)
    >>> y.shape
    torch.Size([1, 1, 32, 32, 32])
    """
    tensors = check_tensors(sample, model_output, previous, noise, guide, mask)
    guide_scale, guide_std = _guide_level(guide is not None, a, b, c, d, e, s, guide_scale, guide_std)
    coefficients = (a, b, c, d, e, f, s, guide_scale, guide_std)
    limits = _check_clip(clip)
    if out is None:
        return run(tensors, coefficients, limits, (seed, offset, sample_offset))
    pair = out if isinstance(out, tuple) else (out, torch.empty_like(sample, memory_format=_CONTIGUOUS))
    _check_out(tensors, *pair)
    return run(tensors, coefficients, limits, (seed, offset, sample_offset), pair)


_CONTIGUOUS = torch.contiguous_format
# sample, model_output, previous, noise, guide, mask
_Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def run(
    tensors: _Tensors,
    coefficients: Sequence[Coefficient],
    limits: tuple[float, float] | None,
    place: tuple[int | Tensor | None, int, int],
    out: tuple[Tensor, Tensor | None] | None = None,
    need_x0: bool = True,
) -> tuple[Tensor, Tensor]:
    """The step of checked tensors; place: seed, offset, sample_offset. Without need_x0 the second is empty."""
    sample = tensors[0]
    _check_place(place[1:], sample.shape[0])
    low, high = (None, None) if limits is None else limits
    native = _dispatch.kernels_wanted() and unsupported(sample) is None
    if native and _is_direct(tensors, coefficients, place[0]):
        return _run_direct(tensors, coefficients, limits, place, out, need_x0)
    rows = _rows(coefficients, sample)
    key = _key(place, sample, drawn=_needs_noise(tensors, coefficients))
    if native and not rows.requires_grad:
        x_next, x0 = torch.ops.medaccel.diffusion_step(*tensors, rows, key, low, high, need_x0)
    else:
        x_next, x0 = reference.diffusion_step(*tensors, rows, key, low, high)
    if out is None:
        return x_next, x0
    out[0].copy_(x_next)
    if out[1] is not None:
        out[1].copy_(x0)
    return out  # type: ignore[return-value]


def _is_direct(tensors: _Tensors, coefficients: Sequence[Coefficient], seed: int | Tensor | None) -> bool:
    """Whether the CPU kernel can be called without torch's dispatch: nothing to record, trace or read elsewhere."""
    return (
        not _native.on_gpu_path(tensors[0])
        and not isinstance(seed, Tensor)
        and not any(isinstance(value, Tensor) for value in coefficients)
        and all(t is None or _dispatch.plain_eager(t) for t in tensors)
    )


def _run_direct(
    tensors: _Tensors,
    coefficients: Sequence[Coefficient],
    limits: tuple[float, float] | None,
    place: tuple[int | Tensor | None, int, int],
    out: tuple[Tensor, Tensor | None] | None,
    need_x0: bool,
) -> tuple[Tensor, Tensor]:
    sample = tensors[0]
    dense = out is not None and all(t is None or t.is_contiguous() for t in out)
    if out is not None and dense:
        x_next, x0 = out
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
        _native.diffusion_step_forward(tensors, values, limits, key, x_next, x0)
    if out is not None and not dense:
        out[0].copy_(x_next)
        if out[1] is not None and x0 is not None:
            out[1].copy_(x0)
        return out  # type: ignore[return-value]
    return x_next, x0  # type: ignore[return-value]


def _rows(coefficients: Sequence[Coefficient], sample: Tensor) -> Tensor:
    """The coefficients in float64: (9, 1) on the CPU where all are numbers, else (9, B) where the sample is."""
    if not any(isinstance(value, Tensor) for value in coefficients):
        return torch.tensor([float(value) for value in coefficients], dtype=torch.float64)[:, None]
    rows = []
    for name, value in zip(_NAMES, coefficients, strict=True):
        row = torch.as_tensor(value, dtype=torch.float64, device=sample.device)
        if row.dim() > 1 or (row.dim() == 1 and row.shape[0] not in (1, sample.shape[0])):
            raise ValueError(
                f"diffusion_step: {name} has shape {tuple(row.shape)}; expected a number or ({sample.shape[0]},), "
                "one a sample"
            )
        rows.append(row.expand(sample.shape[0]))
    return torch.stack(rows)


def _needs_noise(tensors: _Tensors, coefficients: Sequence[Coefficient]) -> bool:
    """Whether the kernel may have to make random numbers; a tensor's value isn't asked."""

    def is_zero(value: Coefficient) -> bool:
        return not isinstance(value, Tensor) and value == 0

    return (tensors[3] is None and not is_zero(coefficients[op.S])) or (
        tensors[4] is not None and not is_zero(coefficients[op.GUIDE_STD])
    )


def _drawn_seed(sample: Tensor) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=sample.device)


def _wrapped(seed: object) -> int:
    """A 64-bit seed as int64, or an error in a sentence."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"diffusion_step: seed is {seed!r}; expected an integer, an int64 tensor or None")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"diffusion_step: seed is {seed}; expected one of 64 bits")
    return seed - 2**64 if seed >= 2**63 else seed


def _key(place: tuple[int | Tensor | None, int, int], sample: Tensor, drawn: bool) -> Tensor:
    """seed, offset and sample_offset as int64 (3,): on the CPU where the host knows the seed."""
    seed, offset, sample_offset = place
    if seed is None and drawn:
        seed = _drawn_seed(sample)
    if not isinstance(seed, Tensor):
        return torch.tensor([_wrapped(0 if seed is None else seed), offset, sample_offset], dtype=torch.int64)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != sample.device:
        raise ValueError(
            f"diffusion_step: seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}; expected one int64 "
            f"element on {sample.device}"
        )
    rest = torch.tensor([offset, sample_offset], dtype=torch.int64, device=seed.device)
    return torch.cat([seed.reshape(1), rest])


# --- checks --------------------------------------------------------------------------------------------------
def check_tensors(
    sample: Tensor,
    model_output: Tensor | None,
    previous: Tensor | None,
    noise: Tensor | None,
    guide: Tensor | None,
    mask: Tensor | None,
) -> _Tensors:
    """The tensors, mask and guide expanded to the sample's shape; or an error in a sentence."""
    name = "diffusion_step"
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        kind = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
        raise TypeError(f"{name}: sample is {kind}; expected a floating-point tensor")
    if sample.dim() == 0:
        raise ValueError(f"{name}: sample has shape (); expected (B, …)")
    if (mask is None) != (guide is None):
        given, missing = ("mask", "guide") if guide is None else ("guide", "mask")
        raise ValueError(f"{name}: {given} is given and {missing} is None; expected both or neither")
    for argument, tensor in (
        ("model_output", model_output),
        ("previous", previous),
        ("noise", noise),
        ("guide", guide),
        ("mask", mask),
    ):
        if tensor is None:
            continue
        if argument != "mask" and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: {argument} is {kind}; expected a floating-point tensor")
        if tensor.device != sample.device:
            raise ValueError(
                f"{name}: {argument} is on {tensor.device} and sample on {sample.device}; expected the same device"
            )
        if (tensor.dtype == torch.float64) != (sample.dtype == torch.float64) and argument != "mask":
            raise ValueError(
                f"{name}: {argument} is {tensor.dtype} and sample {sample.dtype}; expected the same (a half "
                "precision may go with float32)"
            )
        if argument in ("guide", "mask"):
            _check_broadcast(argument, tensor, sample)
        elif tensor.shape != sample.shape:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(tensor.shape)}; expected the sample's, {tuple(sample.shape)}"
            )
    if mask is not None and guide is not None:
        mask = (mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0).expand(sample.shape)
        guide = guide.expand(sample.shape)
    return sample, model_output, previous, noise, guide, mask


def _check_broadcast(argument: str, tensor: Tensor, sample: Tensor) -> None:
    sizes = (1,) * (sample.dim() - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != sample.dim() or any(n not in (1, m) for n, m in zip(sizes, sample.shape, strict=True)):
        raise ValueError(
            f"diffusion_step: {argument} has shape {tuple(tensor.shape)}; expected one that broadcasts to the "
            f"sample's, {tuple(sample.shape)}"
        )


def _guide_level(
    guided: bool,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
    d: Coefficient,
    e: Coefficient,
    s: Coefficient,
    scale: Coefficient | None,
    std: Coefficient | None,
) -> tuple[Coefficient, Coefficient]:
    """Signal and noise of the level that the step leads to; see the docstring above."""
    if not guided:
        return 0.0, 0.0
    if (scale is None or std is None) and not isinstance(a, Tensor) and a == 0:
        raise ValueError(
            "diffusion_step: guide_scale or guide_std is None and a is 0, so that the new level can't be known from "
            "the coefficients; expected both"
        )
    if scale is None:
        scale = c + d / a
    if std is None:
        square = (e - d * b / a) ** 2 + s**2
        std = square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)
    return scale, std


def _check_clip(clip: tuple[float, float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    limits = tuple(float(v) for v in clip)
    if len(limits) != 2 or not limits[0] <= limits[1]:
        raise ValueError(f"diffusion_step: clip is {clip}; expected (min, max) with min <= max, or None")
    return limits[0], limits[1]


def _check_place(place: Sequence[int], batch: int) -> None:
    offset, sample_offset = place
    if not 0 <= offset < 2**63:
        raise ValueError(f"diffusion_step: offset is {offset}; expected 0 to 2^63 - 1")
    if not 0 <= sample_offset <= 2**32 - batch:
        raise ValueError(
            f"diffusion_step: sample_offset is {sample_offset} for {batch} samples; expected 0 to 2^32 - {batch}"
        )


def _check_out(tensors: _Tensors, x_next: Tensor, x0: Tensor | None) -> None:
    name, sample = "diffusion_step", tensors[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{name}: out is given and an input requires a gradient; expected torch.no_grad() around it")
    for i, target in enumerate((x_next, x0)):
        if target is None:
            continue
        if target.shape != sample.shape or target.dtype != sample.dtype or target.device != sample.device:
            raise ValueError(
                f"{name}: out[{i}] is {target.dtype} {tuple(target.shape)} on {target.device}; expected the sample's "
                f"{sample.dtype} {tuple(sample.shape)} on {sample.device}"
            )
        for argument, tensor in zip(("sample", "model_output", "previous", "noise", "guide"), tensors, strict=False):
            if tensor is not None and _overlaps(target, tensor) and not _same_place(target, tensor):
                raise ValueError(
                    f"{name}: out[{i}] shares memory with {argument} but lies differently there; expected "
                    f"{argument} itself, or other memory"
                )
    if x0 is not None and _overlaps(x_next, x0):
        raise ValueError(f"{name}: out[0] and out[1] share memory; expected two tensors")


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype


def _overlaps(a: Tensor, b: Tensor) -> bool:
    """Whether the ranges of memory that two tensors span meet."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    spans = []
    for t in (a, b):
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]
