# SPDX-License-Identifier: Apache-2.0
"""MONAI's Swin transformer layers on medaccel's attention: no rolled, padded, partitioned or masked copies."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import BasicLayer as MonaiBasicLayer
from monai.networks.nets.swin_unetr import SwinTransformerBlock as MonaiSwinTransformerBlock
from monai.networks.nets.swin_unetr import WindowAttention as MonaiWindowAttention
from monai.networks.nets.swin_unetr import get_window_size
from torch import Tensor, nn

from medaccel.layers._hooks import bypass_problem
from medaccel.ops import shifted_window_attention
from medaccel.ops._dispatch import exporting, refuse_scripting


def _dropout(attention: Any, device: torch.device) -> tuple[float, Tensor | None]:
    """The attention's dropout as the op takes it: probability and a seed that torch's generator draws on `device`."""
    p = float(attention.attn_drop.p) if attention.attn_drop.training else 0.0
    return p, torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device) if p > 0 else None


class WindowAttention(MonaiWindowAttention):
    """Drop-in for `monai.networks.nets.swin_unetr.WindowAttention`, same constructor, attributes and state_dict.

    On its own it works on windows that are cut already; within `SwinTransformerBlock` the block works on the map.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(windows, tokens, C) to the same; mask (n, tokens, tokens) is added to the scores, n dividing `windows`.

        A mask may be anything, so with one this is torch's scaled_dot_product_attention.
        """
        if exporting():
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
            p = self.attn_drop.p if self.attn_drop.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=p, scale=self.scale)
            y = y.transpose(1, 2).reshape(b, n, c)
        return self.proj_drop(self.proj(y))


class SwinTransformerBlock(MonaiSwinTransformerBlock):
    """Drop-in for `monai.networks.nets.swin_unetr.SwinTransformerBlock`, same constructor and state_dict.

    The map goes into the attention as it is: shift, padding, windows and mask are index arithmetic there. The mask
    that MONAI's `BasicLayer` passes is that same mask, and is not looked at.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        """(B, *spatial, C) to the same: norm1, attention, projection."""
        # Without a mask, only a block that isn't shifted is the same in MONAI's code.
        if exporting() and (mask_matrix is not None or not any(self.shift_size)):
            return torch.as_tensor(super().forward_part1(x, mask_matrix))
        attention: Any = self.attn
        x = self.norm1(x)
        sizes = x.shape[1:-1]
        window, shift = get_window_size(sizes, self.window_size, self.shift_size)
        tokens = math.prod(window)
        # A padded token is zero before the projection, so its q, k and v are the projection's bias. Where the
        # projection is not torch's own (an adapter, a quantised layer), it is asked.
        pad = None
        if any(size % w for size, w in zip(sizes, window, strict=True)):
            plain = type(attention.qkv) is nn.Linear
            pad = attention.qkv.bias if plain else attention.qkv(x.new_zeros(x.shape[-1]))
        p, seed = _dropout(attention, x.device)
        y = shifted_window_attention(
            attention.qkv(x),
            attention.relative_position_bias_table,
            attention.relative_position_index[:tokens, :tokens],
            window_size=window,
            shift_size=shift,
            pad_qkv=pad,
            scale=attention.scale,
            dropout_p=p,
            dropout_seed=seed,
        )
        return attention.proj_drop(attention.proj(y))


class BasicLayer(MonaiBasicLayer):
    """Drop-in for `monai.networks.nets.swin_unetr.BasicLayer`: a stage that builds no mask that nobody reads."""

    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the next stage's map."""
        if exporting() or not all(type(block) is SwinTransformerBlock for block in self.blocks):
            return super().forward(x)
        x = x.movedim(1, -1).contiguous()
        for block in self.blocks:
            x = block(x, None)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.movedim(-1, 1)


def attention_unsupported(module: Any) -> str | None:
    """None where `WindowAttention` may take the place of MONAI's; else why not."""
    if module.dim % module.num_heads:
        return f"its {module.num_heads} heads do not divide its {module.dim} channels"
    return None


def block_unsupported(module: Any) -> str | None:
    """None where `SwinTransformerBlock` may take the place of MONAI's; else why not."""
    attention = module.attn
    if type(attention) not in (MonaiWindowAttention, WindowAttention):
        return f"its attention is a {type(attention).__qualname__}, not MONAI's WindowAttention"
    if problem := bypass_problem(attention, "attention"):
        return problem
    if "forward_part1" in module.__dict__:
        return "its forward_part1 has been replaced on the instance"
    return attention_unsupported(attention)


def layer_unsupported(module: Any) -> str | None:
    """None where `BasicLayer` may take the place of MONAI's; else why not."""
    return "its blocks are Hyena's, which have no attention" if module.use_hyena else None
