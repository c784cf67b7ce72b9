# SPDX-License-Identifier: Apache-2.0
"""Defines the settings of pretraining's tasks, network, views and training, with their types, defaults and meanings.

They are defined apart from their code, so that the command line knows them without Lightning and MONAI, which take
seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from medaccel.studies.settings import Decay, TrainingSettings
from medaccel.studies.typed import Count, Limit, Positive, Settings, nearest

_Share = Annotated[float, Limit(lambda x: 0 < x <= 0.9, "a number above 0 and at most 0.9")]
_Cache = Annotated[str, Limit(lambda v: v in ("memory", "disk"), "'memory' or 'disk'")]
_On = Annotated[str, Limit(lambda v: v in ("masked", "all"), "'masked' or 'all'")]
_Power = Annotated[float, Limit(lambda x: x >= 1, "a number of at least 1")]


@dataclass(frozen=True, eq=False)
class PretrainingTrainerSettings(TrainingSettings):
    """Holds the settings of the training. By default the last weights are kept, not a running average.

    Args:
        cache: place that the prepared scans are read from: memory, or disk, which they are written to in any case.
    """

    batch_size: Count = 4
    learning_rate: Positive = 1e-3
    ema_decay: Decay = 0.0
    cache: _Cache = "memory"


@dataclass(frozen=True, eq=False)
class TaskSettings(Settings):
    """Holds the settings of one task."""

    unknown_names: ClassVar[str] = ": settings {names} are unknown"


@dataclass(frozen=True, eq=False)
class InpaintingSettings(TaskSettings):
    """Holds the settings of inpainting.

    Args:
        level: level of the backbone that the view is predicted at, encoder0 to decoder0; decoder2 has stride 4.
        share: largest share of a view that is masked.
        sides: smallest and largest side of a block, shares of the view's.
        on: voxels that the loss is taken on: masked or all.
        hidden: channels of the head.
    """

    #: YAML reads an unquoted "on" as true.
    renamed: ClassVar[Mapping[Any, str]] = {True: "on", "true": "on"}

    level: str = "decoder2"
    share: _Share = 0.3
    sides: tuple[float, ...] = (0.05, 0.25)
    on: _On = "masked"
    hidden: Count = 64


@dataclass(frozen=True, eq=False)
class RotationSettings(TaskSettings):
    """Rotation has no settings."""


@dataclass(frozen=True, eq=False)
class InstanceSettings(TaskSettings):
    """Holds the settings of instance contrast.

    Args:
        temperature: temperature of NT-Xent.
        dimensions: dimensions of the embedding.
    """

    temperature: Positive = 0.5
    dimensions: Count = 128


@dataclass(frozen=True, eq=False)
class PixelSettings(TaskSettings):
    """Holds the settings of pixel contrast.

    Args:
        level: level of the backbone whose pixels are compared, encoder0 to decoder0; decoder2 has stride 4.
        dimensions: dimensions of the projection; the loss's cost is proportional to them.
        temperature: temperature of the contrastive loss.
        radius: distance in mm below which two pixels are the same place; null is about one bin.
    """

    level: str = "decoder2"
    dimensions: Count = 32
    temperature: Positive = 0.3
    radius: Positive | None = None


@dataclass(frozen=True, eq=False)
class PixProSettings(TaskSettings):
    """Holds the settings of PixPro's consistency.

    Args:
        level: level of the backbone whose pixels are compared, encoder0 to decoder0; decoder2 has stride 4.
        dimensions: dimensions of the projection.
        radius: distance in mm below which two pixels are the same place; null is about one bin.
        power: exponent of the similarities that pixels are propagated by.
    """

    level: str = "decoder2"
    dimensions: Count = 32
    radius: Positive | None = None
    power: _Power = 2.0


@dataclass(frozen=True, eq=False)
class SettingsByTask(Settings):
    """Holds the settings of each task that differ from its defaults.

    Args:
        inpainting: restores a masked part of a view.
        rotation: tells by how many right angles the patient was turned.
        instance: finds the view of the same scan.
        pixel: finds the pixel of the same place.
        pixpro: PixPro's consistency of pixels.
    """

    separator: ClassVar[str] = "."

    inpainting: InpaintingSettings = field(default_factory=InpaintingSettings)
    rotation: RotationSettings = field(default_factory=RotationSettings)
    instance: InstanceSettings = field(default_factory=InstanceSettings)
    pixel: PixelSettings = field(default_factory=PixelSettings)
    pixpro: PixProSettings = field(default_factory=PixProSettings)


@dataclass(frozen=True, eq=False)
class _Arguments(Settings):
    """Holds arguments of a class, as the command line knows them."""

    separator: ClassVar[str] = "."
    whose: ClassVar[str]

    @classmethod
    def unknown(cls, names: Sequence[str], given: Mapping[str, Any]) -> str:
        found = nearest(names[0], cls.option_names())
        return f" is {dict(given)}; expected options of {cls.whose}, of which {names[0]} is none{found}"


@dataclass(frozen=True, eq=False)
class NetworkSettings(_Arguments):
    """Holds the options of the Swin UNETR: arguments of `medaccel.nets.SwinUNETR`.

    Args:
        patch_size: side of a patch token, voxels.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: side of an attention window, tokens.
        qkv_bias: give queries, keys and values a bias.
        mlp_ratio: width of the hidden layer of a block's MLP, in widths of the block.
        feature_size: channels of the first stage, a multiple of 12.
        norm_name: norm of the convolutional blocks.
        drop_rate: dropout of tokens and in the MLPs.
        attn_drop_rate: dropout of attention.
        dropout_path_rate: largest rate at which a block is left out of a step.
        normalize: normalize the stages' outputs.
        patch_norm: normalize the patch tokens.
        use_checkpoint: compute activations again in the backward pass, which takes less memory and more time.
        downsample: how patches are merged: merging, mergingv2, or merging_v090 for the weights published in 2022.
        use_v2: a residual convolution at the beginning of each stage (SwinUNETR-V2).
    """

    whose: ClassVar[str] = "SwinUNETR"

    patch_size: int = 2
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, ...] = 7
    qkv_bias: bool = True
    mlp_ratio: float = 4.0
    feature_size: int = 24
    norm_name: str | tuple[Any, ...] = "instance"
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    dropout_path_rate: float = 0.0
    normalize: bool = True
    patch_norm: bool = False
    use_checkpoint: bool = False
    downsample: str = "merging"
    use_v2: bool = False


@dataclass(frozen=True, eq=False)
class ViewSettings(_Arguments):
    """Holds the options of the two views of an item: arguments of `medaccel.data.TwoViews`.

    Args:
        scale: range of the extent that a view shows on each axis, as a multiple of the view's size: below 1 it is
            magnified. At most region.
        region: size of the region that both views are cut from, as a multiple of the view's size: at 1 both show its
            middle.
        rotate: largest angle of the small rotation about each axis, radians.
        shear: largest shear.
        flip: probability that an axis is flipped.
        rotate90: probability that a plane is turned by a multiple of 90°.
    """

    whose: ClassVar[str] = "TwoViews"

    scale: tuple[float, float] = (0.7, 1.3)
    region: float = 1.5
    rotate: float = 0.15
    shear: float = 0.05
    flip: float = 0.5
    rotate90: float = 0.5
