# SPDX-License-Identifier: Apache-2.0
"""Cuts two augmented views out of one image or volume, and says where each of their pixels lies in it.

MONAI's transforms do the work, and carry the affine along: after any crop, flip, rotation and scaling, a view's
affine maps its voxels to mm in the original volume. The losses on pixels need this affine.
"""

from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandAffine,
    RandCoarseDropout,
    RandFlip,
    RandGaussianNoise,
    RandomizableTransform,
    RandRotate90,
    RandScaleIntensity,
    RandSpatialCrop,
)
from torch import Tensor

from medaccel.ops import gaussian_filter


class RandGaussianBlur(RandomizableTransform):
    """Blurs (C, *spatial) by one random σ, in voxels: MONAI's RandGaussianSmooth with medaccel's kernel.

    Args:
        sigma: the range that σ is drawn from.
        prob: probability of a blur.
    """

    def __init__(self, sigma: tuple[float, float] = (0.25, 1.5), prob: float = 0.1):
        super().__init__(prob)
        self.sigma = sigma
        self.drawn = 0.0

    def randomize(self, data: Any = None) -> None:
        """Draws whether to blur, and σ."""
        super().randomize(None)
        if self._do_transform:
            self.drawn = float(self.R.uniform(*self.sigma))

    def __call__(self, img: Tensor) -> Tensor:
        """Blurs (C, *spatial); shape and type stay."""
        self.randomize()
        if not self._do_transform:
            return img
        plain = img.as_tensor() if isinstance(img, MetaTensor) else img
        blurred = gaussian_filter(plain[None], self.drawn, mode="nearest")[0]
        return MetaTensor(blurred, meta=img.meta) if isinstance(img, MetaTensor) else blurred


