# SPDX-License-Identifier: Apache-2.0
"""Runs MONAI's Swin transformer layers on medaccel's attention: no copy of the map is rolled, padded,
partitioned or masked."""

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from monai.networks.nets import swin_unetr as monai_swin
from monai.networks.nets.swin_unetr import BasicLayer as MonaiBasicLayer
from monai.networks.nets.swin_unetr import SwinTransformerBlock as MonaiSwinTransformerBlock
from monai.networks.nets.swin_unetr import WindowAttention as MonaiWindowAttention
from monai.networks.nets.swin_unetr import get_window_size
from torch import Tensor, nn

from medaccel.layers._bypass import Child, global_hooks, number, problem, warn_once
from medaccel.ops import shifted_window_attention
from medaccel.ops._dispatch import exporting, refuse_scripting
from medaccel.ops.window_attention.op import head_dim_problem

_MONAI_BLOCK_FORWARD = MonaiSwinTransformerBlock.forward


class _Mask(Enum):
    """Stands for the mask that MONAI's `BasicLayer` passes to its blocks, where only the kernel would read it."""

    SHIFT = "shift"


def _softmax_values(softmax: nn.Softmax) -> str | None:
    return None if softmax.dim in (-1, 3) else f"is over dim {softmax.dim}; expected -1, the keys"


def _dropout_values(dropout: nn.Dropout) -> str | None:
    return None if number(dropout.p) and 0 <= dropout.p < 1 else f"has p={dropout.p}; expected a number in [0, 1)"


_SOFTMAX = ((nn.Softmax,), "torch's Softmax", _softmax_values)
_DROPOUT = ((nn.Dropout,), "torch's Dropout", _dropout_values)
_LINEAR = ((nn.Linear,), "torch's Linear")


def _dropout(attention: Any, device: torch.device) -> tuple[float, Tensor | None]:
    """Returns the attention's dropout as the op takes it: the probability and a seed that torch's generator draws on
    `device`."""
    p = float(attention.attn_drop.p) if attention.attn_drop.training else 0.0
    if p > 0 and getattr(attention, "use_flash_attention", False) and not torch.is_grad_enabled():
        p = 0.0  # MONAI's flash path drops nothing
    return p, torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device) if p > 0 else None


def _attention_values(attention: Any) -> str | None:
    """Describes a setting of the attention that the kernel does not serve; returns None if it serves them all."""
    if not number(attention.scale):
        return f"its scale is a {type(attention.scale).__name__}; expected a number, since a kernel has no gradient"
    if attention.dim % attention.num_heads:
        return f"its {attention.num_heads} heads do not divide its {attention.dim} channels"
    return None


