# SPDX-License-Identifier: Apache-2.0
"""Filters volumes, images and signals with a separable Gaussian."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch, _transforms
from medaccel.ops._arguments import (
    FLOATING,
    check_floating,
    choice,
    describe,
    filled,
    finite,
    flag,
    is_sequence,
    number,
    stays_tensor,
)
from medaccel.ops.gaussian import native, reference
from medaccel.ops.gaussian.op import check_sigma_values


def unsupported(input: Tensor) -> str | None:
    """Says in a sentence why no kernel serves `input`; returns None if one does."""
    device = input.device
    if device.type == "cpu":
        return _native.cpu_problem
    if device.type == "cuda":
        return _native.gpu_problem(device.index)
    return f"gaussian_filter has no kernel for device {device.type!r}"


def gaussian_filter(
    input: Tensor,
    sigma: float | Sequence[float] | Tensor,
    *,
    truncated: float = 4.0,
    approx: str = "erf",
    mode: str = "constant",
    normalize: bool = False,
) -> Tensor:
    """Smooths each channel of `input` with a Gaussian, one axis at a time.

    Args:
        input: (B, C, *spatial) with 1, 2 or 3 spatial axes, floating point. fp32 and fp64 are filtered in their own
            precision, bf16 and fp16 in fp32. Any strides; channels-last input gives channels-last output.
        sigma: standard deviation in voxels: a number, one per spatial axis, or a tensor of either, which may
            require gradients. 0 leaves an axis as it is.
        truncated: the taps reach ``int(max(truncated * sigma, 0.5) + 0.5)`` voxels to each side (MONAI's rule).
        approx: definition of a tap: "erf" (the Gaussian's integral over a voxel), "sampled" (its value at the centre)
            or "scalespace" (Lindeberg's discrete Gaussian, e^{−σ²} I_k(σ²)).
        mode: values beyond the border, by SciPy's names: "constant" (zeros), "reflect" (d c b a | a b c d),
            "nearest", "mirror" (d c b | a b c d) or "wrap".
        normalize: if True, the taps of an axis are scaled to sum to 1. ``approx="sampled", normalize=True`` is
            SciPy's kernel; the default is MONAI's ``GaussianFilter``, whose truncated taps sum to a little less.

    Returns:
        The filtered tensor, like `input` in shape, dtype and strides (`torch.empty_like`). Same bits whatever the
        number of threads. A NaN spreads as far as the taps reach, and no farther.

    Raises:
        TypeError: `input` is not a floating-point tensor.
        ValueError: a shape, σ, option or device makes no sense.

    On a GPU nothing waits for the device: radius and taps of a σ that lies there are made there, so a negative, NaN
    or very large one (more than 2048 voxels' reach) can't be refused and gives NaN instead.

    Both kernels fuse the three passes; see ``csrc/gaussian/march.h`` and ``cuda.cu``. Sources: MONAI 1.6
    (``monai.networks.layers.gaussian_1d``) for the taps, Lindeberg, "Scale-space for discrete signals", IEEE TPAMI
    12(3), 1990, for "scalespace".

    >>> import torch, medaccel
    >>> medaccel.ops.gaussian_filter(torch.randn(1, 1, 64, 64, 64), 2.0).shape
    torch.Size([1, 1, 64, 64, 64])
    """
    check_floating("gaussian_filter", input=input)
    spatial = input.dim() - 2
    if not 1 <= spatial <= 3:
        raise ValueError(
            f"gaussian_filter: input has shape {tuple(input.shape)}; expected (B, C, *spatial) with 1-3 spatial axes"
        )
    choice("gaussian_filter", "approx", approx, native.APPROX)
    choice("gaussian_filter", "mode", mode, native.MODES)
    truncated = finite("gaussian_filter", "truncated", truncated)
    if not truncated > 0:
        raise ValueError(f"gaussian_filter: truncated is {truncated}; expected a number > 0")
    normalize = flag("gaussian_filter", "normalize", normalize)
    if isinstance(sigma, list | tuple) and any(stays_tensor(s) for s in sigma):
        sigma = _stacked(sigma, input.device)
    by_kernel = _dispatch.kernel_serves(sigma, linear=(input,)) and unsupported(input) is None
    if not isinstance(sigma, Tensor):
        values = check_sigma_values(_sigma_values(sigma, spatial), truncated, approx, normalize)
        direct = by_kernel and input.dtype in _native.DTYPES and not _native.on_gpu_path(input)
        if direct and _dispatch.plain_eager(input):
            return native.gaussian_filter(input, values, truncated, approx, mode, normalize, adjoint=False)
        sigmas = torch.tensor(values, dtype=torch.float64)
        largest: list[float] | None = values
    else:
        sigmas = _sigma_tensor(sigma, spatial, input.device)
        largest = None if by_kernel else _largest(sigmas, truncated, approx, normalize)
    if by_kernel:
        return torch.ops.medaccel.gaussian_filter(input, sigmas, truncated, approx, mode, normalize)
    filtered = reference.gaussian_filter(input, sigmas, truncated, approx, mode, normalize, largest)
    return filtered.to(_dispatch.autocast_dtype(input))


def _sigma_values(sigma: float | Sequence[float], spatial: int) -> list[float]:
    expected = "a number, or one per spatial axis"
    if is_sequence(sigma):
        values = [number("gaussian_filter", f"sigma[{i}]", s) for i, s in enumerate(sigma)]  # type: ignore[arg-type]
        values = values * spatial if len(values) == 1 else values
    else:
        values = [number("gaussian_filter", "sigma", sigma, expected)] * spatial
    if len(values) != spatial:
        raise ValueError(f"gaussian_filter: sigma has {len(values)} values; expected 1 or {spatial}")
    return values


def _largest(sigma: Tensor, truncated: float, approx: str, normalize: bool) -> list[float] | None:
    """Returns the checked values of σ, under vmap the largest of all samples' for each axis; None if σ is read
    elsewhere when needed."""
    if sigma.device.type != "cpu":
        return None
    known = _transforms.host_values(sigma)
    if known is None:
        raise ValueError(
            "gaussian_filter: sigma is a tensor, whose values torch.compile, torch.func.linearize and other tracers "
            "hide; expected numbers where the reference runs in them (under medaccel.use_reference() or a transform)"
        )
    values = check_sigma_values(known.flatten().tolist(), truncated, approx, normalize)
    return values if known.shape == sigma.shape else [max(values, default=0.0)] * len(sigma)


def _stacked(sigma: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Stacks one σ per axis, some of which have gradients or lie on a device, into one tensor."""
    rows = []
    for i, value in enumerate(sigma):
        if isinstance(value, Tensor) and value.numel() == 1 and value.dtype in FLOATING and stays_tensor(value):
            rows.append(value.to(device, torch.float64).reshape(()))
        else:
            rows.append(filled([number("gaussian_filter", f"sigma[{i}]", value)], torch.float64, device)[0])
    return torch.stack(rows)


def _sigma_tensor(sigma: Tensor, spatial: int, device: torch.device) -> Tensor:
    """Returns σ as a tensor (spatial,); the kernel checks its values when it reads them."""
    if sigma.device != device and sigma.device.type != "cpu":
        raise ValueError(
            f"gaussian_filter: sigma is on {sigma.device} and input on {device}; expected the same device"
        )
    if sigma.dtype not in FLOATING or sigma.layout is not torch.strided:
        raise ValueError(f"gaussian_filter: sigma has dtype {describe(sigma)}; expected a floating-point one")
    if sigma.dim() == 0 or sigma.shape == (1,):
        return sigma.reshape(1).expand(spatial)
    if sigma.shape != (spatial,):
        raise ValueError(f"gaussian_filter: sigma has shape {tuple(sigma.shape)}; expected a scalar or ({spatial},)")
    return sigma
