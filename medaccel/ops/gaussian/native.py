# SPDX-License-Identifier: Apache-2.0
"""Calls the Gaussian filter's kernels, CPU and GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medaccel._native import DTYPES, GPU_DTYPES, cpu_module, emulates_device_scalars, gpu_module

# csrc's codes
APPROX = {"erf": 0, "sampled": 1, "scalespace": 2}
MODES = {"constant": 0, "reflect": 1, "nearest": 2, "mirror": 3, "wrap": 4}


def gaussian_filter(
    input: Tensor,
    sigma: Sequence[float],
    truncated: float,
    approx: str,
    mode: str,
    normalize: bool,
    adjoint: bool,
) -> Tensor:
    """Runs the native filter, or its adjoint, on a float32 or float64 CPU tensor (B, C, *spatial) of any strides.

    The output has the strides that `torch.empty_like` gives. The input is copied only if it has no dense spatial axis
    (nor dense channels), as after ``x[..., ::2]``.
    """
    cpu = cpu_module()
    output = torch.empty_like(input)

    def run(source: Tensor, target: Tensor) -> bool:
        return cpu.gaussian_filter(
            source.data_ptr(), target.data_ptr(), DTYPES[source.dtype], source.shape, source.stride(),
            target.stride(), sigma, truncated, APPROX[approx], MODES[mode], normalize, adjoint,
            torch.get_num_threads(),
        )  # fmt: skip

    if not run(input, output):
        source = input.contiguous()
        target = torch.empty_like(source)
        run(source, target)
        output.copy_(target)
    return output


def gaussian_sigma_gradient(
    input: Tensor,
    grad: Tensor,
    sigma: Sequence[float],
    truncated: float,
    approx: str,
    mode: str,
    normalize: bool,
) -> list[float]:
    """Returns Σ grad · ∂filter(input)/∂sigma, one number per spatial axis, for any strides."""
    cpu = cpu_module()

    def run(x: Tensor, g: Tensor) -> list[float]:
        return cpu.gaussian_sigma_gradient(
            x.data_ptr(), g.data_ptr(), DTYPES[x.dtype], x.shape, x.stride(), g.stride(), sigma, truncated,
            APPROX[approx], MODES[mode], normalize, torch.get_num_threads(),
        )  # fmt: skip

    gradient = run(input, grad)
    if not gradient:
        x, g = input.contiguous(), grad.contiguous()
        gradient = run(x, g)
    return gradient


def _volume(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Returns `tensor` with its spatial part dense in C order (a copy if it isn't), and that part's sizes (z, y,
    x)."""
    size = [*[1] * (5 - tensor.dim()), *tensor.shape[2:]]
    step = 1
    for axis in range(tensor.dim() - 1, 1, -1):
        if tensor.shape[axis] != 1 and tensor.stride(axis) != step:
            return tensor.contiguous(), size
        step *= tensor.shape[axis]
    return tensor, size


def gaussian_filter_gpu(
    input: Tensor,
    sigma: Tensor,
    truncated: float,
    approx: str,
    mode: str,
    normalize: bool,
    adjoint: bool,
    derivative_axis: int = -1,
) -> Tensor:
    """Filters a tensor (B, C, *spatial) of any floating dtype on the GPU; sigma (spatial,) lies on either device.

    σ on the GPU is never read by the host: radius and taps are made where it lies, for radii up to
    `max_device_radius`; the caller has checked values that the host can see. derivative_axis: a spatial axis that is
    filtered with ∂taps/∂σ instead.
    """
    module, device, stream = gpu_module(input)
    source, size = _volume(input)
    output = torch.empty_like(input)
    target = output if _volume(output)[0] is output else torch.empty_like(source)
    spatial = input.dim() - 2
    on_host = sigma.device.type == "cpu" and not emulates_device_scalars()
    values, address = [0.0] * 3, 0
    max_radius = module.max_device_radius
    if on_host:
        values = [0.0] * (3 - spatial) + sigma.tolist()
        max_radius = max(module.gaussian_radius(s, truncated) for s in values)
    else:
        on_device = torch.zeros(3, dtype=torch.float64, device=sigma.device)
        on_device[3 - spatial :] = sigma
        address = on_device.data_ptr()
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    fused = on_host and max_radius <= module.fused_radius and compute == torch.float32
    plain = not fused or (adjoint and mode != "constant")
    temporaries = [source.new_empty(source.shape if plain else (0,), dtype=compute) for _ in range(2)]
    workspace = source.new_empty(module.gaussian_workspace_bytes(max_radius), dtype=torch.uint8)
    module.gaussian_filter(
        source.data_ptr(), target.data_ptr(), GPU_DTYPES[input.dtype], source.shape[:2], size, source.stride()[:2],
        target.stride()[:2], address, values, truncated, APPROX[approx], MODES[mode], normalize,
        adjoint, derivative_axis + 3 - spatial if derivative_axis >= 0 else -1, workspace.data_ptr(), max_radius,
        [t.data_ptr() for t in temporaries], device, stream, 0,
    )  # fmt: skip
    if target is not output:
        output.copy_(target)
    return output


def gaussian_sigma_gradient_gpu(
    input: Tensor, grad: Tensor, sigma: Tensor, truncated: float, approx: str, mode: str, normalize: bool
) -> Tensor:
    """Returns Σ grad · ∂filter(input)/∂sigma, (spatial,) in float64 on the input's device; the host reads nothing."""
    module, device, stream = gpu_module(input)
    if input.dtype in (torch.bfloat16, torch.float16):
        input = input.float()  # the filtered input is summed up, and must not be rounded before
    g = grad.to(input.dtype).contiguous()
    result = input.new_zeros(input.dim() - 2, dtype=torch.float64)
    if input.numel() == 0:
        return result
    partial = input.new_empty(module.dot_blocks, dtype=torch.float64)
    for axis in range(input.dim() - 2):
        slope = gaussian_filter_gpu(input, sigma, truncated, approx, mode, normalize, False, axis).contiguous()
        module.dot(
            slope.data_ptr(), g.data_ptr(), g.numel(), GPU_DTYPES[g.dtype], partial.data_ptr(),
            result[axis:].data_ptr(), device, stream,
        )  # fmt: skip
    return result
