# SPDX-License-Identifier: Apache-2.0
"""The compiled modules: which is loaded and why, and the only functions that take a tensor's address.

Every function here keeps its tensors in locals until the kernel has returned: a copy made inside the call's
argument list would be freed before the kernel reads it.
"""

import functools
import importlib
import math
import os
from collections.abc import Sequence
from types import ModuleType

import torch  # before any compiled module: they share the OpenMP runtime that torch brings
from torch import Tensor

ISAS = ("baseline", "avx2", "avx512")
_CAPABILITY = {"AVX512": "avx512", "AVX2": "avx2"}  # torch's names; any other gets the baseline

DTYPES = {torch.float32: 0, torch.float64: 1}
GPU_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
GAUSSIAN_APPROX = {"erf": 0, "sampled": 1, "scalespace": 2}
GAUSSIAN_MODES = {"constant": 0, "reflect": 1, "nearest": 2, "mirror": 3, "wrap": 4}


def _import(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"medaccel.{name}"), None
    except ImportError as error:
        return None, f"medaccel.{name} can't be loaded: {error}"


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    forced = os.environ.get("MEDACCEL_ISA")
    if forced is not None and forced not in ISAS:
        raise ImportError(f"MEDACCEL_ISA is {forced!r}; expected one of {', '.join(ISAS)}")
    baseline, problem = _import("_cpu_baseline")
    if baseline is None:
        return None, problem
    supported = baseline.supported_isas()
    if forced is not None and forced not in supported:
        raise ImportError(
            f"MEDACCEL_ISA is {forced!r}, but this processor runs only {', '.join(supported)}; "
            "unset it to let medaccel choose"
        )
    wanted = forced or _CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    if wanted not in supported:
        wanted = supported[-1]
    return (baseline, None) if wanted == "baseline" else _import(f"_cpu_{wanted}")


cpu, cpu_problem = _load_cpu()
cuda, cuda_problem = _import("_cuda")


