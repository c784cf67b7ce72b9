# SPDX-License-Identifier: Apache-2.0
"""Defines `accelerate` and `revert`: a model's MONAI layers become medaccel's by their class alone.

Parameters, buffers, hooks, the optimizer's references and the state_dict stay the very same objects, because only
``module.__class__`` changes, and only on the modules of the model that was passed.
"""

import importlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from medaccel import _native
from medaccel.ops._registry import DEVICES, OPS, Kernel, NoKernel

SUPPORTED_MONAI = "1.6"


@dataclass(frozen=True)
class _Entry:
    monai: str  # module:Class
    ours: str
    # module:function that returns None if a module can be served, else the sentence for the report
    unsupported: str
    op: str | None  # in the registry of ops; None: the layer saves work of MONAI's, but has no kernel
    # what a layer runs on a device without a kernel
    otherwise: str = "plain PyTorch"
    # module:function (module, device's type) that returns None if the kernel takes the module's sizes, else why not
    limits: str | None = None


_REGISTRY = (
    _Entry(
        "monai.losses.contrastive:ContrastiveLoss",
        "medaccel.losses.contrastive:ContrastiveLoss",
        "medaccel.losses.contrastive:contrastive_unsupported",
        "nt_xent_loss",
    ),
    _Entry(
        "monai.networks.layers.simplelayers:GaussianFilter",
        "medaccel.layers.gaussian:GaussianFilter",
        "medaccel.layers.gaussian:filter_unsupported",
        "gaussian_filter",
    ),
    _Entry(
        "monai.networks.nets.swin_unetr:WindowAttention",
        "medaccel.layers.swin:WindowAttention",
        "medaccel.layers.swin:attention_unsupported",
        "shifted_window_attention",
        limits="medaccel.layers.swin:attention_limit",
    ),
    _Entry(
        "monai.networks.nets.swin_unetr:SwinTransformerBlock",
        "medaccel.layers.swin:SwinTransformerBlock",
        "medaccel.layers.swin:block_unsupported",
        "shifted_window_attention",
        limits="medaccel.layers.swin:attention_limit",
    ),
    _Entry(
        "monai.networks.nets.swin_unetr:BasicLayer",
        "medaccel.layers.swin:BasicLayer",
        "medaccel.layers.swin:layer_unsupported",
        None,
    ),
    _Entry(
        "monai.networks.nets.swin_unetr:SwinTransformer",
        "medaccel.layers.swin_transformer:SwinTransformer",
        "medaccel.layers.swin_transformer:transformer_unsupported",
        None,
    ),
    _Entry(
        "monai.networks.blocks.dynunet_block:UnetResBlock",
        "medaccel.layers.unet_blocks:UnetResBlock",
        "medaccel.layers.unet_blocks:residual_block_unsupported",
        "instance_norm_act",
        otherwise="MONAI's own code",
    ),
    _Entry(
        "monai.networks.blocks.dynunet_block:UnetBasicBlock",
        "medaccel.layers.unet_blocks:UnetBasicBlock",
        "medaccel.layers.unet_blocks:basic_block_unsupported",
        "instance_norm_act",
        otherwise="MONAI's own code",
    ),
    _Entry(
        "monai.networks.schedulers:DDPMScheduler",
        "medaccel.diffusion.schedulers:DDPMScheduler",
        "medaccel.diffusion.schedulers:scheduler_unsupported",
        "diffusion_step",
    ),
    _Entry(
        "monai.networks.schedulers:DDIMScheduler",
        "medaccel.diffusion.schedulers:DDIMScheduler",
        "medaccel.diffusion.schedulers:scheduler_unsupported",
        "diffusion_step",
    ),
)


