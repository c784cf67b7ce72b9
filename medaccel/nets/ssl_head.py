# SPDX-License-Identifier: Apache-2.0
"""Holds the model in which Swin UNETR's encoder is pretrained: heads for rotation, contrast and
inpainting."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from monai.networks.layers.factories import Conv, Norm
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.utils import ensure_tuple_rep, look_up_option
from torch import Tensor, nn

from medaccel._accelerate import accelerate
from medaccel.nets.swin_unetr import MERGING

_STRIDE = 32  # patch 2, then four mergings


def _vae(spatial_dims: int, dim: int, channels: int) -> nn.Module:
    conv, norm = Conv[Conv.CONV, spatial_dims], Norm[Norm.INSTANCE, spatial_dims]
    widths = [dim, dim // 2, dim // 4, dim // 8, dim // 16, dim // 16]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        up = nn.Upsample(scale_factor=2, mode="trilinear" if spatial_dims == 3 else "bilinear", align_corners=False)
        layers += [conv(before, after, kernel_size=3, padding=1), norm(after), nn.LeakyReLU(), up]
    return nn.Sequential(*layers, conv(widths[-1], channels, kernel_size=1))


def _deconv(spatial_dims: int, dim: int, channels: int) -> nn.Module:
    conv = Conv[Conv.CONVTRANS, spatial_dims]
    widths = [dim, dim // 2, dim // 4, dim // 8, dim // 16, channels]
    return nn.Sequential(*(conv(before, after, kernel_size=2, stride=2) for before, after in pairwise(widths)))


def _large_kernel_deconv(spatial_dims: int, dim: int, channels: int) -> nn.Module:
    return Conv[Conv.CONVTRANS, spatial_dims](dim, channels, kernel_size=_STRIDE, stride=_STRIDE)


_UPSAMPLE: dict[str, Callable[[int, int, int], nn.Module]] = {
    "vae": _vae,
    "deconv": _deconv,
    "large_kernel_deconv": _large_kernel_deconv,
}


class SSLHead(nn.Module):
    """Joins a Swin transformer and the three heads of the published Swin UNETR pretraining, on medaccel's layers.

    Tang et al., "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis", CVPR 2022,
    https://arxiv.org/abs/2111.14791. The names of the parameters are those of its public code (``swinViT.*``,
    ``rotation_head``, ``contrastive_head``, ``conv.{0,4,8,12,16,20}`` for "vae"), so that its checkpoints load.

    Args:
        in_channels: channels of the volume. Default 1.
        feature_size: channels f of the first stage; a multiple of every stage's heads / 2^stage. Default 48.
        upsample: the decoder from the last map (16 f channels) to the reconstruction: "vae" (default), "deconv" or
            "large_kernel_deconv".
        dropout_path_rate: stochastic depth, rising linearly over the blocks to this rate. Default 0.
        use_checkpoint: recompute the blocks' activations in the backward pass. Default False.
        spatial_dims: 2 or 3. Default 3.
        depths, num_heads: blocks and attention heads per stage; four each.
        window_size: tokens, one number for all axes or one each. Default 7.
        downsample: `SwinUNETR`'s; "merging_v090" for the weights published in 2022.

    Raises:
        ValueError: an unknown `upsample` or `downsample`, `spatial_dims` not 2 or 3, not four stages, or heads that
            do not divide their stage's channels.
    """

    def __init__(
        self,
        in_channels: int = 1,
        feature_size: int = 48,
        upsample: str = "vae",
        dropout_path_rate: float = 0.0,
        use_checkpoint: bool = False,
        spatial_dims: int = 3,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        downsample: str | type[nn.Module] = "merging",
    ) -> None:
        super().__init__()
        if upsample not in _UPSAMPLE:
            raise ValueError(f"SSLHead: upsample is {upsample!r}; expected one of {', '.join(map(repr, _UPSAMPLE))}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"SSLHead: spatial_dims is {spatial_dims!r}; expected 2 or 3")
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(f"SSLHead: depths={depths} and num_heads={num_heads}; expected four stages in each")
        for stage, heads in enumerate(num_heads):
            if feature_size * 2**stage % heads:
                raise ValueError(
                    f"SSLHead: num_heads[{stage}]={heads} does not divide the stage's {feature_size * 2**stage} "
                    f"channels (feature_size={feature_size})"
                )
        dim = 16 * feature_size
        self.swinViT = SwinTransformer(
            in_chans=in_channels,
            embed_dim=feature_size,
            window_size=ensure_tuple_rep(window_size, spatial_dims),
            patch_size=ensure_tuple_rep(2, spatial_dims),
            depths=depths,
            num_heads=num_heads,
            drop_path_rate=dropout_path_rate,
            use_checkpoint=use_checkpoint,
            spatial_dims=spatial_dims,
            downsample=look_up_option(downsample, MERGING) if isinstance(downsample, str) else downsample,
        )
        self.rotation_pre = nn.Identity()
        self.rotation_head = nn.Linear(dim, 4)
        self.contrastive_pre = nn.Identity()
        self.contrastive_head = nn.Linear(dim, 512)
        self.conv = _UPSAMPLE[upsample](spatial_dims, dim, in_channels)
        accelerate(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the outputs of the three tasks in one pass.

        As in the published code, the rotation head reads the first token of the last map (1/32 of the size, layer
        normalised) and the contrastive head the second one, not a mean over the tokens.

        Args:
            x: (B, in_channels, *spatial), each size a multiple of 32, one of them at least 64.

        Returns:
            Rotation logits (B, 4); contrastive embedding (B, 512), not normalised; reconstruction, x's shape.

        Raises:
            ValueError: a spatial size is no multiple of 32, or the last map has a single token.
        """
        sizes = tuple(x.shape[2:])
        if any(size % _STRIDE for size in sizes) or all(size <= _STRIDE for size in sizes):
            raise ValueError(
                f"SSLHead: the spatial size is {sizes}; expected multiples of {_STRIDE}, one of them at least "
                f"{2 * _STRIDE} (the two heads read two tokens of the map at 1/{_STRIDE} of the size)"
            )
        last = self.swinViT(x.contiguous())[4]  # (B, 16 f, *spatial / 32)
        tokens = last.flatten(2).transpose(1, 2)  # (B, tokens, 16 f)
        rotation = self.rotation_head(self.rotation_pre(tokens[:, 0]))
        contrastive = self.contrastive_head(self.contrastive_pre(tokens[:, 1]))
        return rotation, contrastive, self.conv(last)