def strided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`'s values with the strides that `torch.empty_like(like)` has: itself where it has them already."""
    if tensor.stride() == like.stride():  # `tensor` is dense, so `like` is
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def gaussian_filter(
    input: Tensor,
    sigma: Sequence[float],
    truncated: float,
    approx: str,
    mode: str,
    normalize: bool,
    adjoint: bool,
) -> Tensor:
    """The native filter, or its adjoint, of a float32 or float64 CPU tensor (B, C, *spatial) of any strides.

    The output has the strides that `torch.empty_like` gives. The input is copied only where it has no dense
    spatial axis (nor dense channels), as after ``x[..., ::2]``.
    """
    assert cpu is not None
    output = torch.empty_like(input)

    def run(source: Tensor, target: Tensor) -> bool:
        return cpu.gaussian_filter(
            source.data_ptr(), target.data_ptr(), DTYPES[source.dtype], source.shape, source.stride(),
            target.stride(), sigma, truncated, GAUSSIAN_APPROX[approx], GAUSSIAN_MODES[mode], normalize, adjoint,
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
    """Σ grad · ∂filter(input)/∂sigma, one number per spatial axis. Any strides, as above."""
    assert cpu is not None

    def run(x: Tensor, g: Tensor) -> list[float]:
        return cpu.gaussian_sigma_gradient(
            x.data_ptr(), g.data_ptr(), DTYPES[x.dtype], x.shape, x.stride(), g.stride(), sigma, truncated,
            GAUSSIAN_APPROX[approx], GAUSSIAN_MODES[mode], normalize, torch.get_num_threads(),
        )  # fmt: skip

    gradient = run(input, grad)
    if not gradient:
        x, g = input.contiguous(), grad.contiguous()
        gradient = run(x, g)
    return gradient


def _address(tensor: Tensor | None) -> int:
    """0 for a tensor that there is not; the caller keeps the others alive across the kernel's call."""
    return 0 if tensor is None else tensor.data_ptr()


def _three_axes(values: Sequence[int], missing: int) -> list[int]:
    """One value per axis (z, y, x) of a map with 1-3 of them."""
    return [*[missing] * (3 - len(values)), *values]


def _window_settings(
    qkv: Tensor,
    bias_table: Tensor,
    dropout_seed: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    dropout_p: float,
) -> tuple[object, ...]:
    """What both attention kernels take after their tensors; `dropout_seed` must outlive the call."""
    batch, *sizes, channels = qkv.shape
    return (
        DTYPES[qkv.dtype], [batch, *_three_axes(sizes, 1), channels], bias_table.shape[1], bias_table.shape[0],
        _three_axes(window_size, 1), _three_axes(shift_size, 0), scale, dropout_p, dropout_threshold(dropout_p),
        0 if dropout_seed is None else dropout_seed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def dropout_threshold(dropout_p: float) -> int:
    """A value is dropped where its random 32-bit word is below this."""
    return min(int(dropout_p * 2**32), 2**32 - 1)


def window_attention_forward(
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The native attention of a float32 or float64 CPU map (B, *spatial, 3·C); the others in the same dtype.

    Returns the output (B, *spatial, C) and the base-2 log-sum-exp (B, windows, heads, tokens). The caller has checked
    that the index lies within the table.
    """
    assert cpu is not None
    batch, *sizes, channels = qkv.shape
    windows = math.prod(-(-size // w) for size, w in zip(sizes, window_size, strict=True))
    source, table = qkv.contiguous(), bias_table.contiguous()
    index, pad = bias_index.to(torch.int32).contiguous(), None if pad_qkv is None else pad_qkv.contiguous()
    output = qkv.new_empty((batch, *sizes, channels // 3))
    lse = qkv.new_empty((batch, windows, bias_table.shape[1], math.prod(window_size)))
    if output.numel() > 0:
        settings = _window_settings(source, table, dropout_seed, window_size, shift_size, scale, dropout_p)
        cpu.window_attention_forward(
            source.data_ptr(), table.data_ptr(), index.data_ptr(), 0 if pad is None else pad.data_ptr(),
            output.data_ptr(), lse.data_ptr(), *settings,
        )  # fmt: skip
    return output, lse


def window_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    dropout_p: float,
    need_table: bool,
    need_pad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients to qkv, and where needed to bias_table and pad_qkv, from what the forward kernel returned."""
    assert cpu is not None
    g, source, table, out = grad.contiguous(), qkv.contiguous(), bias_table.contiguous(), output.contiguous()
    index, pad = bias_index.to(torch.int32).contiguous(), None if pad_qkv is None else pad_qkv.contiguous()
    rows = lse.contiguous()
    grad_qkv = torch.empty_like(source)
    grad_table = torch.zeros_like(table) if need_table else None
    grad_pad = source.new_zeros(source.shape[-1]) if need_pad else None
    if out.numel() > 0:
        settings = _window_settings(source, table, dropout_seed, window_size, shift_size, scale, dropout_p)
        cpu.window_attention_backward(
            g.data_ptr(), source.data_ptr(), table.data_ptr(), index.data_ptr(), 0 if pad is None else pad.data_ptr(),
            out.data_ptr(), rows.data_ptr(), grad_qkv.data_ptr(), 0 if grad_table is None else grad_table.data_ptr(),
            0 if grad_pad is None else grad_pad.data_ptr(), *settings,
        )  # fmt: skip
    return grad_qkv, grad_table, grad_pad


def _dense(tensor: Tensor, channels_last: bool) -> Tensor:
    """(B, C, *spatial) dense in one of two orders: as torch.contiguous gives it, or with the channels last."""
    if not channels_last:
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def _norm_settings(input: Tensor, channels_last: bool, eps: float, slope: float | None) -> tuple[object, ...]:
    batch, channels, *spatial = input.shape
    return (
        DTYPES[input.dtype], batch, channels, math.prod(spatial), channels_last, eps, slope is not None,
        0.0 if slope is None else slope, torch.get_num_threads(),
    )  # fmt: skip


def instance_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    negative_slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The native norm of a float32 or float64 CPU tensor (B, C, *spatial); the others in the same dtype.

    Returns the output, channels last where the input is and contiguous otherwise, and mean and 1/σ, (B, C).
    """
    assert cpu is not None
    last = _channels_last(input)
    source, added = _dense(input, last), None if residual is None else _dense(residual, last)
    w, b = (None if t is None else t.contiguous() for t in (weight, bias))
    output = torch.empty_like(source)
    mean, rstd = input.new_empty(input.shape[:2]), input.new_empty(input.shape[:2])
    if source.numel() > 0:
        cpu.instance_norm_forward(
            source.data_ptr(), _address(w), _address(b), _address(added), output.data_ptr(), mean.data_ptr(),
            rstd.data_ptr(), *_norm_settings(source, last, eps, negative_slope),
        )  # fmt: skip
    else:
        mean.zero_(), rstd.zero_()
    return output, mean, rstd


def instance_norm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    negative_slope: float | None,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients to input and, where needed, to weight, bias and residual. signs: see csrc's `Sign`."""
    assert cpu is not None
    last = _channels_last(input)
    source, g = _dense(input, last), _dense(grad, last)
    known = None if signs is None else _dense(signs, last)
    w, b = (None if t is None else t.contiguous() for t in (weight, bias))
    m, r = mean.contiguous(), rstd.contiguous()
    grad_input = torch.empty_like(source)
    grad_weight, grad_bias = (source.new_zeros(source.shape[1]) if need_affine else None for _ in range(2))
    grad_residual = torch.empty_like(source) if need_residual else None
    kind = 0 if signs is None else 1 if negative_slope is not None and negative_slope >= 0 else 2
    if source.numel() > 0:
        cpu.instance_norm_backward(
            g.data_ptr(), source.data_ptr(), _address(w), _address(b), _address(known), kind, m.data_ptr(),
            r.data_ptr(), grad_input.data_ptr(), _address(grad_weight), _address(grad_bias), _address(grad_residual),
            *_norm_settings(source, last, 0.0, negative_slope),
        )  # fmt: skip
    return grad_input, grad_weight, grad_bias, grad_residual


# What both modules take for a tensor that isn't there.
_NO_SAMPLES = (0, 0, 0)
_NO_OUTPUT = (0, 0)


def _samples(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """The tensor with dense samples (a copy where they aren't), and its address, dtype and stride between samples."""
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


def diffusion_step_forward(
    inputs: Sequence[Tensor | None],
    coefficients: Sequence[float],
    clip: tuple[float, float] | None,
    key: Sequence[int],
    x_next: Tensor,
    x0: Tensor | None,
) -> None:
    """Writes x′ and, where it is given, x0. Both are contiguous, and may be an input whose layout is the same.

    inputs: sample, model_output, previous, noise, guide (any floating dtype each) and mask (bool or uint8), all of
    one shape (B, …); coefficients: 9 rows of B, or of one; key: seed, offset, sample_offset.
    """
    assert cpu is not None
    held = [_samples(t) for t in inputs]
    cpu.diffusion_step_forward(
        [numbers for _, numbers in held], [_output(x_next), _output(x0)], x_next.shape[0], _sample_size(x_next),
        coefficients, clip, (_unsigned(key[0]), _unsigned(key[1]), key[2]), torch.get_num_threads(),
    )  # fmt: skip


def _sample_size(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def diffusion_step_backward(
    inputs: Sequence[Tensor | None],
    coefficients: Sequence[float],
    clip: tuple[float, float] | None,
    grad_sample: Tensor | None,
    grad_model_output: Tensor | None,
) -> None:
    """Writes the gradients of sample and model_output, each where it is given.

    inputs: the gradients of x′ and x0 (one may be None), sample and model_output (None without a clip), mask.
    """
    assert cpu is not None
    held = [_samples(t) for t in inputs]
    like = grad_sample if grad_sample is not None else grad_model_output
    assert like is not None
    cpu.diffusion_step_backward(
        [numbers for _, numbers in held], [_output(grad_sample), _output(grad_model_output)], like.shape[0],
        _sample_size(like), coefficients, clip, torch.get_num_threads(),
    )  # fmt: skip


def _contrast_size(query: Tensor, key: Tensor, axes: int) -> list[int]:
    return [query.shape[0], query.shape[1], key.shape[1], query.shape[2], axes]


def pixel_contrast_forward(
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    temperature: float,
    *,
    cull: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The native loss of query (B, N, C) and key (B, M, C), and the base-2 log-sum-exps over all keys and over the
    positives, (B, N) each. Features of one dtype, coordinates (B, N, S), (B, M, S) and radius (B,) of one dtype.

    cull: skip blocks of pixels that are too far apart, which changes the time alone (the benchmark says how much).
    """
    assert cpu is not None
    q, k, r = query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k = query_coords.contiguous(), key_coords.contiguous()
    loss, lse, positive_lse = (q.new_empty(q.shape[:2]) for _ in range(3))
    cpu.pixel_contrast_forward(
        q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(), loss.data_ptr(), lse.data_ptr(),
        positive_lse.data_ptr(), DTYPES[q.dtype], DTYPES[r.dtype], _contrast_size(q, k, at_q.shape[2]), temperature,
        cull, torch.get_num_threads(),
    )  # fmt: skip
    return loss, lse, positive_lse


def pixel_contrast_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    lse: Tensor,
    positive_lse: Tensor,
    temperature: float,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to query and key, where needed, from what the forward kernel returned."""
    assert cpu is not None
    g, q, k, r = grad.contiguous(), query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k, all_keys, positives = (t.contiguous() for t in (query_coords, key_coords, lse, positive_lse))
    grad_query = torch.empty_like(q) if need_query else None
    grad_key = torch.empty_like(k) if need_key else None
    cpu.pixel_contrast_backward(
        g.data_ptr(), q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(),
        all_keys.data_ptr(), positives.data_ptr(), _address(grad_query), _address(grad_key), DTYPES[q.dtype],
        DTYPES[r.dtype], _contrast_size(q, k, at_q.shape[2]), temperature, torch.get_num_threads(),
    )  # fmt: skip
    return grad_query, grad_key


def similarity_lse_forward(query: Tensor, key: Tensor, temperature: float, self_offset: int) -> Tensor:
    """The base-2 log-sum-exp (B, N) over the keys (B, M, C) of the cosines with query (B, N, C) over temperature."""
    assert cpu is not None
    q, k = query.contiguous(), key.contiguous()
    lse = q.new_empty(q.shape[:2])
    cpu.similarity_lse_forward(
        q.data_ptr(), k.data_ptr(), lse.data_ptr(), DTYPES[q.dtype], _contrast_size(q, k, 0), self_offset,
        temperature, torch.get_num_threads(),
    )  # fmt: skip
    return lse


def similarity_lse_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    temperature: float,
    self_offset: int,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the natural log-sum-exp to query and key, where needed."""
    assert cpu is not None
    g, q, k, rows = grad.contiguous(), query.contiguous(), key.contiguous(), lse.contiguous()
    grad_query = torch.empty_like(q) if need_query else None
    grad_key = torch.empty_like(k) if need_key else None
    cpu.similarity_lse_backward(
        g.data_ptr(), q.data_ptr(), k.data_ptr(), rows.data_ptr(), _address(grad_query), _address(grad_key),
        DTYPES[q.dtype], _contrast_size(q, k, 0), self_offset, temperature, torch.get_num_threads(),
    )  # fmt: skip
    return grad_query, grad_key


def pixel_consistency_forward(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """The sums (B, N) of cosines over each query's near keys, and their numbers; dtypes as for the pixel contrast."""
    assert cpu is not None
    q, k, r = query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k = query_coords.contiguous(), key_coords.contiguous()
    sums, counts = q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
    cpu.pixel_consistency_forward(
        q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(), sums.data_ptr(),
        counts.data_ptr(), DTYPES[q.dtype], DTYPES[r.dtype], _contrast_size(q, k, at_q.shape[2]),
        torch.get_num_threads(),
    )  # fmt: skip
    return sums, counts


def pixel_consistency_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to query and key, where needed, from that of the sums."""
    assert cpu is not None
    g, q, k, r = grad.contiguous(), query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k = query_coords.contiguous(), key_coords.contiguous()
    grad_query = torch.empty_like(q) if need_query else None
    grad_key = torch.empty_like(k) if need_key else None
    cpu.pixel_consistency_backward(
        g.data_ptr(), q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(),
        _address(grad_query), _address(grad_key), DTYPES[q.dtype], DTYPES[r.dtype],
        _contrast_size(q, k, at_q.shape[2]), torch.get_num_threads(),
    )  # fmt: skip
    return grad_query, grad_key


def pixel_propagation_forward(features: Tensor, values: Tensor, power: float) -> Tensor:
    """The values (B, N, D) summed up over all pixels with weights max(cos, 0)^power of features (B, N, C)."""
    assert cpu is not None
    x, v = features.contiguous(), values.contiguous()
    out = torch.empty_like(v)
    cpu.pixel_propagation_forward(
        x.data_ptr(), v.data_ptr(), out.data_ptr(), DTYPES[x.dtype], [*x.shape, v.shape[2]], power,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def pixel_propagation_backward(
    grad: Tensor, features: Tensor, values: Tensor, power: float, need_features: bool, need_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to features and values, where needed."""
    assert cpu is not None
    g, x, v = grad.contiguous(), features.contiguous(), values.contiguous()
    grad_features = torch.empty_like(x) if need_features else None
    grad_values = torch.empty_like(v) if need_values else None
    cpu.pixel_propagation_backward(
        g.data_ptr(), x.data_ptr(), v.data_ptr(), _address(grad_features), _address(grad_values), DTYPES[x.dtype],
        [*x.shape, v.shape[2]], power, torch.get_num_threads(),
    )  # fmt: skip
    return grad_features, grad_values


# --- GPU ------------------------------------------------------------------------------------------------------
# Tests put the emulated module here: the GPU's code paths then run on CPU tensors.
emulated: ModuleType | None = None
# And σ then counts as lying on the device or, where this is False, on the host.
emulate_device_sigma = False


@functools.cache
def _probe_gpu(index: int) -> str | None:
    if cuda is None:
        return f"the CUDA kernels are not built: {cuda_problem}"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            f"cuda:{index} is sm_{major}{minor}; the CUDA kernels need sm_80 or newer "
            "(Ampere); older GPUs run plain PyTorch"
        )
    try:
        cuda.running_architecture(index)
    except RuntimeError as error:
        return (
            f"this build has no code for cuda:{index}, sm_{major}{minor} (built for {cuda.architectures}; "
            f"rebuild with MEDACCEL_CUDA_ARCHS={major}{minor}): {error}"
        )
    return None


def gpu_problem(index: int) -> str | None:
    """None where the CUDA kernels run on this GPU; else why not, in a sentence."""
    return _probe_gpu(index)


# torch.compile asks once, while it compiles, instead of tracing into the probe. This is what
# torch.compiler.assume_constant_result sets; calling that would import all of Dynamo with medaccel.
gpu_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def on_gpu_path(tensor: Tensor) -> bool:
    """Whether the GPU's kernels serve `tensor`: it is on a GPU, or a test emulates one."""
    return tensor.device.type == "cuda" or emulated is not None


def _gpu(tensor: Tensor) -> tuple[ModuleType, int, int]:
    """The module that serves `tensor`'s device, the device's index, and the current stream's handle."""
    if tensor.device.type == "cuda":
        assert cuda is not None
        return cuda, tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
    assert emulated is not None
    return emulated, 0, 0


def _gaussian_volume(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """`tensor` with its spatial part dense in C order (a copy where it isn't), and that part's sizes (z, y, x)."""
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
    """The GPU filter of a tensor (B, C, *spatial) of any floating dtype; sigma (spatial,) on either device.

    σ on the GPU is never read by the host: radius and taps are made where it lies, for radii up to
    `max_device_radius`; the caller has checked values that the host can see. derivative_axis: a spatial axis that is
    filtered with ∂taps/∂σ instead.
    """
    module, device, stream = _gpu(input)
    source, size = _gaussian_volume(input)
    output = torch.empty_like(input)
    target = output if _gaussian_volume(output)[0] is output else torch.empty_like(source)
    spatial = input.dim() - 2
    on_host = sigma.device.type == "cpu" and not (emulated is not None and emulate_device_sigma)
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
        target.stride()[:2], address, values, truncated, GAUSSIAN_APPROX[approx], GAUSSIAN_MODES[mode], normalize,
        adjoint, derivative_axis + 3 - spatial if derivative_axis >= 0 else -1, workspace.data_ptr(), max_radius,
        [t.data_ptr() for t in temporaries], device, stream,
    )  # fmt: skip
    if target is not output:
        output.copy_(target)
    return output


def gaussian_sigma_gradient_gpu(
    input: Tensor, grad: Tensor, sigma: Tensor, truncated: float, approx: str, mode: str, normalize: bool
) -> Tensor:
    """Σ grad · ∂filter(input)/∂sigma, (spatial,) in float64 on the input's device; nothing is read by the host."""
    module, device, stream = _gpu(input)
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


def _gpu_coefficients(
    coefficients: Tensor, device: torch.device
) -> tuple[Tensor | None, tuple[int, int, list[float]]]:
    """What the GPU's kernel takes: (address, columns, values); by value where the host knows one column."""
    on_host = coefficients.device.type == "cpu" and not (emulated is not None and emulate_device_sigma)
    if on_host and coefficients.shape[1] == 1:
        return None, (0, 1, coefficients[:, 0].tolist())
    rows = coefficients.to(device).contiguous()
    return rows, (rows.data_ptr(), rows.shape[1], [])


def diffusion_step_forward_gpu(
    inputs: Sequence[Tensor | None],
    coefficients: Tensor,
    clip: tuple[float, float] | None,
    key: Tensor,
    x_next: Tensor,
    x0: Tensor | None,
) -> None:
    """As `diffusion_step_forward`; coefficients and key are tensors on either device: the GPU's are not read here."""
    module, device, stream = _gpu(x_next)
    held = [_samples(t) for t in inputs]
    rows, numbers = _gpu_coefficients(coefficients, x_next.device)
    on_host = key.device.type == "cpu" and not (emulated is not None and emulate_device_sigma)
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
    """As `diffusion_step_backward`, with coefficients on either device."""
    like = grad_sample if grad_sample is not None else grad_model_output
    assert like is not None
    module, device, stream = _gpu(like)
    held = [_samples(t) for t in inputs]
    rows, numbers = _gpu_coefficients(coefficients, like.device)
    module.diffusion_step_backward(
        [numbers for _, numbers in held], [_output(grad_sample), _output(grad_model_output)], like.shape[0],
        _sample_size(like), *numbers, clip, device, stream,
    )  # fmt: skip
    del rows
