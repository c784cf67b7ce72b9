# SPDX-License-Identifier: Apache-2.0
"""Feature maps by name: the Swin UNETR's own, and nothing is computed that was not asked for."""

import pytest
import torch
from torch import nn

from medaccel.nets import SwinUNETR, load_pretrained
from medaccel.pretraining.levels import STRIDES, channels, features, parts_for
from medaccel.pretraining.network import PretrainingNet
from medaccel.pretraining.tasks import make_tasks
from tests.pretraining.made import ROI

SIZE = (64, 32, 32)


@pytest.fixture(scope="module")
def backbone() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(in_channels=1, out_channels=2, feature_size=12).eval()


def test_the_maps_are_those_of_the_networks_own_forward(backbone: SwinUNETR):
    x = torch.rand(2, 1, *SIZE)
    with torch.no_grad():
        maps = features(backbone, x, STRIDES)
        torch.testing.assert_close(backbone.out(maps["decoder0"]), backbone(x))
        for number, state in enumerate(backbone.swinViT(x, backbone.normalize)):
            torch.testing.assert_close(maps[f"encoder{number}"], state)
    for level, stride in STRIDES.items():
        assert maps[level].shape == (2, channels(level, 12), *(n // stride for n in SIZE)), level


@pytest.mark.parametrize("level", STRIDES)
def test_one_level_is_what_it_is_among_all_and_costs_no_block_beyond_it(backbone: SwinUNETR, level: str):
    x = torch.rand(1, 1, *SIZE)
    called: set[str] = set()
    blocks = {name: m for name, m in backbone.named_children() if name != "swinViT"}
    blocks |= {f"swinViT.{name}": m for name, m in backbone.swinViT.named_children()}
    handles = [
        m.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, m in {
            **blocks,
            **{k: v[0] for k, v in blocks.items() if isinstance(v, nn.ModuleList) and len(v)},
        }.items()
    ]
    with torch.no_grad():
        alone = features(backbone, x, {level})
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(alone[level], features(backbone, x, STRIDES)[level])
    assert set(alone) == {level}
    expected = {part for part in parts_for({level}) if part in blocks and not part.endswith("c")}
    assert called - {"swinViT.pos_drop"} == expected


def test_an_unknown_level_or_an_odd_size_is_refused(backbone: SwinUNETR):
    with pytest.raises(ValueError, match=r"levels is 'decoder9'; expected one of encoder0, .*decoder0"):
        features(backbone, torch.rand(1, 1, *SIZE), {"decoder9"})
    with pytest.raises(ValueError, match="must be divisible"):
        features(backbone, torch.rand(1, 1, 64, 48, 32), {"encoder0"})


def test_what_no_task_needs_is_frozen_and_is_no_part_of_the_weights(tmp_path):
    torch.manual_seed(0)
    net = PretrainingNet(make_tasks(["instance", "pixel"], {}, ROI), feature_size=12)
    frozen = {n.partition(".")[0] for n, p in net.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder1", "encoder2", "decoder2", "decoder1", "out"}
    state = net.trained_state()
    assert {n.partition(".")[0] for n in state} == {
        "swinViT", "encoder3", "encoder4", "encoder10", "decoder5", "decoder4", "decoder3"
    }  # fmt: skip
    torch.save({"state_dict": state, "pretraining": {"steps": 1}}, tmp_path / "weights.pt")
    other = SwinUNETR(in_channels=1, out_channels=3, feature_size=12)
    report = load_pretrained(other, tmp_path / "weights.pt")
    assert not report.skipped
    assert set(report.loaded) == set(state)
    for name, value in state.items():
        assert torch.equal(other.state_dict()[name], value), name
