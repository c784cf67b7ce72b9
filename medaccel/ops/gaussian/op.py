# SPDX-License-Identifier: Apache-2.0
"""Registers the Gaussian filter: schema, shapes without data, gradients, autocast, kernels per device."""

import math
from typing import Any

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops._operands import Operands
from medaccel.ops._registration import register_gradients
from medaccel.ops.gaussian import native

_SETTINGS = "float truncated, str approx, str mode, bool normalize"
_lib = torch.library.Library("medaccel", "FRAGMENT")
_lib.define(f"gaussian_filter(Tensor input, Tensor sigma, {_SETTINGS}) -> Tensor")
# `input` is needed, and therefore kept by autograd, only for the gradient to sigma.
_lib.define(
    f"gaussian_filter_backward(Tensor grad, Tensor? input, Tensor sigma, {_SETTINGS}, bool need_input, "
    "bool need_sigma) -> (Tensor, Tensor)"
)


# Beyond this the taps alone would be larger than any volume that one smooths.
MAX_RADIUS = 1 << 20


# From these σ on, taps and their gradient don't overflow, by approx: 1/σ in float64; for "sampled", whose gradient
# has 1/σ², its square too; and for "sampled" taps that are not normalised, which grow like 1/σ, float32's range over
# three axes.
MIN_SIGMA, MIN_NORMALIZED_SAMPLED, MIN_SAMPLED = 1e-300, 1e-150, 1e-6


def check_sigma_values(sigma: list[float], truncated: float, approx: str, normalize: bool) -> list[float]:
    """Returns the standard deviations, or raises a ValueError if one makes no sense."""
    least = MIN_SIGMA
    if approx == "sampled":
        least = MIN_NORMALIZED_SAMPLED if normalize else MIN_SAMPLED
    for axis, value in enumerate(sigma):
        if 0 < value < least:
            raise ValueError(
                f"gaussian_filter: sigma[{axis}] is {value}; expected 0, or at least {least:g} voxels: the taps of "
                f"approx {approx!r} or their gradient overflow"
            )
        if not 0 <= value < math.inf:  # not math.isfinite: torch.compile may have made the number a symbol
            raise ValueError(f"gaussian_filter: sigma[{axis}] is {value}; expected a finite number of voxels >= 0")
        if value * truncated > MAX_RADIUS:
            raise ValueError(
                f"gaussian_filter: sigma[{axis}] is {value}; with truncated {truncated} it reaches more than "
                f"{MAX_RADIUS} voxels; expected less"
            )
    return sigma


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# --- checks --------------------------------------------------------------------------------------------------
def _check(
    name: str, argument: str, volume: Tensor, sigma: Tensor, truncated: float, approx: str, mode: str
) -> Operands:
    """Checks everything that the kernels rely on; the values of a σ on the CPU are checked when they are read."""
    operands = Operands(name, argument, volume)
    operands.rank(argument, volume, (3, 4, 5), "(B, C, *spatial) with 1-3 spatial axes")
    spatial = (volume.dim() - 2,)
    operands.rank("sigma", sigma, (1,), f"({spatial[0]},)")
    if sigma.device.type == "cpu":  # a GPU's filter takes σ from either side
        Operands(name, "sigma", sigma).tensor("sigma", sigma, spatial)
    else:
        operands.tensor("sigma", sigma, spatial)
    operands.number("truncated", truncated, 0.0)
    for setting, value, known in (
        ("approx", approx, native.APPROX),
        ("mode", mode, native.MODES),
    ):
        if value not in known:
            operands.refuse(setting, f"is {value!r}", f"one of {list(known)}")
    return operands


# --- kernels -----------------------------------------------------------------------------------------------------
def _forward(input: Tensor, sigma: Tensor, truncated: float, approx: str, mode: str, normalize: bool) -> Tensor:
    _check("gaussian_filter", "input", input, sigma, truncated, approx, mode)
    if sigma.device.type == "cpu":  # a GPU's σ is not read by the host
        values = check_sigma_values(sigma.tolist(), truncated, approx, normalize)
    if _native.on_gpu_path(input):
        return native.gaussian_filter_gpu(input, sigma, truncated, approx, mode, normalize, adjoint=False)
    x = input.to(_compute_dtype(input))
    y = native.gaussian_filter(x, values, truncated, approx, mode, normalize, adjoint=False)
    return y.to(input.dtype)