def _resolve(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass
class AccelerationReport:
    """Reports what `accelerate` did; it can be printed, and is true if at least one module changed.

    Attributes:
        changed: (module's name in the model, the class it has now); the model itself is named "(model)".
        kept: (module's name, the reason why it stays MONAI's).
        kernels: (module's name, "cpu" or "cuda", which kernel serves it there, or what runs instead and why), for
            every accelerated module of the model, those of earlier calls included.
    """

    changed: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    kernels: list[tuple[str, str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.changed)

    def __str__(self) -> str:
        lines = [f"medaccel: {len(self.changed)} module(s) accelerated, {len(self.kept)} kept"]
        lines += [f"  changed  {name}: {what}" for name, what in self.changed]
        lines += [f"  kept     {name}: {why}" for name, why in self.kept]
        # A network has dozens of layers, and few answers.
        for (device, what), names in self._by_kernel().items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  on {device:<5} {what}: {names[0]}{others}")
        return "\n".join(lines)

    def _by_kernel(self) -> dict[tuple[str, str], list[str]]:
        groups: dict[tuple[str, str], list[str]] = {}
        for name, device, what in self.kernels:
            groups.setdefault((device, what), []).append(name)
        return {key: groups[key] for key in sorted(groups)}


def _serving(entry: _Entry, module: nn.Module, device: str) -> str:
    """Says which kernel serves a module on a device's type, or what runs instead and why.

    The registry of ops and the ops' own questions to this machine answer; of a GPU that is not here, only what the
    kernel is.
    """
    if entry.op is None:
        return f"{entry.ours.split(':')[1]} has no kernel of its own"
    kernel = OPS[entry.op].kernels[device]
    reason = kernel.reason if isinstance(kernel, NoKernel) else _machine_problem(kernel, device)
    if reason is None and entry.limits is not None:
        reason = _resolve(entry.limits)(module, device)
    if reason is None:
        return f"{entry.op}, {kernel}"
    return f"{entry.otherwise} ({entry.op}: {reason})"


def _machine_problem(kernel: Kernel | NoKernel, device: str) -> str | None:
    """Says why no kernel of this language runs here; returns None if one does, or if the device is not here."""
    if device == "cpu":
        return _native.cpu_problem
    triton = isinstance(kernel, Kernel) and kernel.language == "Triton"
    if torch.cuda.is_available():
        ask = _native.triton_problem if triton else _native.gpu_problem
        answers = [ask(index) for index in range(torch.cuda.device_count())]
        return None if None in answers else answers[0]
    return None if triton or _native.cuda is not None else f"the CUDA kernels are not built: {_native.cuda_problem}"


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Entry, type[nn.Module]]]:
    """Yields the model's modules that are instances of a MONAI class of the registry, subclasses included."""
    for entry in _REGISTRY:
        # A model can hold MONAI's layers only if MONAI has been imported; no import is needed to find none.
        monai_class = getattr(sys.modules.get(entry.monai.split(":")[0]), entry.monai.split(":")[1], None)
        if monai_class is None:
            continue
        for name, module in model.named_modules():
            if isinstance(module, monai_class):
                yield name or "(model)", module, entry, monai_class


