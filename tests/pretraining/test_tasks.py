# SPDX-License-Identifier: Apache-2.0
"""The tasks: what each hides, turns or compares, and the loss that it takes of that."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medaccel.losses import PixelContrastiveLoss
from medaccel.ops import nt_xent_loss
from medaccel.pretraining.network import PretrainingNet
from medaccel.pretraining.tasks import PRESETS, TASKS, Step, make_tasks
from medaccel.pretraining.tasks.inpainting import Inpainting, Reconstruction, cut_out, smooth_fill
from medaccel.pretraining.tasks.instance import Instance
from medaccel.pretraining.tasks.pixels import PixelContrast, PixPro, PixProHead, momentum
from medaccel.pretraining.tasks.rotation import Rotation
from medaccel.pretraining.tasks.standardise import StandardisedMap
from tests.pretraining.made import ROI


def make(name: str, roi: Any = ROI, **settings: Any) -> Any:
    return make_tasks([name], {name: settings}, roi)[0]


def step_of(task: Any, batch: dict[str, torch.Tensor], progress: float = 0.0) -> Step:
    torch.manual_seed(0)
    net = PretrainingNet([task], feature_size=12)
    views = torch.cat([batch["view1"], batch["view2"]])
    return Step(net, net.features(views, task.view_levels), batch, progress)


def views(count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    at = torch.diag(torch.tensor([8.0, 8.0, 8.0, 1.0], dtype=torch.float64)).repeat(count, 1, 1)
    moved = at.clone()
    moved[:, 0, 3] = 24.0
    x = torch.rand(2, count, 1, *ROI, generator=generator)
    return {"view1": x[0], "view2": x[1], "affine1": at, "affine2": moved}


def test_blocks_cover_nearly_the_share_and_never_more():
    for seed in range(20):
        mask = cut_out((64, 48, 32), 0.3, (0.05, 0.25), np.random.default_rng(seed))
        assert 0.25 < mask.mean() <= 0.3
    one = cut_out((64, 48, 32), 0.02, (0.25, 0.25), np.random.default_rng(0))
    filled = [np.flatnonzero(one.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    assert [len(w) for w in filled] == [16, 12, 8]
    assert one.sum() == 16 * 12 * 8


def test_the_shuffled_head_puts_each_voxel_into_its_pixel():
    head = Reconstruction(2, 4, 8)
    features = torch.zeros(1, 2, 2, 2, 2)
    with torch.no_grad():
        assert not head(features).any()  # untrained, it adds nothing to the smooth fill
        torch.nn.init.normal_(head.layers[2].weight)
        before = head(features)
        features[0, :, 1, 0, 1] = 5.0
        changed = (head(features) != before)[0, 0]
    assert changed.shape == (8, 8, 8)
    assert changed[4:, :4, 4:].all()
    changed[4:, :4, 4:] = False
    assert not changed.any()


def test_the_smooth_fill_is_of_what_is_seen_alone_and_keeps_a_constant():
    mask = torch.zeros(1, 1, 12, 12, 12, dtype=torch.bool)
    mask[..., 4:8, 4:8, 4:8] = True
    view = torch.where(mask, 99.0, torch.full(mask.shape, 0.7))
    assert torch.allclose(smooth_fill(view, mask, 2.0), torch.tensor(0.7), atol=1e-5)
    assert not smooth_fill(view, torch.ones_like(mask), 2.0).any()


def test_inpainting_looks_at_the_hidden_voxels_alone_unless_told_otherwise():
    rng = np.random.default_rng(0)
    for on in ("masked", "all"):
        task = make("inpainting", on=on)
        item = {"view1": torch.rand(1, *ROI), "view2": torch.rand(1, *ROI)}
        before = item["view1"].clone()
        task.prepare(item, torch.rand(1, *ROI), rng)
        assert torch.equal(item["target1"], before)
        assert torch.equal(item["view1"][~item["mask1"]], before[~item["mask1"]])
        assert (item["view1"] != before)[item["mask1"]].float().mean() > 0.99
        batch = {key: value[None] for key, value in item.items()}
        step = step_of(task, batch)
        loss = task.losses(step)["inpainting"]
        target = {k: v.clone() for k, v in batch.items()}
        target["target1"][~target["mask1"]] += 1.0  # what was to be seen anyway
        other = task.losses(Step(step.net, step.maps, target, 0.0))["inpainting"]
        assert (other == loss) == (on == "masked")


def test_the_rotation_is_told_on_a_crop_that_nothing_else_has_turned_or_flipped():
    task = make("rotation", roi=(64, 64, 32))
    image = torch.zeros(1, 64, 64, 32)
    image[0, 40:, :, :] = 1.0  # a patient's left, in canonical orientation
    seen = set()
    for seed in range(12):
        item: dict[str, torch.Tensor] = {}
        task.prepare(item, image, np.random.default_rng(seed))
        turns = int(item["rotation"])
        seen.add(turns)
        back = torch.rot90(item["rotation_view"], -turns, (1, 2))
        assert (back - image).abs().max() < 0.2  # noise
    assert seen == {0, 1, 2, 3}


def test_the_rotation_loss_is_the_cross_entropy_of_chance_for_a_network_that_knows_nothing():
    task = make("rotation", roi=(64, 64, 32))
    net = PretrainingNet([task], feature_size=12)
    for parameter in net.heads["rotation"].parameters():
        torch.nn.init.zeros_(parameter)
    batch = {"rotation_view": torch.rand(4, 1, 64, 64, 32), "rotation": torch.tensor([0, 1, 2, 3])}
    terms = task.losses(Step(net, {}, batch, 0.0))
    assert float(terms["rotation"].detach()) == pytest.approx(math.log(4), abs=1e-6)
    assert float(terms["rotation_accuracy"]) == 0.25


def test_rotation_needs_a_square_view():
    with pytest.raises(ValueError, match=r"rotation: roi_size is \[64, 32, 32\]; expected as many voxels"):
        make("rotation")


def test_instance_contrast_is_nt_xent_and_its_bound_stays_below_log_n():
    task = make("instance", temperature=0.2)
    step = step_of(task, views())
    terms = task.losses(step)
    first, second = task.embed(step.net, step.maps).chunk(2)
    torch.testing.assert_close(terms["instance"], nt_xent_loss(first, second, temperature=0.2))
    assert float(terms["mutual_information_bound"]) <= math.log(2)
    assert not terms["mutual_information_bound"].requires_grad


def test_a_map_is_standardised_among_the_views_that_are_shown():
    standardise = StandardisedMap()
    x = torch.randn(60, 3, 2, 1, 2) + 5.0
    shown = standardise(x)
    assert shown.shape == (60, 12)
    torch.testing.assert_close(shown.mean(dim=0), torch.zeros(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(shown.std(dim=0, unbiased=False), torch.ones(12), rtol=0, atol=1e-2)
    torch.testing.assert_close(standardise.eval()(x), shown)
    assert not standardise.state_dict()


def test_pixel_contrast_is_the_mean_of_the_items_losses():
    task = make("pixel")
    batch = views()
    batch["affine2"][1, 0, 3] = 300.0  # half of this item's pixels have no partner
    step = step_of(task, batch)
    one, two = task.project(step.net, step.maps).chunk(2)
    affines = task.affines(batch, one)
    # A pixel of stride 4 with voxels of 8 mm: 32 mm, its centre 1.5 voxels from the first voxel's.
    torch.testing.assert_close(affines[0][0], torch.tensor(
        [[32.0, 0, 0, 12], [0, 32, 0, 12], [0, 0, 32, 12], [0, 0, 0, 1]]
    ))  # fmt: skip
    loss = PixelContrastiveLoss(0.3)
    each = [loss(one[i : i + 1], two[i : i + 1], *(a[i : i + 1] for a in affines)) for i in (0, 1)]
    torch.testing.assert_close(task.losses(step)["pixel"], (each[0] + each[1]) / 2)
    assert float(each[0].detach()) != pytest.approx(float(each[1].detach()))


def test_pixpros_momentum_rises_from_099_to_1_and_the_copies_get_no_gradient():
    assert (momentum(0.0), momentum(1.0)) == (0.99, 1.0)
    assert momentum(0.5) == pytest.approx(0.995)
    task = make("pixpro")
    net, batch = PretrainingNet([task], feature_size=12), views(1)
    head = net.heads["pixpro"]
    assert isinstance(head, PixProHead)
    slow = head.momentum_backbone.swinViT.patch_embed.proj.weight
    with torch.no_grad():
        net.backbone.swinViT.patch_embed.proj.weight.add_(1.0)
    before = slow.clone()
    maps = net.features(torch.cat([batch["view1"], batch["view2"]]), task.view_levels)
    loss = task.losses(Step(net, maps, batch, 0.0))["pixpro"]
    torch.testing.assert_close(slow - before, torch.full_like(slow, 0.01))
    loss.backward()
    assert -2 <= float(loss.detach()) <= 2
    assert all(p.grad is None for p in head.momentum_backbone.parameters())
    assert all(p.grad is None for p in head.momentum_projector.parameters())
    assert float(head.transform.weight.grad.abs().max()) > 0
    assert float(head.projector[0].weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("inpainting", {"level": "decoder7"}, "inpainting: level is 'decoder7'; expected one of encoder0"),
        ("inpainting", {"share": 0}, "inpainting: share is 0; expected a number above 0 and at most 0.9"),
        ("inpainting", {"sides": [0.5, 0.2]}, r"inpainting: sides is \[0.5, 0.2\]; expected two shares"),
        ("inpainting", {"on": "some"}, "inpainting: on is 'some'; expected 'masked' or 'all'"),
        ("inpainting", {"hidden": 0}, "inpainting: hidden is 0; expected a whole number >= 1"),
        ("instance", {"temperature": -1}, "instance: temperature is -1; expected a number above 0"),
        ("instance", {"dimensions": "many"}, "instance: dimensions is 'many'; expected a whole number"),
        ("pixel", {"radius": 0.0}, "pixel: radius is 0.0; expected a number above 0"),
        ("pixel", {"level": "encoder5"}, "pixel: level is 'encoder5'; expected one of"),
        ("pixpro", {"power": 0.5}, "pixpro: power is 0.5; expected a number of at least 1"),
        ("pixpro", {"colour": 1}, r"pixpro: settings \['colour'\] are unknown; expected some of level"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(name, **settings)


def test_presets_are_made_of_tasks_that_there_are():
    assert set(TASKS) == {"inpainting", "rotation", "instance", "pixel", "pixpro"}
    assert PRESETS["nvidia"] == {"inpainting": 1.0, "rotation": 1.0, "instance": 1.0}
    assert PRESETS["instance_pixel"] == {"instance": 1.0, "pixel": 1.0}
    kinds = [Inpainting, Rotation, Instance, PixelContrast, PixPro]
    assert [type(task) for task in make_tasks(list(PRESETS["all"]), {}, (64, 64, 32))] == kinds
    with pytest.raises(ValueError, match=r"tasks names \['jigsaw'\]; expected some of inpainting"):
        make_tasks(["jigsaw"], {}, ROI)


class Features(TorchDispatchMode):
    """Notes the dtypes of the features that reach medaccel's pixel ops, by op."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("medaccel::")
        if name in ("pixel_contrastive_loss", "pixel_propagation", "pixel_pair_similarity"):
            self.dtypes.setdefault(name, set()).update(a.dtype for a in args[:2])
        return func(*args, **(kwargs or {}))


