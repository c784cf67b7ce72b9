# SPDX-License-Identifier: Apache-2.0
"""Tests the losses on two feature maps: geometry to coordinates and radius, both directions, refusals."""

import math

import pytest
import torch
from torch import Tensor, nn

from medaccel import ops
from medaccel.losses import PixelConsistencyLoss, PixelContrastiveLoss, default_radius, pixel_centres

LOSSES = (PixelContrastiveLoss, PixelConsistencyLoss)


def affine(spacing: tuple[float, ...], corner: tuple[float, ...], batch: int = 2) -> Tensor:
    matrix = torch.eye(len(spacing) + 1, dtype=torch.float64)
    matrix[:-1, :-1] = torch.diag(torch.tensor(spacing, dtype=torch.float64))
    matrix[:-1, -1] = torch.tensor(corner, dtype=torch.float64)
    return matrix.expand(batch, -1, -1)


def maps(*sizes: tuple[int, ...], batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, 6, *size, dtype=torch.float64) for size in sizes]


def test_centres_come_in_row_major_order_and_in_mm():
    at = pixel_centres((2, 3), affine((2.0, 5.0), (10.0, 20.0), batch=1))
    expected = [[10.0, 20.0], [10.0, 25.0], [10.0, 30.0], [12.0, 20.0], [12.0, 25.0], [12.0, 30.0]]
    assert at[0].tolist() == expected


def test_a_rotated_map_lies_rotated():
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    assert pixel_centres((1, 3), quarter)[0].tolist() == [[0.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]]


@pytest.mark.parametrize(("axes", "bins"), [(2, 0.7 * math.sqrt(2)), (3, 0.57 * math.sqrt(3))])
def test_the_default_radius_is_about_one_bin_of_the_coarser_map(axes: int, bins: float):
    fine, coarse = affine((2.0,) * axes, (0.0,) * axes), affine((3.0,) * axes, (0.0,) * axes)
    for pair in ((fine, coarse), (coarse, fine)):
        torch.testing.assert_close(default_radius(*pair), torch.full((2,), 3 * bins, dtype=torch.float64))


