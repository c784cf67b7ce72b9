# SPDX-License-Identifier: Apache-2.0
"""The linear probe: linear, on frozen features, and as good as these are."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from medaccel.data.msd import MSDDataset
from medaccel.nets import SwinUNETR
from medaccel.phantoms.ct_dataset import write_task
from medaccel.segmentation.evaluation import probe
from medaccel.segmentation.evaluation.probe import LinearProbe, linear_probe

FEW: dict[str, Any] = {"spacing": [8.0, 8.0, 8.0], "steps": 12, "levels": ["encoder1", "encoder2"]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MSDDataset:
    return write_task(tmp_path_factory.mktemp("spleen"), "spleen", 3, spacing=(8.0, 8.0, 8.0), progress=False)


@pytest.fixture(scope="module")
def backbone() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(in_channels=1, out_channels=2, feature_size=12)


def test_it_is_a_linear_layer_on_features_brought_to_the_images_grid():
    maps = {"encoder0": torch.rand(1, 5, 4, 4, 4), "encoder1": torch.rand(1, 3, 2, 2, 2)}
    layers = LinearProbe(maps, 2)
    for layer in layers.layers.values():
        torch.nn.init.normal_(layer.weight)
    fine = torch.cat([F.interpolate(m, size=(8, 8, 8), mode="trilinear") for m in maps.values()], dim=1)
    weight = torch.cat([layer.weight for layer in layers.layers.values()], dim=1)
    torch.testing.assert_close(layers(maps, (8, 8, 8)), F.conv3d(fine, weight), rtol=1e-5, atol=1e-5)


def test_the_backbone_stays_as_it_is_and_the_same_probe_gives_the_same_dice(backbone: SwinUNETR, dataset: MSDDataset):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    names = [case.name for case in dataset.cases]
    first = linear_probe(backbone, dataset, names[:2], names[2:], FEW)
    assert 0 <= first <= 1
    assert linear_probe(backbone, dataset, names[:2], names[2:], FEW) == first
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert backbone.training


def test_features_that_hold_the_answer_give_it(
    backbone: SwinUNETR, dataset: MSDDataset, monkeypatch: pytest.MonkeyPatch
):
    labels: list[torch.Tensor] = []
    plain = probe.canonical

    def watched(*arguments: Any, **options: Any) -> Any:
        volumes = plain(*arguments, **options)
        labels.append(volumes["label"])
        return volumes

    def telling(net: Any, x: torch.Tensor, levels: Any) -> dict[str, torch.Tensor]:
        padded = probe.DivisiblePad(32, mode="constant", value=0.0)(labels[-1])
        extra = x.shape[4] - padded.shape[3]
        return {level: F.pad(torch.as_tensor(padded).as_subclass(torch.Tensor), (0, extra))[None] for level in levels}

    monkeypatch.setattr(probe, "canonical", watched)
    monkeypatch.setattr(probe, "features", telling)
    names = [case.name for case in dataset.cases]
    score = linear_probe(backbone, dataset, names[:2], names[2:], FEW | {"steps": 60, "levels": ["decoder0"]})
    assert score > 0.99


@pytest.mark.parametrize(
    ("train", "settings", "message"),
    [
        (["spleen_000"], {"colour": 1}, r"probe: settings \['colour'\] are unknown; expected some of spacing"),
        (["spleen_000"], {"levels": ["decoder8"]}, "probe: levels is 'decoder8'; expected one of encoder0"),
        ([], {}, r"probe: train_cases is \[\]; expected names of PhantomSpleen's cases, such as spleen_000"),
        (["other"], {}, r"probe: train_cases is \['other'\]; expected names"),
    ],
)
def test_what_makes_no_sense_is_refused(
    train: list[str], settings: dict[str, Any], message: str, backbone: SwinUNETR, dataset: MSDDataset
):
    with pytest.raises(ValueError, match=message):
        linear_probe(backbone, dataset, train, ["spleen_001"], settings)