class WindowAttention(MonaiWindowAttention):
    """This class is a drop-in for `monai.networks.nets.swin_unetr.WindowAttention`, same constructor, attributes and
    state_dict.

    On its own it works on windows that are cut already; within `SwinTransformerBlock` the block works on the map. If
    a bypassed child is not torch's own, it runs MONAI's forward and warns once.
    """

    __prepare_scriptable__ = refuse_scripting
    BYPASSED: ClassVar = (Child("softmax", *_SOFTMAX), Child("attn_drop", *_DROPOUT))
    _MONAI_FORWARD: ClassVar = MonaiWindowAttention.forward

    def unserved(self) -> str | None:
        """Says why the kernel can't compute this layer as it is now; returns None if it can."""
        if MonaiWindowAttention.forward is not WindowAttention._MONAI_FORWARD:
            return "MONAI's WindowAttention.forward has been replaced"
        return _attention_values(self) or problem(self, WindowAttention.BYPASSED)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps (windows, tokens, C) to the same shape; `mask` (n, tokens, tokens), where n divides `windows`, is
        added to the scores.

        A mask may hold any values, so a call with one runs torch's scaled_dot_product_attention.
        """
        if exporting():  # asked first: an exporter shows children through classes of its own
            return torch.as_tensor(super().forward(x, mask))
        if (reason := self.unserved()) is not None:
            warn_once(self, reason)
            return torch.as_tensor(super().forward(x, mask))
        b, n, c = x.shape
        qkv = self.qkv(x)
        index = self.relative_position_index[:n, :n]
        if mask is None:
            p, seed = _dropout(self, x.device)
            y = shifted_window_attention(
                qkv,
                self.relative_position_bias_table,
                index,
                window_size=(n,),
                shift_size=(0,),
                scale=self.scale,
                dropout_p=p,
                dropout_seed=seed,
            )
        else:
            q, k, v = qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
            bias = self.relative_position_bias_table[index.reshape(-1)].reshape(n, n, -1).permute(2, 0, 1)
            bias = (bias + mask[:, None]).repeat(b // len(mask), 1, 1, 1)  # (windows, heads, tokens, tokens)
            p, _ = _dropout(self, x.device)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=p, scale=self.scale)
            y = y.transpose(1, 2).reshape(b, n, c)
        return self.proj_drop(self.proj(y))


class SwinTransformerBlock(MonaiSwinTransformerBlock):
    """This class is a drop-in for `monai.networks.nets.swin_unetr.SwinTransformerBlock`, same constructor and
    state_dict.

    The map goes into the attention as it is: shift, padding, windows and mask are index arithmetic there. Called with
    a mask of the caller's own, or with None where windows are shifted, it computes what MONAI does with that mask.
    Where a bypassed child is not torch's own, it runs MONAI's forward and warns once.
    """

    # The projections are called, but on the map instead of on padded windows: a hook or another class would notice.
    BYPASSED: ClassVar = (
        Child("attn", (WindowAttention, MonaiWindowAttention), "MONAI's WindowAttention"),
        Child("attn.softmax", *_SOFTMAX),
        Child("attn.attn_drop", *_DROPOUT),
        Child("attn.qkv", *_LINEAR),
        Child("attn.proj", *_LINEAR),
        Child("attn.proj_drop", *_DROPOUT),
    )
    _MONAI_PART1: ClassVar = MonaiSwinTransformerBlock.forward_part1
    __prepare_scriptable__ = refuse_scripting

    def unserved(self) -> str | None:
        """Says why the kernel can't compute this block as it is now; returns None if it can."""
        if MonaiSwinTransformerBlock.forward_part1 is not SwinTransformerBlock._MONAI_PART1:
            return "MONAI's SwinTransformerBlock.forward_part1 has been replaced"
        if MonaiWindowAttention.forward is not WindowAttention._MONAI_FORWARD:
            return "MONAI's WindowAttention.forward has been replaced"
        return problem(self, SwinTransformerBlock.BYPASSED) or _attention_values(self.attn)

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | _Mask | None) -> Tensor:
        """Applies norm1, attention and projection to (B, *spatial, C), whose shape stays."""
        sizes = x.shape[1:-1]
        window, shift = get_window_size(sizes, self.window_size, self.shift_size)
        # An exporter shows children through classes of its own, and gets MONAI's code in any case.
        exported = exporting()
        reason = None if exported else self.unserved()
        if reason is not None:
            warn_once(self, reason)
        known = not any(shift) or _is_shift_mask(mask_matrix, sizes, window, shift)
        if exported or reason is not None or not known:
            if mask_matrix is _Mask.SHIFT:
                mask_matrix = _shift_mask(sizes, window, shift, x.device) if any(shift) else None
            return torch.as_tensor(super().forward_part1(x, mask_matrix))
        attention: Any = self.attn
        x = self.norm1(x)
        tokens = math.prod(window)
        # A padded token is zero before the projection, so its q, k and v are the projection's bias.
        padded = any(size % w for size, w in zip(sizes, window, strict=True))
        p, seed = _dropout(attention, x.device)
        y = shifted_window_attention(
            attention.qkv(x),
            attention.relative_position_bias_table,
            attention.relative_position_index[:tokens, :tokens],
            window_size=window,
            shift_size=shift,
            pad_qkv=attention.qkv.bias if padded else None,
            scale=attention.scale,
            dropout_p=p,
            dropout_seed=seed,
        )
        return attention.proj_drop(attention.proj(y))


