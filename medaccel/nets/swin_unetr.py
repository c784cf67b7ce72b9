# SPDX-License-Identifier: Apache-2.0
"""Builds MONAI's Swin UNETR on medaccel's layers, with the merging order that the weights of 2022 were
trained with."""

import inspect
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import MERGING_MODE, PatchMergingV2
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from monai.utils import ensure_tuple_rep, look_up_option
from torch import Tensor

from medaccel._accelerate import accelerate

# The first map comes whole, then its neighbours: two of the eight are taken twice and two never, as in the published
# code.
_V090_OFFSETS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


class PatchMergingV090(PatchMergingV2):
    """Merges patches as MONAI before 1.5 did under the name "merging"; its parameters are those of `PatchMergingV2`.

    It halves a channels-last map: the eight voxels of each 2×2×2 cell are concatenated, normalised and projected to 2
    C channels. Of the eight offsets (d, h, w), 010 and 001 come twice, 110 and 011 never: the published weights of
    2022
    (NVIDIA's ``model_swinvit.pt``) were trained with this order, and mean nothing under another. In 2-D the order
    never changed, so it equals `PatchMergingV2`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, D, H, W, C) to (B, ⌈D/2⌉, ⌈H/2⌉, ⌈W/2⌉, 2 C), odd sizes zero-padded; (B, H, W, C) likewise.

        Raises:
            ValueError: `x` has another number of dimensions.
        """
        if x.ndim == 4:
            return super().forward(x)
        if x.ndim != 5:
            raise ValueError(
                f"PatchMergingV090: x has shape {tuple(x.shape)}; expected (B, D, H, W, C) or (B, H, W, C)"
            )
        _, d, h, w, _ = x.shape
        if d % 2 or h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in _V090_OFFSETS], dim=-1)  # (B, D/2, H/2, W/2, 8 C)
        return self.reduction(self.norm(x))


MERGING = {**MERGING_MODE, "merging_v090": PatchMergingV090}
_MONAI_SIGNATURE = inspect.signature(MonaiSwinUNETR.__init__)


class SwinUNETR(MonaiSwinUNETR):
    """Builds `monai.networks.nets.SwinUNETR` on medaccel's layers: same arguments, weights and numbers, in training
    too.

    Its state_dict is MONAI's (159 tensors, 167 with `use_v2`), so that checkpoints go both ways, and it starts
    from the same random numbers. `medaccel.revert` gives MONAI's own layers back.

    Hatamizadeh et al., "Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images",
    https://arxiv.org/abs/2201.01266; `use_v2`: He et al., "SwinUNETR-V2", MICCAI 2023.

    Args (the ones that differ from MONAI 1.6; the others are MONAI's, in its order):
        downsample: "merging" (default), "mergingv2", a module class, or "merging_v090": the order of MONAI before
            1.5, which the weights published in 2022 need (`PatchMergingV090`).
        img_size: ignored with a DeprecationWarning; MONAI dropped it in 1.5. Keyword only.

    Shapes: (B, in_channels, *spatial) to (B, out_channels, *spatial), each spatial size a multiple of patch_size⁵ (32
    by default), else a ValueError.

    Raises:
        TypeError: an unknown argument, or `img_size` as the first positional one (MONAI before 1.5).
        ValueError: an argument's value that MONAI refuses: `feature_size` not a multiple of 12, a rate outside 0…1,
            `spatial_dims` not 2 or 3, an unknown `downsample`.
    """

    def __init__(self, *args: Any, img_size: Any = None, **kwargs: Any) -> None:
        if args and not isinstance(args[0], Integral):
            raise TypeError(
                f"SwinUNETR: the first argument is {args[0]!r}, which looks like the img_size of MONAI before 1.5; "
                "leave it out and name the others: SwinUNETR(in_channels=…, out_channels=…, feature_size=…)"
            )
        if img_size is not None:
            warnings.warn(
                f"SwinUNETR: img_size={img_size!r} is ignored; the net takes any size that is a multiple of "
                "patch_size**5. Leave it out.",
                DeprecationWarning,
                stacklevel=2,
            )
        given = _MONAI_SIGNATURE.bind(self, *args, **kwargs).arguments
        del given["self"]
        downsample = given.get("downsample")
        if isinstance(downsample, str):
            given["downsample"] = look_up_option(downsample, MERGING)
        super().__init__(**given)
        accelerate(self)

    @torch.jit.unused
    def _check_input_size(self, spatial_shape: Sequence[int]) -> None:
        """Checks the input's size as MONAI does, with its sentence, but without NumPy: torch.compile can then take
        the whole net as one graph."""
        steps = [size**5 for size in ensure_tuple_rep(self.patch_size, len(spatial_shape))]
        wrong = [axis + 2 for axis, step in enumerate(steps) if spatial_shape[axis] % step]
        if wrong:
            raise ValueError(
                f"spatial dimensions {wrong} of input image (spatial shape: {spatial_shape})"
                f" must be divisible by {self.patch_size}**5."
            )

    # Editors, `help` and the command line's parser show this signature.
    __init__.__signature__ = _MONAI_SIGNATURE.replace(  # type: ignore[attr-defined]
        parameters=[
            *_MONAI_SIGNATURE.parameters.values(),
            inspect.Parameter("img_size", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any),
        ]
    )
