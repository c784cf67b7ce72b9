# SPDX-License-Identifier: Apache-2.0
"""Calls the diffusion step's kernels, CPU and GPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medaccel._native import GPU_DTYPES, cpu_module, emulates_device_scalars, gpu_module
from medaccel.ops._arguments import filled

# Both modules take this for a missing tensor.
_NO_SAMPLES = (0, 0, 0)
_NO_OUTPUT = (0, 0)


def _samples(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """Returns the tensor with dense samples (a copy if they aren't), and its address, dtype and stride between
    samples."""
    if tensor is None:
        return None, _NO_SAMPLES
    if tensor.shape[0] > 0 and not tensor[0].is_contiguous():
        tensor = tensor.contiguous()
    dtype = 0 if tensor.dtype in (torch.bool, torch.uint8) else GPU_DTYPES[tensor.dtype]
    return tensor, (tensor.data_ptr(), dtype, tensor.stride(0))


def _output(tensor: Tensor | None) -> tuple[int, int]:
    return _NO_OUTPUT if tensor is None else (tensor.data_ptr(), GPU_DTYPES[tensor.dtype])


def _unsigned(number: int) -> int:
    return number & (2**64 - 1)


def _sample_size(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def diffusion_step_forward(
    inputs: Sequence[Tensor | None],
    coefficients: Sequence[float],
    clip: tuple[float, float] | None,
    key: Sequence[int],
    x_next: Tensor,
    x0: Tensor | None,
) -> None:
    """Writes x′ and, if it is given, x0. Both are contiguous, and may be an input of the same layout.

    inputs: sample, model_output, previous, noise, guide (any floating dtype each) and mask (bool or uint8), all of
    one shape (B, …); coefficients: 9 rows of B, or of one; key: seed, offset, sample_offset.
    """
    cpu = cpu_module()
    held = [_samples(t) for t in inputs]
    cpu.diffusion_step_forward(
        [numbers for _, numbers in held], [_output(x_next), _output(x0)], x_next.shape[0], _sample_size(x_next),
        coefficients, clip, (_unsigned(key[0]), _unsigned(key[1]), key[2]), torch.get_num_threads(),
    )  # fmt: skip


def diffusion_step_backward(
    inputs: Sequence[Tensor | None],
    coefficients: Sequence[float],
    clip: tuple[float, float] | None,
    grad_sample: Tensor | None,
    grad_model_output: Tensor | None,
) -> None:
    """Writes the gradients of sample and model_output, each if it is given.

    inputs: the gradients of x′ and x0 (one may be None), sample and model_output (None without a clip), mask.
    """
    cpu = cpu_module()
    held = [_samples(t) for t in inputs]
    like = grad_sample if grad_sample is not None else grad_model_output
    assert like is not None
    cpu.diffusion_step_backward(
        [numbers for _, numbers in held], [_output(grad_sample), _output(grad_model_output)], like.shape[0],
        _sample_size(like), coefficients, clip, torch.get_num_threads(),
    )  # fmt: skip


def _gpu_coefficients(
    coefficients: Tensor, device: torch.device
) -> tuple[Tensor | None, tuple[int, int, list[float]]]:
    """Returns the arguments of the GPU's kernel, (address, columns, values): by value if the host knows a single
    column."""
    on_host = coefficients.device.type == "cpu" and not emulates_device_scalars()
    if on_host and coefficients.shape[1] == 1:
        return None, (0, 1, coefficients[:, 0].tolist())
    if coefficients.device == device:
        rows = coefficients.contiguous()
    else:
        rows = filled(coefficients.flatten().tolist(), torch.float64, device).reshape(coefficients.shape)
    return rows, (rows.data_ptr(), rows.shape[1], [])


def diffusion_step_forward_gpu(
    inputs: Sequence[Tensor | None],
    coefficients: Tensor,
    clip: tuple[float, float] | None,
    key: Tensor,
    x_next: Tensor,
    x0: Tensor | None,
) -> None:
    """Does the work of `diffusion_step_forward`; coefficients and key are tensors on either device, and the GPU's are
    not read here."""
    module, device, stream = gpu_module(x_next)
    held = [_samples(t) for t in inputs]
    rows, numbers = _gpu_coefficients(coefficients, x_next.device)
    on_host = key.device.type == "cpu" and not emulates_device_scalars()
    seed, offset, sample_offset = key.tolist() if on_host else (0, 0, 0)
    words = key.contiguous()
    module.diffusion_step_forward(
        [numbers for _, numbers in held], [_output(x_next), _output(x0)], x_next.shape[0], _sample_size(x_next),
        *numbers, clip, (_unsigned(seed), _unsigned(offset), sample_offset), 0 if on_host else words.data_ptr(),
        device, stream,
    )  # fmt: skip
    del rows


def diffusion_step_backward_gpu(
    inputs: Sequence[Tensor | None],
    coefficients: Tensor,
    clip: tuple[float, float] | None,
    grad_sample: Tensor | None,
    grad_model_output: Tensor | None,
) -> None:
    """Does the work of `diffusion_step_backward`, with coefficients on either device."""
    like = grad_sample if grad_sample is not None else grad_model_output
    assert like is not None
    module, device, stream = gpu_module(like)
    held = [_samples(t) for t in inputs]
    rows, numbers = _gpu_coefficients(coefficients, like.device)
    module.diffusion_step_backward(
        [numbers for _, numbers in held], [_output(grad_sample), _output(grad_model_output)], like.shape[0],
        _sample_size(like), *numbers, clip, device, stream,
    )  # fmt: skip
    del rows


def same_place(a: Tensor, b: Tensor) -> bool:
    """Tells whether two tensors of one shape are element by element the same memory."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and all(n == 1 or i == j for n, i, j in strides)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Tells whether the ranges of memory that two tensors span meet, in one storage or in two over the same
    memory."""
    if a.numel() == 0 or b.numel() == 0 or b._is_zerotensor():
        return False
    (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
    return a_first < b_end and b_first < a_end


def _span(tensor: Tensor) -> tuple[int, int]:
    count = tensor.numel()
    if not tensor.is_contiguous():
        count = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + count * tensor.element_size()
