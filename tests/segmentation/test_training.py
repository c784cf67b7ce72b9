# SPDX-License-Identifier: Apache-2.0
"""Crops that depend on their number alone, and the choice of the best weights."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medaccel.data import make_nifti, save_nifti
from medaccel.data.msd import MSDDataset, read_dataset
from medaccel.segmentation.model.presets import make_settings
from medaccel.segmentation.model.training import Crops, SegmentationFit, Validation, make_network

PLAIN = {"intensity_scale": 0.0, "intensity_shift": 0.0, "noise": 0.0}
SETTINGS: dict[str, Any] = {"spacing": [2.0, 2.0, 2.0], "window": [0.0, 100.0], "roi_size": [64, 32, 32]}


def task(folder: Path, *labels: np.ndarray) -> MSDDataset:
    """A case of each label map: a body whose HU rise to the right, brighter where the label is."""
    cases = []
    for number, label in enumerate(labels):
        ramp = np.linspace(10, 40, label.shape[0])[:, None, None] * np.ones(label.shape)
        for part, array in (("imagesTr", (ramp + 40 * label).astype(np.int16)), ("labelsTr", label)):
            (folder / part).mkdir(exist_ok=True)
            save_nifti(folder / part / f"{number}.nii.gz", make_nifti(array, np.diag([2.0, 2.0, 2.0, 1.0])))
        cases.append({"image": f"imagesTr/{number}.nii.gz", "label": f"labelsTr/{number}.nii.gz"})
    content = {"name": "T", "labels": {"0": "background", "1": "organ"}, "training": cases}
    (folder / "dataset.json").write_text(json.dumps(content))
    return read_dataset(folder)


def spot(shape: tuple[int, int, int] = (80, 50, 40), at: tuple[int, int, int] = (20, 25, 20)) -> np.ndarray:
    label = np.zeros(shape, dtype=np.uint8)
    label[tuple(slice(a - 3, a + 3) for a in at)] = 1
    return label


def crops(dataset: MSDDataset, seed: int = 0, **overrides: Any) -> Crops:
    return Crops(dataset, dataset.cases, make_settings(SETTINGS | overrides), seed=seed)


def test_a_crop_depends_on_the_seed_and_its_number_alone(tmp_path: Path):
    dataset = task(tmp_path, spot(), spot(at=(60, 25, 20)))
    first, second = crops(dataset), crops(dataset, cache="none")
    late = [first[n] for n in (5, 3, 4)][::-1]
    early = [second[n] for n in (4, 3, 5)]
    for one, other in zip(late, early, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])
        assert one["image"].shape == one["label"].shape == (1, 64, 32, 32)
    assert not torch.equal(first[3]["image"], first[4]["image"])
    assert not torch.equal(first[3]["image"], crops(dataset, seed=1)[3]["image"])


def test_foreground_and_background_are_sampled_as_told(tmp_path: Path):
    dataset = task(tmp_path, spot((160, 50, 40)))
    positive = crops(dataset, negative=0.0)
    assert all(positive[n]["label"].any() for n in range(8))
    negative = crops(dataset, positive=0.0)
    assert not all(negative[n]["label"].any() for n in range(8))


def test_a_case_without_foreground_is_learned_from(tmp_path: Path):
    dataset = task(tmp_path, np.zeros((80, 50, 40), dtype=np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crop = crops(dataset)[0]
    assert not crop["label"].any()
    assert crop["image"].any()


def test_a_case_smaller_than_the_roi_is_padded(tmp_path: Path):
    dataset = task(tmp_path, spot((30, 50, 24), at=(15, 25, 12)))
    crop = crops(dataset, **PLAIN)[0]
    assert crop["image"].shape == (1, 64, 32, 32)
    assert (crop["image"][:, :17] == 0).all()
    assert crop["label"].any()


def test_left_stays_left_unless_told_otherwise(tmp_path: Path):
    dataset = task(tmp_path, spot((64, 40, 36)))
    plain, flipped = crops(dataset, **PLAIN), crops(dataset, flip_axes=[0], **PLAIN)

    def rises(crop: dict[str, torch.Tensor]) -> bool:
        profile = crop["image"].amin(dim=(0, 2, 3))
        return bool(profile[-1] > profile[0])

    assert all(rises(plain[n]) for n in range(10))
    assert {rises(flipped[n]) for n in range(10)} == {True, False}


@pytest.mark.parametrize("change", [{"rotate": 25.0}, {"zoom": 0.2}, {"rotate": 25.0, "zoom": 0.2}])
def test_turned_and_zoomed_crops_have_their_labels_turned_and_zoomed_alike(tmp_path: Path, change: dict[str, float]):
    # A bar, as a cube looks much the same when it is turned.
    label = np.zeros((80, 50, 40), dtype=np.uint8)
    label[44:70, 22:28, 17:23] = 1
    dataset = task(tmp_path, label)
    plain, moved = crops(dataset, **PLAIN), crops(dataset, **PLAIN, **change)
    changed = 0
    for number in range(8):
        before, after = plain[number], moved[number]
        assert set(after["label"].unique().tolist()) <= {0.0, 1.0}
        if torch.equal(before["image"], after["image"]):
            continue
        changed += 1
        truth, bright = after["label"] > 0, after["image"] > 0.55  # the brightest of the body is 0.4
        # More than half of the bar's voxels lie on its rim, where the image is between the two.
        assert 2 * int((truth & bright).sum()) > 0.8 * int(truth.sum() + bright.sum())
        assert not torch.equal(before["label"], after["label"])
    assert 0 < changed < 8


def test_a_training_without_cases_is_refused(tmp_path: Path):
    dataset = task(tmp_path, spot())
    with pytest.raises(ValueError, match="no training cases"):
        Crops(dataset, [], make_settings(SETTINGS))


def test_random_weights_depend_on_the_seed_alone():
    settings = make_settings({"preset": "phantom_spleen"})
    torch.manual_seed(5)
    first, state = make_network(settings, 2, 3), torch.random.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second, other = make_network(settings, 2, 3).state_dict(), make_network(settings, 2, 4).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.state_dict().items())
    assert not torch.equal(second["out.conv.conv.weight"], other["out.conv.conv.weight"])


def test_a_prior_is_what_an_untrained_network_says():
    settings = make_settings({"preset": "phantom_spleen", "foreground_prior": 0.01})
    network = make_network(settings, 2, 0)
    with torch.no_grad():
        network.out.conv.conv.weight.zero_()
        said = network(torch.rand(1, 1, 64, 32, 32)).softmax(dim=1)[:, 1]
    assert torch.allclose(said, torch.tensor(0.01))


@pytest.mark.parametrize("include_background", [True, False])
def test_the_loss_is_monais_unless_the_foreground_weighs_more(include_background: bool):
    from monai.losses import DiceCELoss

    logits = torch.randn(2, 3, 8, 8, 8)
    label = torch.randint(0, 3, (2, 1, 8, 8, 8)).float()

    def losses(weight: float) -> dict[str, torch.Tensor]:
        settings = make_settings({"foreground_weight": weight, "include_background": include_background})
        return SegmentationFit(nn.Identity(), 3, settings).losses({"image": logits, "label": label}, 0)

    peer = DiceCELoss(include_background=include_background, to_onehot_y=True, softmax=True)
    assert torch.allclose(losses(1.0)["loss"], peer(logits, label))
    weighted = losses(5.0)
    assert weighted["dice"] == losses(1.0)["dice"]
    entropy = nn.functional.cross_entropy(logits, label[:, 0].long(), torch.tensor([1.0, 5.0, 5.0]))
    assert torch.allclose(weighted["cross_entropy"], entropy)


class Constant(nn.Module):
    """Says "foreground" where the image is above a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x), x - self.threshold], dim=1)


