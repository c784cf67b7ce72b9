# SPDX-License-Identifier: Apache-2.0
"""Defines the settings of the restoration methods, with their types, defaults and meanings.

They are defined apart from the methods, so that the command line knows them without Lightning and MONAI, which take
seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from medaccel.studies.settings import TrainingSettings
from medaccel.studies.typed import Count, CountFromZero, Limit, NotNegative, Settings

_AboveZero = Annotated[float, Limit(lambda x: x > 0, "a number > 0")]
_Share = Annotated[float, Limit(lambda x: 0 <= x < 1, "a share in [0, 1)")]
_Slices = Annotated[int, Limit(lambda n: n >= 3, "at least three, or null")]


@dataclass(frozen=True, eq=False)
class MethodSettings(Settings):
    """Holds the settings of one restoration method."""

    unknown_names: ClassVar[str] = ": settings {names} are unknown"


@dataclass(frozen=True, eq=False)
class GaussianSettings(MethodSettings):
    """Holds the settings of the fitted Gaussian filters.

    Args:
        epochs: rounds of up to 5 L-BFGS iterations over all studies.
        studies: number of training studies that are used, from the first on; a handful of parameters needs no more.
    """

    epochs: Count = 10
    studies: Count = 8


@dataclass(frozen=True, eq=False)
class ClassicalSettings(MethodSettings):
    """Holds the settings of a denoiser whose strength is searched for.

    Args:
        stabiliser: function that evens out the noise before denoising.
        strengths: multiples of the noise level where the search starts, increasing.
        search_studies: number of studies to search on, from the first on.
        search_slices: number of central slices of each to search on; null takes all. Hot organs lie at the ends, so
            the strength that is best in the middle need not be the best of the whole.
    """

    stabiliser: Literal["sqrt", "asinh"] = "asinh"
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    search_studies: Count = 3
    search_slices: _Slices | None = None


@dataclass(frozen=True, eq=False)
class NonLocalMeansSettings(ClassicalSettings):
    """Holds the settings of non-local means.

    Args:
        patch_size: side of a patch, voxels. 3 instead of 5 costs 4 points of the MSE score, 7 one point.
        patch_distance: greatest distance of a similar patch along each axis, voxels. 2 costs 0.3 points; 4 as much,
            and three times the time: in a body, near structures are more often alike.
    """

    strengths: tuple[float, ...] = (0.6, 1.0, 1.6)
    patch_size: Count = 5
    patch_distance: CountFromZero = 3


@dataclass(frozen=True, eq=False)
class TotalVariationSettings(ClassicalSettings):
    """Holds the settings of total variation.

    Args:
        rounds: rounds of Bregman's iteration; 1 is plain total variation, about 3 points of the MSE score below 2.
        tolerance: the iteration stops once the energy changes by less than this fraction of its start; scikit-image's
            own 2e-4 stops after a few steps, a point short. The score of two rounds does not vary smoothly with the
            strength at any tolerance, mostly where hot organs are.
        iterations: largest number of iterations.
    """

    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    rounds: Count = 2
    tolerance: NotNegative = 1e-5
    iterations: Count = 200


@dataclass(frozen=True, eq=False)
class BM4DSettings(ClassicalSettings):
    """Holds the settings of BM4D.

    Args:
        threshold: threshold of the hard-thresholding stage; bm4d's own estimate is 3.04 for such noise. It is not
            called, since it needs a function that NumPy 2.4 has removed.
        wiener: μ² of the Wiener stage; bm4d's own estimate is 1.01.
        search_window: half the side of the cube in which blocks are searched, voxels.
        variance_layers: how many of a stack's blocks enter the exact variances; bm4d's 4 instead of 1 takes 2.5 times
            the time and gains nothing (27.1 and 27.1 % on a training phantom).
    """

    stabiliser: Literal["sqrt", "asinh"] = "sqrt"
    strengths: tuple[float, ...] = (1.2, 1.8)
    search_slices: _Slices | None = 64
    threshold: NotNegative = 3.0
    wiener: NotNegative = 1.0
    search_window: Count = 4
    variance_layers: CountFromZero = 1


@dataclass(frozen=True, eq=False)
class BM4DByNoiseSettings(BM4DSettings):
    """Holds the settings of BM4D with a strength by the noise; those of BM4D, and others that start elsewhere."""

    strengths: tuple[float, ...] = (0.8, 1.2)


@dataclass(frozen=True, eq=False)
class NetworkSettings(MethodSettings, TrainingSettings):
    """Holds the settings that all networks of restoration have.

    Args:
        roi_size: voxels of a training patch and of a window of inference, multiples of 32 (8 for the diffusion
            methods), one of them 64 (8) or more.
        overlap: share that neighbouring windows have in common.
        sw_batch_size: windows that are restored at once.
        reference: image that the network is trained to: noise_free (of simulated studies), target, or auto, the first
            if it exists.
        use_ct: show the network the CT, if the study has one.
        scaling: scaling of SUV that the network works in.
        base: image that the network's output is added to: gaussian, a smoothed copy, or nlm, the PET denoised by
            non-local means.
        validation_studies: number of validation studies to choose on, from the first on.
        residual_shrinkage: threshold of the residual shrinkage that the restored activity goes through, in standard
            deviations; 0 leaves it out. Files of earlier versions call it give_back.
    """

    renamed: ClassVar[Mapping[Any, str]] = {"give_back": "residual_shrinkage"}

    roi_size: tuple[int, ...] = (64, 64, 64)
    overlap: _Share = 0.25
    sw_batch_size: Count = 1
    reference: Literal["auto", "noise_free", "target"] = "auto"
    use_ct: bool = False
    scaling: Literal["asinh", "sqrt"] = "asinh"
    base: Literal["gaussian", "nlm"] = "gaussian"
    validation_studies: Count = 4
    residual_shrinkage: NotNegative = 0.0


@dataclass(frozen=True, eq=False)
class SwinSettings(NetworkSettings):
    """Holds the settings of the Swin UNETR.

    Args:
        feature_size: channels of the first stage, a multiple of 12.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        loss: mse, mse_ssim (with 1 − SSIM beside it) or ssim.
        scaled_weight: weight of the squared error in the network's scaling.
        ssim_weight: weight of 1 − SSIM.
        predict: image that the network predicts: the activity, which is blended with the PET, or the target.
        accelerate: train on medaccel's layers; false trains MONAI's own.
    """

    feature_size: int = 12
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    loss: Literal["mse", "mse_ssim", "ssim"] = "mse_ssim"
    scaled_weight: float = 100.0
    ssim_weight: float = 0.3
    predict: Literal["activity", "target"] = "activity"
    accelerate: bool = True
    # On phantoms of the training generator this costs 0.4 points of share at 60 s, and lesions from 10 mm are within
    # −13 … 7 % of their uptake instead of −15 … 7 (30 s: −23 … 10, not −32 … 14, and none is lost).
    residual_shrinkage: NotNegative = 2.0


@dataclass(frozen=True, eq=False)
class DiffusionSettings(NetworkSettings):
    """Holds the settings that both diffusion methods have. If training is in bf16-mixed, so is sampling.

    Args:
        channels: channels of the U-Net's levels.
        shuffle: side of the blocks of voxels that the U-Net sees as channels of one voxel; 2 takes about a fifth of
            the time that 1 does, at the same number of channels.
        samples: samples that are averaged, K.
        sampling_steps: steps of a sample.
        validation_samples: samples of each validation study that the choices are made on.
    """

    roi_size: tuple[int, ...] = (64, 64, 64)
    channels: tuple[int, ...] = (32, 64, 64)
    shuffle: int = 2
    samples: Count = 20
    sampling_steps: Count = 5
    validation_studies: Count = 2
    validation_samples: Count = 2


@dataclass(frozen=True, eq=False)
class SDEditSettings(DiffusionSettings):
    """Holds the settings of SDEdit.

    Args:
        t0: levels that are tried, from small to large; the search ends when two in a row are worse than the best.
        levels: level up to which the prior is trained; SDEdit never visits higher ones.
    """

    t0: tuple[int, ...] = (5, 10, 20, 35, 50, 75, 100, 140)
    levels: int = 200
    # A prior that never saw the PET changes the hottest structures: on three validation phantoms, 60 s, t0 = 20, K =
    # 2, the MSE score was −137 % of its limit without this and 52 % with it.
    residual_shrinkage: NotNegative = 1.5


@dataclass(frozen=True, eq=False)
class ConditionalSettings(DiffusionSettings):
    """Holds the settings of the conditional diffusion.

    Args:
        spread: standard deviation of the residual that is diffused, in the network's scaling.
    """

    spread: _AboveZero = 0.1


@dataclass(frozen=True, eq=False)
class UNetSettings(MethodSettings, TrainingSettings):
    """Holds the settings of the U-Net that is trained on varied studies, which the run's own training studies don't
    enter.

    Args:
        weights: trained weights to restore with, a name that `medaccel weights list` has or the path of a checkpoint:
            nothing is trained then, and the network's settings are the weights' own.
        roi_size: voxels of a training patch.
        channels: channels of each level, the full resolution first.
        blocks: residual blocks of each level.
        evenness: power of the noise's variance that the loss divides by: 0 lets hot organs rule, 1 weighs all voxels
            alike.
        varied_studies: number of varied studies that are made, once, and trained on.
        varied_folder: folder that keeps them; by default one of the fit's own.
        validation_studies: number of validation studies to choose on, from the first on.
        validate_steps: steps between two measurements of the share of the limit on the validation studies; 0 makes
            none.
        flips: images that are averaged in restoring: 1, or 2 with the one that is mirrored along all axes.
    """

    weights: str = ""
    roi_size: tuple[int, ...] = (48, 48, 48)
    channels: tuple[Count, ...] = (16, 64, 128)
    blocks: tuple[Count, ...] = (1, 2, 2)
    evenness: NotNegative = 0.5
    varied_studies: Count = 1000
    varied_folder: str = ""
    validation_studies: CountFromZero = 8
    validate_steps: CountFromZero = 1000
    flips: Literal[1, 2] = 2


@dataclass(frozen=True, eq=False)
class TrainerSettings(
    SwinSettings,
    SDEditSettings,
    ConditionalSettings,
    GaussianSettings,
    NonLocalMeansSettings,
    TotalVariationSettings,
    BM4DSettings,
    UNetSettings,
):
    """Holds settings for every method that has them, unless the method's own settings differ."""

    unknown_names: ClassVar[str] = Settings.unknown_names
    explained: ClassVar[type[Settings]] = NetworkSettings