def _shift_mask(sizes: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """Returns MONAI's mask for a map of these sizes, marked for `_is_shift_mask`."""
    padded = [math.ceil(size / w) * w for size, w in zip(sizes, window, strict=True)]
    mask: Tensor = monai_swin.compute_mask(padded, window, shift, device)
    if not torch.compiler.is_compiling():
        mask._medaccel_shift = (tuple(sizes), tuple(window), tuple(shift), mask._version)  # type: ignore[attr-defined]
    return mask


def _is_shift_mask(mask: Any, sizes: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> bool:
    """Tells whether `mask` is known to be MONAI's own for this map, unchanged: the kernel's index arithmetic then
    does the same."""
    if mask is _Mask.SHIFT:
        return True
    made = getattr(mask, "_medaccel_shift", None)
    return made is not None and made == (tuple(sizes), tuple(window), tuple(shift), mask._version)


def _observed(block: nn.Module) -> bool:
    """Tells whether a hook would see the arguments of `block`; the hooks that shard a model (FSDP) do not look at a
    mask."""
    return global_hooks() or any(
        not getattr(hook, "__module__", "").startswith("torch.distributed.")
        for hooks in (block._forward_pre_hooks, block._forward_hooks)
        for hook in hooks.values()
    )


class BasicLayer(MonaiBasicLayer):
    """This class is a drop-in for `monai.networks.nets.swin_unetr.BasicLayer`: a stage that builds no mask which
    nobody reads."""

    _MONAI_FORWARD: ClassVar = MonaiBasicLayer.forward
    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, *spatial) to the next stage's map."""
        patched = MonaiBasicLayer.forward is not BasicLayer._MONAI_FORWARD
        if patched or exporting() or self.use_hyena or x.dim() not in (4, 5):
            return super().forward(x)
        sizes = x.shape[2:]
        x = x.movedim(1, -1).contiguous()
        mask: Tensor | None = None
        for block in self.blocks:
            if self._reads_no_mask(block):
                x = block(x, _Mask.SHIFT)
                continue
            if mask is None:
                window, shift = get_window_size(sizes, self.window_size, self.shift_size)
                mask = _shift_mask(sizes, window, shift, x.device)
            x = block(x, mask)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.movedim(-1, 1)

    def _reads_no_mask(self, block: Any) -> bool:
        """Tells whether `block` is medaccel's, shifts as this stage's mask does, and has no hook that would see the
        mask."""
        kind = type(block)
        return (
            isinstance(block, SwinTransformerBlock)
            and kind.forward is _MONAI_BLOCK_FORWARD
            and kind.forward_part1 is SwinTransformerBlock.forward_part1
            and not block.__dict__.keys() & {"forward", "forward_part1"}
            and not _observed(block)
            and tuple(block.window_size) == tuple(self.window_size)
            and tuple(block.shift_size) in (tuple(self.shift_size), tuple(self.no_shift))
        )


def attention_unsupported(module: Any) -> str | None:
    """Says why `WindowAttention` can't take the place of MONAI's; returns None if it can."""
    return WindowAttention.unserved(module)


def block_unsupported(module: Any) -> str | None:
    """Says why `SwinTransformerBlock` can't take the place of MONAI's; returns None if it can."""
    if "forward_part1" in module.__dict__:
        return "its forward_part1 has been replaced on the instance"
    return SwinTransformerBlock.unserved(module)


def attention_limit(module: Any, device: str) -> str | None:
    """Says why the kernel of a device's type does not take the attention's sizes; returns None if it does."""
    attention = module if isinstance(module, MonaiWindowAttention) else module.attn
    return head_dim_problem(attention.dim // attention.num_heads) if device == "cuda" else None


def layer_unsupported(module: Any) -> str | None:
    """Says why `BasicLayer` can't take the place of MONAI's; returns None if it can."""
    return "its blocks are Hyena's, which have no attention" if module.use_hyena else None
