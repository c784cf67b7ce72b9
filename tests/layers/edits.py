# SPDX-License-Identifier: Apache-2.0
"""Provides layers to edit, the edits, and the comparison with MONAI's layer edited in the same way."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from monai.networks.blocks import dynunet_block as monai_blocks
from monai.networks.layers import GaussianFilter as MonaiGaussianFilter
from monai.networks.nets import swin_unetr as monai_swin
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from medaccel.layers import (
    BasicLayer,
    GaussianFilter,
    SwinTransformerBlock,
    UnetBasicBlock,
    UnetResBlock,
    WindowAttention,
)

Build = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


def randomised(layer: nn.Module) -> nn.Module:
    for name, parameter in layer.named_parameters():
        if name.endswith(("bias", "table")) or "norm" in name:
            nn.init.normal_(parameter)
    return layer.double()


def attention() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = monai_swin.WindowAttention(6, 2, (2, 2, 2), qkv_bias=True)
    return randomised(layer), (torch.randn(4, 8, 6, dtype=torch.float64), None)


def masked_attention() -> tuple[nn.Module, tuple[Any, ...]]:
    layer, (x, _) = attention()
    return layer, (x, -100.0 * torch.randint(0, 2, (2, 8, 8)).double())


def shifted_block() -> tuple[nn.Module, tuple[Any, ...]]:
    """A block alone, its map padded, with the mask that a stage passes."""
    layer = monai_swin.SwinTransformerBlock(6, 2, (2, 2, 2), (1, 1, 1))
    mask = monai_swin.compute_mask([4, 4, 4], (2, 2, 2), (1, 1, 1), "cpu")
    return randomised(layer), (torch.randn(1, 3, 4, 3, 6, dtype=torch.float64), mask)


def unshifted_block() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = monai_swin.SwinTransformerBlock(6, 2, (2, 2), (0, 0))
    return randomised(layer), (torch.randn(1, 3, 5, 6, dtype=torch.float64), None)


def stage() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = monai_swin.BasicLayer(6, 2, 2, (2, 2, 2), [0.0, 0.0], qkv_bias=True, downsample=monai_swin.PatchMerging)
    return randomised(layer), (torch.randn(1, 6, 3, 4, 3, dtype=torch.float64),)


def residual_block() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = monai_blocks.UnetResBlock(3, 2, 4, 3, 1, ("instance", {"affine": True}))
    return randomised(layer), (torch.randn(2, 2, 4, 5, 3, dtype=torch.float64),)


def plain_residual_block() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = monai_blocks.UnetResBlock(2, 3, 3, 3, 1, ("instance", {"affine": True}))
    return randomised(layer), (torch.randn(2, 3, 4, 5, dtype=torch.float64),)


def basic_block() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = monai_blocks.UnetBasicBlock(3, 2, 4, 3, 1, ("instance", {"affine": True}))
    return randomised(layer), (torch.randn(2, 2, 4, 5, 3, dtype=torch.float64),)


def gaussian() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = MonaiGaussianFilter(2, (1.2, 0.7), requires_grad=True)
    return layer.double(), (torch.randn(2, 2, 7, 8, dtype=torch.float64),)


LAYERS: dict[str, tuple[Build, type[nn.Module]]] = {
    "attention": (attention, WindowAttention),
    "masked_attention": (masked_attention, WindowAttention),
    "shifted_block": (shifted_block, SwinTransformerBlock),
    "unshifted_block": (unshifted_block, SwinTransformerBlock),
    "stage": (stage, BasicLayer),
    "residual_block": (residual_block, UnetResBlock),
    "plain_residual_block": (plain_residual_block, UnetResBlock),
    "basic_block": (basic_block, UnetBasicBlock),
    "gaussian": (gaussian, GaussianFilter),
}


class Scaled(nn.Module):
    """Stands for a user's own module in a child's place: it changes the result."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 1.25 * self.inner(*args, **kwargs) + 0.1


class OfPosition(nn.Module):
    """A module that is not the same for every token: it depends on the order and number of rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.inner(x, *args, **kwargs)
        return y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)


class Halved(nn.Module):
    """Is a parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


Seen = list[Any]


def _shapes(args: Any) -> Any:
    return [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]


def child_of(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return layer.get_submodule(parent), name


def replace(make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module, str, Seen], None]:
    def edit(layer: nn.Module, path: str, seen: Seen) -> None:
        parent, name = child_of(layer, path)
        parent._modules[name] = make(layer.get_submodule(path))

    return edit


def forward_hook(layer: nn.Module, path: str, seen: Seen) -> None:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(("hook", _shapes(args), tuple(output.shape)))
        return 0.75 * output + 0.2

    layer.get_submodule(path).register_forward_hook(hook)


def forward_hook_with_kwargs(layer: nn.Module, path: str, seen: Seen) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return output.flip(-1)

    layer.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