@pytest.mark.parametrize("kind", LOSSES)
def test_both_directions_count(kind: type):
    one, two = maps((4, 5, 3), (5, 3, 4))
    geometry = affine((2.0, 2.0, 3.0), (0.0, 1.0, 0.0)), affine((1.5, 3.0, 2.0), (1.0, 0.0, 0.5))
    rows = [f.flatten(2).transpose(1, 2) for f in (one, two)]
    at = [pixel_centres(tuple(f.shape[2:]), a) for f, a in zip((one, two), geometry, strict=True)]
    radius = default_radius(*geometry)
    op = ops.pixel_contrastive_loss if kind is PixelContrastiveLoss else ops.pixel_consistency_loss
    there = op(rows[0], rows[1], at[0], at[1], radius=radius)
    back = op(rows[1], rows[0], at[1], at[0], radius=radius)
    expected = (there + back) / 2 if kind is PixelContrastiveLoss else there + back
    assert torch.equal(kind()(one, two, *geometry), expected)
    torch.testing.assert_close(kind()(two, one, *geometry[::-1]), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_keys_take_the_place_of_the_other_views_features(kind: type):
    one, two, key1, key2 = maps(*[(4, 5)] * 4)
    geometry = affine((1.0, 1.0), (0.0, 0.0)), affine((1.0, 1.0), (0.4, 0.3))
    one.requires_grad_(), key2.requires_grad_()
    loss = kind()(one, two, *geometry, keys1=key1, keys2=key2)
    gradients = torch.autograd.grad(loss, (one, key2))
    assert all(g.any() for g in gradients)
    assert not torch.equal(loss, kind()(one, two, *geometry))


@pytest.mark.parametrize("kind", LOSSES)
def test_views_that_are_equal_and_lie_apart(kind: type):
    (one,) = maps((4, 4, 4))
    here, far = affine((2.0,) * 3, (0.0,) * 3), affine((2.0,) * 3, (100.0,) * 3)
    assert float(kind()(one, one, here, far)) == 0
    if kind is PixelConsistencyLoss:
        assert float(kind(radius=0.5)(one, one, here, here)) == pytest.approx(-2, rel=1e-14)


def test_a_given_radius_and_temperature_are_used():
    one, two = maps((4, 4), (4, 4))
    geometry = affine((1.0, 1.0), (0.0, 0.0)), affine((1.0, 1.0), (0.2, 0.1))
    losses = {float(PixelContrastiveLoss(t, r)(one, two, *geometry)) for t in (0.1, 0.3) for r in (None, 2.5)}
    assert len(losses) == 4


@pytest.mark.parametrize("kind", LOSSES)
def test_bad_input_is_refused_in_a_sentence(kind: type):
    one, two = maps((4, 4), (5, 4))
    a = affine((1.0, 1.0), (0.0, 0.0))
    name = kind.__name__
    with pytest.raises(ValueError, match=rf"{name}: features1 has shape \(2, 6\); expected \(B, C, \*spatial\)"):
        kind()(one[..., 0, 0], two, a, a)
    with pytest.raises(
        ValueError, match=rf"{name}: features2 has shape \(2, 5, 5, 4\); expected the batch, channels"
    ):
        kind()(one, two[:, :5], a, a)
    with pytest.raises(ValueError, match=rf"{name}: affine2 has shape \(2, 4, 4\); expected \(2, 3, 3\)"):
        kind()(one, two, a, torch.eye(4).expand(2, 4, 4))
    with pytest.raises(ValueError, match=rf"{name}: keys1 has shape \(2, 6, 5, 4\); expected that of features1"):
        kind()(one, two, a, a, keys1=two)
    with pytest.raises(TypeError, match=rf"{name}: affine1 is torch.int64; expected a floating-point tensor"):
        kind()(one, two, a.long(), a)
    with pytest.raises(ValueError, match=rf"{name}: radius is 0; expected a finite number above 0"):
        kind(radius=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_affines_give_fp32_geometry(dtype: torch.dtype):
    """Numbers that the affine holds exactly, whose products with an index it does not."""
    geometry = affine((0.75, 1.5, 3.0), (-301.0 if dtype == torch.float16 else -300.0, 17.0, 5.0))
    sizes = (301, 2, 2)
    at = pixel_centres(sizes, geometry.to(dtype))
    assert at.dtype == torch.float32
    assert torch.equal(at.double(), pixel_centres(sizes, geometry))
    radius = default_radius(geometry.to(dtype), geometry.to(dtype))
    assert radius.dtype == torch.float32
    torch.testing.assert_close(radius.double(), default_radius(geometry, geometry), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_half_precision_maps_are_fp32(kind: type, dtype: torch.dtype, cast: torch.dtype | None):
    one, two = (m.to(dtype).requires_grad_() for m in maps((4, 5, 3), (5, 3, 4)))
    geometry = affine((2.0, 2.0, 3.0), (0.0, 1.0, 0.0)), affine((1.5, 3.0, 2.0), (1.0, 0.0, 0.5))
    with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
        loss = kind()(one, two, *geometry)
    assert loss.dtype == torch.float32
    exact = [m.detach().double().requires_grad_() for m in (one, two)]
    truth = kind()(*exact, *geometry)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    grads = torch.autograd.grad(loss * 65536, (one, two))  # GradScaler's first scale
    for grad, expected in zip(grads, torch.autograd.grad(truth * 65536, exact), strict=True):
        assert grad.dtype == dtype
        # A map's gradient is the sum of two directions', each rounded.
        eps = torch.finfo(dtype).eps + 1e-6
        torch.testing.assert_close(grad.double(), expected, rtol=eps, atol=eps * float(expected.abs().max()))


def test_a_temperature_that_is_learnt_gets_its_gradient():
    one, two = maps((4, 5, 3), (5, 3, 4))
    geometry = affine((2.0, 2.0, 3.0), (0.0, 1.0, 0.0)), affine((1.5, 3.0, 2.0), (1.0, 0.0, 0.5))

    def at(temperature: float) -> float:
        return float(PixelContrastiveLoss(temperature)(one, two, *geometry))

    expected = (at(0.4 + 1e-5) - at(0.4 - 1e-5)) / 2e-5
    with torch.no_grad():
        made_without_gradients = PixelContrastiveLoss(nn.Parameter(torch.tensor(0.4, dtype=torch.float64)))
    replaced = PixelContrastiveLoss()
    replaced.temperature = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    for loss in (
        PixelContrastiveLoss(nn.Parameter(torch.tensor(0.4, dtype=torch.float64))),
        made_without_gradients,
        replaced,
    ):
        assert [name for name, _ in loss.named_parameters()] == ["temperature"]
        loss(one, two, *geometry).backward()
        assert float(loss.temperature.grad) == pytest.approx(expected, rel=1e-7)
    for plain in (0.4, torch.tensor(0.4)):
        assert isinstance(PixelContrastiveLoss(plain).temperature, float)
