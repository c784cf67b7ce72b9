# SPDX-License-Identifier: Apache-2.0
"""Computes the forward process with the fused step: x_t = alpha · x0 + sigma · z, and targets made of the same
two."""

from torch import Tensor

from medaccel.ops.diffusion_step import check_coefficients, check_tensors, run

Coefficient = float | Tensor


def noised(
    x: Tensor,
    signal: Coefficient,
    noise_std: Coefficient,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    sample_offset: int = 0,
) -> Tensor:
    """Returns signal · x + noise_std · z in one pass: noising, and (with the same noise or seed) the network's
    targets.

    Args:
        x: (B, …), floating point.
        signal, noise_std: numbers, or (B,): each sample at its own level.
        noise: z, a tensor like x. None: the kernel makes standard normals; the same seed and offset give them again,
            so a target needs no stored noise.
        seed, offset, sample_offset: those of `medaccel.ops.diffusion_step`.

    Returns:
        A contiguous tensor like x, differentiable by x and noise.
    """
    tensors = check_tensors(x, None, None, noise, None, None)
    signal, noise_std = check_coefficients(("signal", "noise_std"), (signal, noise_std))
    coefficients = (0.0, 0.0, 0.0, signal, 0.0, 0.0, noise_std, 0.0, 0.0)
    return run(tensors, coefficients, None, (seed, offset, sample_offset), need_x0=False)[0]