def test_the_first_of_equally_good_weights_is_kept(tmp_path: Path):
    from medaccel.data.msd import load_case
    from medaccel.segmentation.model.training import validation_case

    settings = make_settings(SETTINGS | {"validate_every": 2, "steps": 9})
    dataset = task(tmp_path, spot())
    check = Validation([validation_case(*load_case(dataset, dataset.cases[0]), settings)], 2, settings)
    thresholds = {1: 0.5, 2: 0.2, 4: 0.45, 6: 0.5, 8: 0.3, 9: 0.9}
    for step, threshold in thresholds.items():
        module = SimpleNamespace(network=Constant(threshold))
        trainer = SimpleNamespace(global_step=step, loggers=[])
        check.on_train_batch_end(trainer, module, {"loss": torch.tensor(float(step))}, None, 0)
    assert [point["step"] for point in check.curve] == [2, 4, 6, 8, 9]
    assert [point["loss"] for point in check.curve] == [1.5, 4, 6, 8, 9]
    dices = [point["dice"] for point in check.curve]
    assert dices[1] == dices[2] == max(dices)
    assert check.best == {"step": 4, "dice": dices[1]}
    assert float(check.weights["threshold"]) == pytest.approx(0.45)
    restored = Validation([], 2, settings)
    restored.load_state_dict(check.state_dict())
    assert restored.state_dict() == check.state_dict()