@dataclass(frozen=True, eq=False)
class SettingsByMethod(Settings):
    """Holds the settings of each method that differ from its defaults.

    Args:
        gaussian1: one Gaussian filter.
        gaussian3: three Gaussian filters in sequence.
        gaussian_mix: a mixture of Gaussian filters.
        nlm: non-local means.
        tv: total variation.
        bm4d: block matching and 4-D filtering.
        bm4d_noise: the same, its strength a function of the noise that is measured in the image.
        unet: the U-Net that is trained on varied studies.
        swin_unetr: the Swin UNETR.
        diffusion_sdedit: a diffusion prior, guided by the PET.
        diffusion_conditional: a diffusion conditioned on the PET.
    """

    separator: ClassVar[str] = "."

    gaussian1: GaussianSettings = field(default_factory=GaussianSettings)
    gaussian3: GaussianSettings = field(default_factory=GaussianSettings)
    gaussian_mix: GaussianSettings = field(default_factory=GaussianSettings)
    nlm: NonLocalMeansSettings = field(default_factory=NonLocalMeansSettings)
    tv: TotalVariationSettings = field(default_factory=TotalVariationSettings)
    bm4d: BM4DSettings = field(default_factory=BM4DSettings)
    bm4d_noise: BM4DByNoiseSettings = field(default_factory=BM4DByNoiseSettings)
    unet: UNetSettings = field(default_factory=UNetSettings)
    swin_unetr: SwinSettings = field(default_factory=SwinSettings)
    diffusion_sdedit: SDEditSettings = field(default_factory=SDEditSettings)
    diffusion_conditional: ConditionalSettings = field(default_factory=ConditionalSettings)
