# SPDX-License-Identifier: Apache-2.0
"""Builds time-conditioned networks (a small MONAI U-Net, and Swin UNETR with time) and a network's running
average."""

from collections.abc import Sequence
from typing import Any

from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medaccel.nets import SwinUNETR


def small_unet(
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 1,
    channels: Sequence[int] = (16, 32, 64),
    attention: bool = False,
) -> DiffusionModelUNet:
    """Builds MONAI's `DiffusionModelUNet`, small enough to train on a CPU.

    Args:
        channels: per level, multiples of 8; each level but the first halves the volume.
        attention: self-attention at the coarsest level and in the middle.
    """
    net = DiffusionModelUNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=tuple(channels),
        num_res_blocks=1,
        attention_levels=(*[False] * (len(channels) - 1), attention),
        norm_num_groups=8,
        num_head_channels=channels[-1],
        use_flash_attention=True,  # a head's scores of 24³ tokens would be 764 MB
    )
    if not attention:
        # MONAI's middle block has attention in any case: quadratic in the voxels, it takes most of the time on a
        # volume.
        net.middle_block.attention = nn.Identity()
    return net


class _Modulation(nn.Module):
    """Computes x · (1 + scale) + shift, both linear in the embedding; it is the identity at the start of training."""

    def __init__(self, embedding: int, channels: int):
        super().__init__()
        self.project = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Modulates x (B, C, *spatial) by the embedding (B, E); returns x's shape."""
        values = self.project(embedding)
        scale, shift = values.reshape(*values.shape, *[1] * (x.dim() - 2)).chunk(2, dim=1)
        return x * (1 + scale) + shift


class TimeConditionedSwinUNETR(SwinUNETR):
    """Tells `medaccel.nets.SwinUNETR` the time step, with `DiffusionModelUNet`'s call: net(x, timesteps).

    The sinusoidal embedding of the time step, through two layers, scales and shifts the channels of the encoder's
    five stages and of the decoder's five. A `SwinUNETR`'s state_dict loads with ``strict=False``, and the network
    then computes what that one did, until training makes use of the time.

    Args:
        embedding: channels of the time's embedding.
        others: `SwinUNETR`'s, such as `in_channels`, `out_channels` and `feature_size`.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 1, *, embedding: int = 128, **others: Any):
        super().__init__(in_channels=in_channels, out_channels=out_channels, **others)
        f = others.get("feature_size", 24)
        self.embedding = embedding
        self.time_layers = nn.Sequential(
            nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        widths = [f, 2 * f, 4 * f, 8 * f, 16 * f]
        self.time_encoder = nn.ModuleList(_Modulation(embedding, width) for width in widths)
        self.time_decoder = nn.ModuleList(_Modulation(embedding, width) for width in (8 * f, 4 * f, 2 * f, f, f))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps x (B, C, *spatial), each axis a multiple of 32, and timesteps (B,) or (1,) to the prediction; context
        must be None."""
        if context is not None:
            raise ValueError("TimeConditionedSwinUNETR: context is given; expected None: it has no cross-attention")
        if timesteps.dim() != 1 or timesteps.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"TimeConditionedSwinUNETR: timesteps has shape {tuple(timesteps.shape)}; expected ({x.shape[0]},)"
            )
        self._check_input_size(x.shape[2:])
        time = self.time_layers(get_timestep_embedding(timesteps, self.embedding).to(x.dtype))
        time = time.expand(x.shape[0], -1)
        hidden = self.swinViT(x, self.normalize)
        stages = [modulate(h, time) for modulate, h in zip(self.time_encoder, hidden, strict=True)]
        skips = [
            self.encoder1(x),
            self.encoder2(stages[0]),
            self.encoder3(stages[1]),
            self.encoder4(stages[2]),
            stages[3],
        ]
        y = self.encoder10(stages[4])
        decoders = (self.decoder5, self.decoder4, self.decoder3, self.decoder2, self.decoder1)
        for decode, skip, modulate in zip(decoders, reversed(skips), self.time_decoder, strict=True):
            y = modulate(decode(y, skip), time)
        return self.out(y)


def running_average(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """Returns an exponential moving average of a model's weights and buffers: torch's `AveragedModel`.

    Call `average.update_parameters(model)` after each optimizer step; sample with `average` (or `average.module`).

    Raises:
        ValueError: decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"running_average: decay is {decay}; expected a number in [0, 1)")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