def accelerate(
    model: nn.Module, *, strict: bool = False, channels_last: bool | Literal["auto"] | None = None
) -> AccelerationReport:
    """Makes the MONAI layers of `model` run on medaccel's kernels, in place; weights stay, numbers to rounding.

    Only this instance is touched. It may be wrapped (DataParallel, DDP), on any device, in training or not; calling
    again changes nothing more. `revert` undoes it.

    The model may be edited afterwards: every forward checks that the children whose work it takes over are still
    MONAI's and torch's own, without hooks, adapters, parametrizations or patches (a few microseconds a layer). If one
    is not, the forward runs MONAI's, with one warning that names the child; calling `accelerate` again lists such
    layers.

    An accelerated model can be exported as it is. torch.compile and ``torch.export.export(…, strict=True)`` take the
    kernels along. (Of a Swin UNETR, strict export stops at a check of sizes in MONAI's code.) torch.jit.trace,
    torch.onnx.export and the default torch.export record MONAI's layers instead, in torch's own ops, and the exported
    model runs without medaccel; only losses, and Gaussian filters under torch.export, stay medaccel's ops there.
    torch.jit.script can't compile our layers and says so: `revert` first.

    Args:
        model: any module that contains MONAI layers: a network, a loss, a LightningModule.
        strict: raise instead of leaving a known MONAI layer as it is.
        channels_last: memory layout of the maps in convolution blocks. "auto" (at first) brings a map to channels
            last where its convolution is expected to be faster so: bf16 and fp16 on a GPU, with channels in multiples
            of eight; large fp32 maps on a CPU. True does so everywhere, False nowhere. None leaves an earlier choice.
            Weights, state_dict and values stay; outputs may have channels-last strides.

    Returns:
        The report of what changed and what was kept, with reasons, and of what serves each layer on the CPU and on
        a GPU.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: `strict`, and a layer can't be served; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}; expected a torch.nn.Module")
    if channels_last is not None and not (isinstance(channels_last, bool) or channels_last == "auto"):
        error = ValueError if isinstance(channels_last, str) else TypeError
        raise error(f"accelerate: channels_last is {channels_last!r}; expected 'auto', True or False")
    report = AccelerationReport()
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    for name, module, entry, monai_class in _known(model):
        ours = _resolve(entry.ours)
        if isinstance(module, ours):
            # A layer was edited after `accelerate`: each forward notices it, and the report states it.
            if type(module) is ours and (edited := _resolve(entry.unsupported)(module)) is not None:
                report.kept.append((name, f"it runs MONAI's own forward, since it was edited: {edited}"))
            else:
                report.kernels += [(name, device, _serving(entry, module, device)) for device in DEVICES]
            continue
        if type(module) is not monai_class:
            reason: str | None = f"{type(module).__qualname__} is a subclass of MONAI's {monai_class.__name__}"
        elif "forward" in module.__dict__:
            reason = "its forward has been replaced on the instance"
        else:
            reason = _resolve(entry.unsupported)(module)
        if reason is None:
            swaps.append((module, ours))
            report.changed.append((name, f"{ours.__module__}.{ours.__qualname__}"))
            report.kernels += [(name, device, _serving(entry, module, device)) for device in DEVICES]
        else:
            report.kept.append((name, reason))
    if strict and report.kept:
        raise RuntimeError(f"accelerate: strict, and some layers can't be served\n{report}")
    for module, ours in swaps:
        module.__class__ = ours
    if channels_last is not None:
        for _, module, entry, _ in _known(model):
            if type(module) is (ours := _resolve(entry.ours)) and hasattr(ours, "channels_last"):
                module.channels_last = channels_last  # type: ignore[assignment]
    monai = sys.modules.get("monai")
    if swaps and monai is not None and not monai.__version__.startswith(SUPPORTED_MONAI):
        warnings.warn(
            f"medaccel was checked against MONAI {SUPPORTED_MONAI}; this is {monai.__version__}. "
            "Compare a forward pass under medaccel.use_reference().",
            stacklevel=2,
        )
    return report


def revert(model: nn.Module) -> AccelerationReport:
    """Gives the modules that `accelerate` changed their MONAI classes back; returns the changes and the modules it
    could not change.

    medaccel layers that were built as such (``medaccel.layers.GaussianFilter(...)``) become MONAI's too: the two
    differ by nothing but the class.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model is a {type(model).__name__}; expected a torch.nn.Module")
    report = AccelerationReport()
    for name, module, entry, monai_class in _known(model):
        if type(module) is _resolve(entry.ours):
            module.__class__ = monai_class
            module.__dict__.pop("channels_last", None)
            report.changed.append((name, f"{monai_class.__module__}.{monai_class.__qualname__}"))
        elif isinstance(module, _resolve(entry.ours)):
            made = type(module).__qualname__
            report.kept.append(
                (name, f"its class {made} was made from medaccel's (a subclass, a parametrization, FSDP)")
            )
    return report