def forward_pre_hook(layer: nn.Module, path: str, seen: Seen) -> None:
    def hook(module: nn.Module, args: Any) -> Any:
        seen.append(("pre", _shapes(args)))
        return (args[0] + 0.3, *args[1:])

    layer.get_submodule(path).register_forward_pre_hook(hook)


def watching_hook(layer: nn.Module, path: str, seen: Seen) -> None:
    """A hook that only records, as those that extract features do."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append([a.detach().sum().item() if isinstance(a, Tensor) else a for a in (*args, output)])

    layer.get_submodule(path).register_forward_hook(hook)


def full_backward_hook(layer: nn.Module, path: str, seen: Seen) -> None:
    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        return tuple(None if g is None else 1.5 * g for g in grad_input)

    layer.get_submodule(path).register_full_backward_hook(hook)


def full_backward_pre_hook(layer: nn.Module, path: str, seen: Seen) -> None:
    def hook(module: nn.Module, grad_output: Any) -> Any:
        return tuple(None if g is None else 1.5 * g for g in grad_output)

    layer.get_submodule(path).register_full_backward_pre_hook(hook)


def instance_forward(layer: nn.Module, path: str, seen: Seen) -> None:
    child = layer.get_submodule(path)
    original = type(child).forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * original(child, *args, **kwargs)

    child.forward = forward


def parametrized(layer: nn.Module, path: str, seen: Seen) -> None:
    parametrize.register_parametrization(layer.get_submodule(path), "weight", Halved())


def weight_norm(layer: nn.Module, path: str, seen: Seen) -> None:
    parametrizations.weight_norm(layer.get_submodule(path))
    layer.get_submodule(path).parametrizations.weight.original0.data.mul_(1.5)


def old_weight_norm(layer: nn.Module, path: str, seen: Seen) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer.get_submodule(path))
    layer.get_submodule(path).weight_g.data.mul_(1.5)


def pruned(layer: nn.Module, path: str, seen: Seen) -> None:
    prune.l1_unstructured(layer.get_submodule(path), "weight", amount=0.5)


def other_class(layer: nn.Module, path: str, seen: Seen) -> None:
    """The class exchanged in place, as FSDP and quantisation do."""
    child = layer.get_submodule(path)
    kind = type(child)
    child.__class__ = type(
        f"Own{kind.__name__}", (kind,), {"forward": lambda *args, **kw: -kind.forward(*args, **kw)}
    )


EDITS = {
    "scaled": replace(Scaled),
    "of_position": replace(OfPosition),
    "identity": replace(lambda _: nn.Identity()),
    "forward_hook": forward_hook,
    "forward_hook_with_kwargs": forward_hook_with_kwargs,
    "forward_pre_hook": forward_pre_hook,
    "watching_hook": watching_hook,
    "full_backward_hook": full_backward_hook,
    "full_backward_pre_hook": full_backward_pre_hook,
    "instance_forward": instance_forward,
    "other_class": other_class,
    "parametrized": parametrized,
    "weight_norm": weight_norm,
    "old_weight_norm": old_weight_norm,
    "pruned": pruned,
}
NEED_WEIGHT = {"parametrized", "weight_norm", "old_weight_norm", "pruned"}


def setting(path: str, attribute: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda layer: setattr(layer.get_submodule(path), attribute, value)


def exchange(path: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def edit(layer: nn.Module) -> None:
        parent, name = child_of(layer, path)
        setattr(parent, name, make())

    return edit


def running(norm: str) -> Callable[[nn.Module], None]:
    def edit(layer: nn.Module) -> None:
        block = layer
        setattr(block, norm, nn.InstanceNorm3d(4, affine=True, track_running_stats=True).double())
        block.eval()
        getattr(block, norm).running_mean.fill_(0.7)
        getattr(block, norm).running_var.fill_(3.0)

    return edit


def shadow(path: str) -> Callable[[nn.Module], None]:
    """Hides the registered child behind an attribute of the instance."""

    def edit(layer: nn.Module) -> None:
        parent, name = child_of(layer, path)
        parent.__dict__[name] = lambda *args, **kwargs: 0.5 * parent._modules[name](*args, **kwargs)

    return edit


def without_third_norm(layer: nn.Module) -> None:
    del layer.norm3


def outcome(layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Returns the output and the gradients to the input and every parameter, or the class of the raised error."""
    x = inputs[0].detach().clone().requires_grad_()
    try:
        y = layer(x, *inputs[1:])
        grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)
    except Exception as error:
        return type(error)
    return [y, *grads]


def assert_same(ours: Any, monais: Any, words: str, relative: float = 1e-10) -> None:
    if isinstance(monais, type):
        assert ours is monais, words
        return
    assert not isinstance(ours, type), f"{words}: raised {ours}"
    for a, b in zip(ours, monais, strict=True):
        if b is None:
            assert a is None, words
            continue
        bound = relative * max(1.0, float(b.abs().max()))
        assert float((a - b).abs().max()) <= bound, words