def _backward_op(
    grad: Tensor,
    input: Tensor | None,
    sigma: Tensor,
    truncated: float,
    approx: str,
    mode: str,
    normalize: bool,
    need_input: bool,
    need_sigma: bool,
) -> tuple[Tensor, Tensor]:
    operands = _check("gaussian_filter_backward", "grad", grad, sigma, truncated, approx, mode)
    if need_sigma or input is not None:
        operands.tensor("input", input, grad.shape)  # type: ignore[arg-type]
    settings = (truncated, approx, mode, normalize)
    grad_input, grad_sigma = grad.new_empty(0), sigma.new_empty(0)
    if _native.on_gpu_path(grad):
        if need_input:
            grad_input = native.gaussian_filter_gpu(grad, sigma, *settings, adjoint=True)
        if need_sigma:
            assert input is not None
            grad_sigma = native.gaussian_sigma_gradient_gpu(input, grad, sigma, *settings).to(sigma)
        return grad_input, grad_sigma
    values = check_sigma_values(sigma.tolist(), truncated, approx, normalize)
    g = grad.to(_compute_dtype(grad))
    if need_input:
        grad_input = native.gaussian_filter(g, values, *settings, adjoint=True)
        grad_input = grad_input.to(grad.dtype)
    if need_sigma:
        assert input is not None
        x = input.to(g.dtype)
        gradient = native.gaussian_sigma_gradient(x, g, values, *settings)
        grad_sigma = torch.tensor(gradient, dtype=sigma.dtype)
    return grad_input, grad_sigma


for _device in ("CPU", "CUDA"):
    _lib.impl("gaussian_filter", _forward, _device)
    _lib.impl("gaussian_filter_backward", _backward_op, _device)


# --- shapes without data -------------------------------------------------------------------------------------
@torch.library.register_fake("medaccel::gaussian_filter", lib=_lib)
def _(input: Tensor, sigma: Tensor, truncated: float, approx: str, mode: str, normalize: bool) -> Tensor:
    torch._check(
        sigma.dim() == 1 and sigma.shape[0] == input.dim() - 2,
        lambda: f"gaussian_filter: sigma has shape {tuple(sigma.shape)}; expected ({input.dim() - 2},)",
    )
    return torch.empty_like(input)


@torch.library.register_fake("medaccel::gaussian_filter_backward", lib=_lib)
def _(
    grad: Tensor,
    input: Tensor | None,
    sigma: Tensor,
    truncated: float,
    approx: str,
    mode: str,
    normalize: bool,
    need_input: bool,
    need_sigma: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(grad) if need_input else grad.new_empty(0),
        torch.empty_like(sigma, memory_format=torch.contiguous_format) if need_sigma else sigma.new_empty(0),
    )


# --- gradients -----------------------------------------------------------------------------------------------
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, sigma, *ctx.settings = inputs
    ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, sigma)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, sigma = ctx.saved_tensors
    need_input, need_sigma = ctx.needs_input_grad[:2]
    grad_input, grad_sigma = torch.ops.medaccel.gaussian_filter_backward(
        grad, input, sigma, *ctx.settings, need_input, need_sigma
    )
    return (grad_input if need_input else None, grad_sigma if need_sigma else None, None, None, None, None)


def _forward_mode(primals: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> Tensor | None:
    """Differentiates in forward mode: the filter is linear in its input; by σ only the reference has a derivative."""
    _, sigma, *settings = primals
    if tangents[1] is not None:
        return None
    output: Tensor = torch.ops.medaccel.gaussian_filter(tangents[0], sigma, *settings)
    return output


register_gradients(
    _lib,
    "gaussian_filter",
    of="gaussian_filter",
    setup_context=_setup_context,
    backward=_backward,
    forward_mode=_forward_mode,
)


# --- autocast: sigma is never cast, the filter runs on the input as it is, the result has autocast's dtype ---
def _autocast(device_type: str) -> Any:
    def forward(input: Tensor, sigma: Tensor, *settings: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            output = torch.ops.medaccel.gaussian_filter(input, sigma, *settings)
        return output if output.dtype == torch.float64 else output.to(dtype)

    return forward


_lib.impl("gaussian_filter", _autocast("cpu"), "AutocastCPU")
_lib.impl("gaussian_filter", _autocast("cuda"), "AutocastCUDA")