PIXEL_OPS = {"pixel": {"pixel_contrastive_loss"}, "pixpro": {"pixel_propagation", "pixel_pair_similarity"}}


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.slow
def test_under_autocast_ops_get_its_dtype_and_losses_are_fp32(name: str, cast: torch.dtype):
    task, batch = make(name, (64, 64, 32) if name == "rotation" else ROI), views()
    rng = np.random.default_rng(1)
    items = [{key: value[i] for key, value in batch.items()} for i in range(2)]
    for item in items:
        task.prepare(item, torch.from_numpy(rng.random((1, 64, 64, 64), dtype=np.float32)), rng)
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    plain = task.losses(step_of(task, batch))
    with torch.autocast("cpu", dtype=cast):
        step = step_of(task, batch)
        with Features() as seen:
            half = task.losses(step)
    assert seen.dtypes == {op: {cast} for op in PIXEL_OPS.get(name, set())}
    for key, value in half.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(plain[key].item(), rel=0.1, abs=0.1), key


@pytest.mark.parametrize("name", PIXEL_OPS)
def test_rounding_features_to_bf16_moves_loss_and_gradient_little(name: str):
    """The projector's result is rounded either way: what the op sees decides little."""
    task = make(name)
    results = []
    for cast in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step = step_of(task, views())
            step.net.heads[name].projector.register_forward_hook(lambda m, x, y, cast=cast: y.to(cast))
            loss = task.losses(step)[name]
        loss.backward()
        results.append((loss.detach(), step.net.heads[name].projector[0].weight.grad))
    (exact, slope), (rounded, rounded_slope) = results
    assert rounded.dtype == torch.float32
    assert float(rounded) == pytest.approx(float(exact), rel=2e-3)
    assert torch.cosine_similarity(slope.flatten(), rounded_slope.flatten(), dim=0) > 0.99


def test_the_smooth_fill_is_not_rounded_by_autocast():
    mask = torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    view = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        filled = smooth_fill(view, mask, 2.0)
    assert torch.equal(filled, smooth_fill(view, mask, 2.0))
