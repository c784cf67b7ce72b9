# SPDX-License-Identifier: Apache-2.0
"""Draws training patches from study folders: preprocessing is done once, then random crops depend on their number.

Item n of a run is the same whatever the number of workers and processes, and whenever it is drawn: its random
numbers come from (seed, n) alone. So a run that was killed goes on with the items that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.transforms import (
    Compose,
    MapTransform,
    RandFlipd,
    RandRotate90d,
    RandScaleIntensityd,
    RandWeightedCropd,
    SpatialPadd,
)

from medaccel.data.tensors import check_tensors
from medaccel.restoration.evaluation.metrics import body_mask
from medaccel.restoration.methods.base import RestorationTask
from medaccel.restoration.methods.networks.base_image import base_image
from medaccel.restoration.methods.networks.losses import ssim_distance
from medaccel.restoration.study import load_study

REFERENCES = ("auto", "noise_free", "target")
CACHES = ("memory", "disk", "none")
_IMAGES = ("input", "target", "noise_free", "denoised", "ct")


class PrepareStudy(MapTransform):
    """Turns {"study": folder} into volumes (1, i, j, k), body, sampling weight and the errors that losses are divided
    by.

    Args:
        task: the task whose exposures are needed.
        reference: "noise_free" (simulated studies have one), "target", or "auto": the first if it exists.
        use_ct: read the CT if the study has one.
        base: the base of the network's `Conditioning`; "nlm" denoises each exposure.
    """

    def __init__(
        self, task: RestorationTask, reference: str = "auto", use_ct: bool = False, base: str = "gaussian"
    ) -> None:
        super().__init__(keys=["study"])
        if reference not in REFERENCES:
            raise ValueError(f"reference is {reference!r}; expected one of {', '.join(REFERENCES)}")
        self.task, self.reference, self.use_ct, self.base = task, reference, use_ct, base

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        path = Path(data["study"])
        study = load_study(path, (*self.task.input_seconds, self.task.target_seconds))
        target = study.exposures[self.task.target_seconds]
        body = body_mask(target, study.spacing)
        if not body.any():
            raise ValueError(f"{path}: no body was found in the {self.task.target_seconds} s image")
        reference = study.noise_free if self.reference in ("auto", "noise_free") else None
        if reference is None and self.reference == "noise_free":
            raise FileNotFoundError(f"{path}: has no noise_free.nii.gz, which reference 'noise_free' asks for")
        mask = torch.from_numpy(body)[None].float()
        result: dict[str, Any] = {
            "spacing": torch.tensor(study.spacing, dtype=torch.float64),
            "target": torch.from_numpy(target)[None],
            "noise_free": torch.from_numpy(target if reference is None else reference)[None],
            "has_noise_free": reference is not None,
            "mask": mask,
            # The weight follows the error: hot organs weigh more, but fat and the air around the patient still count.
            "weight": (torch.from_numpy(target)[None].sqrt() + 0.1) * mask + 1e-3,
            "ct": torch.full_like(mask, torch.nan),
        }
        if self.use_ct and study.ct is not None:
            result["ct"] = torch.from_numpy(study.ct)[None]
        for seconds in self.task.input_seconds:
            image = torch.from_numpy(study.exposures[seconds])[None]
            errors = [
                float((image - other)[mask.bool()].double().square().mean())
                for other in (result["target"], result["noise_free"])
            ]
            distance = float(ssim_distance(image[None], result["target"][None], mask[None]))
            if not min(errors) > 0 or not distance > 0:
                raise ValueError(
                    f"{path}: the {seconds} s and the {self.task.target_seconds} s image do not differ within the "
                    "body, which leaves nothing to train on"
                )
            result[f"input_{seconds}"] = image
            if self.base == "nlm":
                result[f"denoised_{seconds}"] = torch.from_numpy(base_image(study.exposures[seconds], study.spacing))[
                    None
                ]
            result[f"errors_{seconds}"] = torch.tensor([*errors, distance])
        return result


class Patches(torch.utils.data.Dataset):
    """Yields endless numbered patches of studies.

    Args:
        studies: folders.
        task, reference, use_ct, base: those of `PrepareStudy`.
        roi_size: voxels along each axis.
        ct_dropout: share of the patches that are shown as if there were no CT.
        seed: together with an item's number, it seeds all randomness of the item.
        cache: "memory", "disk" (in `cache_folder`) or "none".
        augment: flips, rotations by 90° in the axial plane, and ±10 % of intensity.

    Raises:
        ValueError: there are no studies, `cache` is unknown, or `PrepareStudy` refuses a study.
    """

    def __init__(
        self,
        studies: Sequence[Path],
        task: RestorationTask,
        *,
        roi_size: Sequence[int],
        reference: str = "auto",
        use_ct: bool = False,
        base: str = "gaussian",
        ct_dropout: float = 0.0,
        seed: int = 0,
        cache: str = "memory",
        cache_folder: Path | None = None,
        augment: bool = True,
        progress: bool = False,
    ) -> None:
        if not studies:
            raise ValueError("no training studies")
        if cache not in CACHES:
            raise ValueError(f"cache is {cache!r}; expected one of {', '.join(CACHES)}")
        self.task, self.seed, self.roi_size = task, seed, tuple(roi_size)
        prepare = PrepareStudy(task, reference, use_ct, base)
        items = [{"study": str(path)} for path in studies]
        if cache == "memory":
            with _plain_errors():
                self.studies: Any = CacheDataset(items, prepare, num_workers=2, progress=progress, copy_cache=False)
        elif cache == "disk":
            remove_damaged(cache_folder)
            self.studies = PersistentDataset(items, prepare, cache_dir=cache_folder)
        else:
            self.studies = Dataset(items, prepare)
        self.ct_dropout = ct_dropout
        self.random = _random_transforms(self.roi_size, augment)

    def __len__(self) -> int:
        return 1 << 62  # the dataset is endless

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        with _plain_errors():
            prepared = self.studies[int(rng.integers(len(self.studies)))]
        seconds = int(rng.choice(self.task.input_seconds))
        item = {key: prepared[key] for key in ("target", "noise_free", "mask", "weight", "ct")}
        item["input"] = prepared[f"input_{seconds}"]
        item["denoised"] = prepared.get(f"denoised_{seconds}", item["input"])
        if rng.random() < self.ct_dropout:
            item["ct"] = torch.full_like(item["ct"], torch.nan)
        self.random.set_random_state(seed=int(rng.integers(2**31)))
        cropped = self.random(item)
        if isinstance(cropped, list):  # RandWeightedCropd gives a list of its samples
            cropped = cropped[0]
        patch = {key: torch.as_tensor(cropped[key]).as_subclass(torch.Tensor) for key in (*_IMAGES, "mask")}
        return patch | {
            "spacing": prepared["spacing"],
            "seconds": seconds,
            "errors": prepared[f"errors_{seconds}"],
            "has_noise_free": prepared["has_noise_free"],
            "noise_seed": int(rng.integers(2**62)),
        }


def remove_damaged(cache_folder: Path | None) -> None:
    """Removes prepared studies that are damaged, so that they are made again: MONAI would use them, or stop at
    them."""
    for path in sorted(cache_folder.glob("*.pt")) if cache_folder is not None else []:
        try:
            check_tensors(path)
        except ValueError:
            path.unlink(missing_ok=True)
        except FileNotFoundError:  # another process has removed it
            continue


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Unwraps the RuntimeError about a transform in which MONAI hides an error about the user's file."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise


def _random_transforms(roi_size: Sequence[int], augment: bool) -> Compose:
    images = ["input", "target", "noise_free", "denoised"]
    spatial = [*images, "ct", "mask", "weight"]
    steps: list[Any] = [
        SpatialPadd([key for key in spatial if key != "ct"], roi_size),
        SpatialPadd("ct", roi_size, mode="constant", value=float("nan")),  # unknown, not water
        RandWeightedCropd(spatial, w_key="weight", spatial_size=roi_size, num_samples=1),
    ]
    if augment:
        steps += [RandFlipd(spatial, prob=0.5, spatial_axis=axis) for axis in range(3)]
        if roi_size[0] == roi_size[1]:
            steps.append(RandRotate90d(spatial, prob=0.5, max_k=3, spatial_axes=(0, 1)))
        # One factor scales all images, like a patient with another uptake; relative noise stays as it was.
        steps.append(RandScaleIntensityd(images, factors=0.1, prob=0.5))
    return Compose(steps)
