# SPDX-License-Identifier: Apache-2.0
"""Holds losses between the pixels of two views of one image or volume, from feature maps and the views'
geometry."""

import torch
from torch import Tensor, nn

from medaccel.ops import pixel_consistency_loss, pixel_contrastive_loss
from medaccel.ops._arguments import check_floating, check_temperature
from medaccel.ops._dispatch import refuse_scripting
from medaccel.ops._views import check_positive

# The radius is this share of the larger bin diagonal: about one bin, whatever the number of axes. The 2-D share is
# PixPro's.
RADIUS_FACTORS = {1: 1.0, 2: 0.7, 3: 0.57}


def _wide(affine: Tensor) -> Tensor:
    """Converts half precision to fp32, because bf16 lacks every second whole number from 256 on."""
    return affine.to(torch.promote_types(affine.dtype, torch.float32))


def pixel_centres(sizes: tuple[int, ...], affine: Tensor) -> Tensor:
    """Returns the coordinates of the pixels of a feature map.

    Args:
        sizes: the map's S spatial sizes.
        affine: (B, S + 1, S + 1), maps a pixel's index (its centre at whole numbers) to mm in the original volume.

    Returns:
        (B, pixels, S) in the affine's dtype, fp32 for half precision; pixels in row-major order.
    """
    affine = _wide(affine)
    axes = [torch.arange(n, dtype=affine.dtype, device=affine.device) for n in sizes]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(sizes))
    with torch.autocast(affine.device.type, enabled=False):
        return index @ affine[:, :-1, :-1].transpose(1, 2) + affine[:, None, :-1, -1]


def default_radius(affine1: Tensor, affine2: Tensor) -> Tensor:
    """Returns the published choice of the radius, (B,), in mm: 0.57 (3-D) or 0.7 (2-D) of the larger map's bin
    diagonal.

    Args:
        affine1, affine2: (B, S + 1, S + 1), map the pixels' indices of both feature maps to mm.
    """
    diagonals = [_wide(a)[:, :-1, :-1].square().sum(dim=(1, 2)).sqrt() for a in (affine1, affine2)]
    return torch.maximum(*diagonals) * RADIUS_FACTORS[int(affine1.shape[1]) - 1]


class _PixelLoss(nn.Module):
    """Turns two feature maps and their geometry into rows of features, coordinates and a radius."""

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, radius: float | None = None):
        super().__init__()
        self.radius = None if radius is None else check_positive(type(self).__name__, "radius", radius)

    def _check(self, features1: Tensor, features2: Tensor, affine1: Tensor, affine2: Tensor) -> None:
        name = type(self).__name__
        check_floating(name, features1=features1, features2=features2, affine1=affine1, affine2=affine2)
        axes = features1.dim() - 2
        if not 1 <= axes <= 3:
            raise ValueError(
                f"{name}: features1 has shape {tuple(features1.shape)}; expected (B, C, *spatial) with 1-3 "
                "spatial axes"
            )
        if features2.shape[:2] != features1.shape[:2] or features2.dim() != features1.dim():
            raise ValueError(
                f"{name}: features2 has shape {tuple(features2.shape)}; expected the batch, channels and number of "
                f"axes of features1, {tuple(features1.shape)}"
            )
        expected = (len(features1), axes + 1, axes + 1)
        for argument, affine in (("affine1", affine1), ("affine2", affine2)):
            if tuple(affine.shape) != expected:
                raise ValueError(f"{name}: {argument} has shape {tuple(affine.shape)}; expected {expected}")

    def _directions(
        self,
        features: tuple[Tensor, Tensor],
        affines: tuple[Tensor, Tensor],
        keys: tuple[Tensor | None, Tensor | None],
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Returns (query, key, query_coords, key_coords) for the first view against the second, and the reverse."""
        self._check(*features, *affines)
        for i, key in enumerate(keys):
            if key is not None and key.shape != features[i].shape:
                raise ValueError(
                    f"{type(self).__name__}: keys{i + 1} has shape {tuple(key.shape)}; expected that of "
                    f"features{i + 1}, {tuple(features[i].shape)}"
                )
        at = [pixel_centres(tuple(f.shape[2:]), a) for f, a in zip(features, affines, strict=True)]
        rows = [f.flatten(2).transpose(1, 2) for f in features]
        others = [row if key is None else key.flatten(2).transpose(1, 2) for row, key in zip(rows, keys, strict=True)]
        return [(rows[0], others[1], at[0], at[1]), (rows[1], others[0], at[1], at[0])]

    def _radius(self, affine1: Tensor, affine2: Tensor) -> float | Tensor:
        return default_radius(affine1, affine2).detach() if self.radius is None else self.radius


class PixelContrastiveLoss(_PixelLoss):
    """Computes pixel-level contrast, averaged over both directions: `medaccel.ops.pixel_contrastive_loss` on feature
    maps.

    Args:
        temperature: a number above 0; a parameter becomes the module's, and gets its gradient (a learnt temperature).
        radius: the distance in mm below which two pixels are a positive pair. Default: `default_radius`.

    >>> import torch, medaccel
    >>> features = torch.randn(2, 16, 6, 6, 6)
    >>> affine = torch.diag(torch.tensor([8.0, 8.0, 8.0, 1.0])).expand(2, 4, 4)  # one pixel every 8 mm
    >>> medaccel.losses.PixelContrastiveLoss()(features, features, affine, affine).shape
    torch.Size([])
    """

    def __init__(self, temperature: float | Tensor = 0.3, radius: float | None = None):
        super().__init__(radius)
        number = check_temperature(type(self).__name__, temperature)
        kept = isinstance(temperature, Tensor) and temperature.requires_grad
        self.temperature = temperature if kept else number

    def forward(
        self,
        features1: Tensor,
        features2: Tensor,
        affine1: Tensor,
        affine2: Tensor,
        keys1: Tensor | None = None,
        keys2: Tensor | None = None,
    ) -> Tensor:
        """Returns the mean of both directions' losses.

        Args:
            features1, features2: (B, C, *spatial) of both views; their spatial sizes may differ.
            affine1, affine2: (B, S + 1, S + 1), map the feature pixels' indices to mm in the original volume, as
                `medaccel.data.views` gives them.
            keys1, keys2: the features that the other view's pixels are compared with, such as a momentum encoder's.
                Default: the features themselves.

        Returns:
            a scalar; a direction in which no pixel has a positive counts as 0.
        """
        radius = self._radius(affine1, affine2)
        first, second = (
            pixel_contrastive_loss(*arguments, radius=radius, temperature=self.temperature)
            for arguments in self._directions((features1, features2), (affine1, affine2), (keys1, keys2))
        )
        return (first + second) / 2


class PixelConsistencyLoss(_PixelLoss):
    """Computes PixPro's loss, summed over both directions: `medaccel.ops.pixel_consistency_loss` on feature maps.

    Args:
        radius: the distance in mm below which two pixels are a pair. Default: `default_radius`.
    """

    def forward(
        self,
        features1: Tensor,
        features2: Tensor,
        affine1: Tensor,
        affine2: Tensor,
        keys1: Tensor | None = None,
        keys2: Tensor | None = None,
    ) -> Tensor:
        """Returns a scalar between −2 and 2; its arguments are those of `PixelContrastiveLoss.forward`.

        In PixPro, the features are those that `medaccel.ops.pixel_propagation` gives, and the keys a momentum
        encoder's.
        """
        radius = self._radius(affine1, affine2)
        first, second = (
            pixel_consistency_loss(*arguments, radius=radius)
            for arguments in self._directions((features1, features2), (affine1, affine2), (keys1, keys2))
        )
        return first + second