def intensity_transforms(spatial_size: Sequence[int]) -> list[Any]:
    """Returns the changes of intensity that `TwoViews` applies to a view by default: blur, noise, scaling, gamma,
    cut-out.

    spatial_size: a view's size; a cut-out block takes up to a quarter of each side, and becomes 0.
    """
    return [
        RandGaussianBlur(prob=0.3),
        RandScaleIntensity(factors=0.25, prob=0.5),
        RandAdjustContrast(prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        RandGaussianNoise(prob=0.3, std=0.05),
        RandCoarseDropout(
            holes=1,
            max_holes=4,
            spatial_size=[max(1, n // 8) for n in spatial_size],
            max_spatial_size=[max(1, n // 4) for n in spatial_size],
            fill_value=0.0,
            prob=0.5,
        ),
    ]


class TwoViews(RandomizableTransform):
    """Cuts two views out of a common region of a volume, each turned, flipped, deformed and scaled on its own.

    Args:
        roi_size: voxels of a view on each of the 2 or 3 axes.
        scale: range of the extent that a view shows on each axis, as a multiple of the view's size: below 1 it is
            magnified. At most `region`.
        region: size of the region that both views are cut from, as a multiple of the view's size: at 1 both show its
            middle.
        rotate: largest angle of the small rotation about each axis, in radians.
        shear: largest shear.
        flip, rotate90: probability that each axis is flipped, and each plane turned by a multiple of 90°.
        intensity: transforms of a view (C, *roi_size). Default: `intensity_transforms`.

    >>> import torch, medaccel.data
    >>> views = medaccel.data.TwoViews((32, 32, 32)).set_random_state(0)(torch.rand(1, 64, 64, 64))
    >>> views["view1"].shape, views["affine1"].shape
    (torch.Size([1, 32, 32, 32]), torch.Size([4, 4]))
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        *,
        scale: tuple[float, float] = (0.7, 1.3),
        region: float = 1.5,
        rotate: float = 0.15,
        shear: float = 0.05,
        flip: float = 0.5,
        rotate90: float = 0.5,
        intensity: Sequence[Any] | None = None,
    ):
        super().__init__(1.0)
        self.roi_size = tuple(int(n) for n in roi_size)
        axes = len(self.roi_size)
        if axes not in (2, 3) or min(self.roi_size) < 1:
            raise ValueError(f"TwoViews: roi_size is {self.roi_size}; expected 2 or 3 sizes of at least 1")
        if not 0 < scale[0] <= scale[1] <= region:
            raise ValueError(
                f"TwoViews: scale is {scale} and region {region}; expected 0 < scale[0] <= scale[1] <= region"
            )
        planes = [(0, 1)] if axes == 2 else [(0, 1), (0, 2), (1, 2)]
        angles: Any = rotate if axes == 2 else (rotate,) * 3
        self.common = RandSpatialCrop([round(n * region) for n in self.roi_size], random_size=False)
        # Turns and flips only move voxels; the last transform alone resamples, and cuts the view out.
        self.geometry = Compose(
            [
                *(RandRotate90(rotate90, max_k=3, spatial_axes=plane) for plane in planes),
                *(RandFlip(flip, spatial_axis=axis) for axis in range(axes)),
                RandAffine(
                    1.0,
                    rotate_range=angles,
                    shear_range=(shear,) * (axes * (axes - 1)),
                    translate_range=[(region - 1) / 2 * n for n in self.roi_size],
                    scale_range=[(scale[0] - 1, scale[1] - 1)] * axes,  # MONAI adds 1
                    spatial_size=self.roi_size,
                    padding_mode="zeros",
                ),
            ]
        )
        self.intensity = Compose(intensity_transforms(self.roi_size) if intensity is None else list(intensity))

    def set_random_state(self, seed: int | None = None, state: Any = None) -> "TwoViews":
        """Seeds this transform and all transforms that it is made of."""
        super().set_random_state(seed, state)
        for transform in (self.common, self.geometry, self.intensity):
            transform.set_random_state(seed=int(self.R.randint(2**31)))
        return self

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        """Cuts two views out of a volume.

        Args:
            data: (C, *spatial), a MetaTensor whose affine maps to mm, or a tensor with voxels of 1 mm.

        Returns:
            view1, view2: (C, *roi_size), fp32, 0 outside the volume; affine1, affine2: (S + 1, S + 1), fp64, map a
            view's voxel indices to mm in the original volume, S being the number of axes.

        Raises:
            ValueError: `data` has another number of axes than `roi_size`.
        """
        axes = len(self.roi_size)
        if data.dim() != axes + 1:
            raise ValueError(
                f"TwoViews: data has shape {tuple(data.shape)}; expected (C, *spatial) with {axes} axes, as roi_size"
            )
        plain, affine = data, torch.eye(axes + 1, dtype=torch.float64)
        if isinstance(data, MetaTensor):
            plain, affine = data.as_tensor(), _spatial_affine(data.affine, axes)
        region = self.common(MetaTensor(plain, affine=affine))
        views: dict[str, Tensor] = {}
        for number in (1, 2):
            view = self.geometry(region)
            views[f"affine{number}"] = _spatial_affine(view.affine, axes)
            views[f"view{number}"] = self.intensity(view.as_tensor().float())
        return views


def _spatial_affine(affine: Tensor, axes: int) -> Tensor:
    """Returns the part of a 4 × 4 affine that an image of 2 axes has."""
    kept = [*range(axes), affine.shape[0] - 1]
    return affine[kept][:, kept].double()


def feature_affine(affine: Tensor, roi_size: Sequence[int], feature_size: Sequence[int]) -> Tensor:
    """Returns the affine that maps the indices of a feature map's pixels to mm.

    Args:
        affine: (…, S + 1, S + 1), maps a view's voxel indices to mm, as `TwoViews` gives it.
        roi_size: the view's S sizes.
        feature_size: sizes of the map, which covers the whole view: pixel f covers the voxels f · r … f · r + r − 1,
            where r is roi_size over feature_size, whole or not.

    Returns:
        The affine (…, S + 1, S + 1) that `medaccel.losses.PixelContrastiveLoss` takes.
    """
    axes = affine.shape[-1] - 1
    if not len(roi_size) == len(feature_size) == axes:
        raise ValueError(
            f"feature_affine: roi_size has {len(roi_size)} and feature_size {len(feature_size)} axes; expected "
            f"{axes} for this affine"
        )
    to_voxel = torch.eye(axes + 1, dtype=affine.dtype, device=affine.device)
    for axis, (size, features) in enumerate(zip(roi_size, feature_size, strict=True)):
        ratio = size / features
        to_voxel[axis, axis], to_voxel[axis, -1] = ratio, (ratio - 1) / 2
    return affine @ to_voxel
