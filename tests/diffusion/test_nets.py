# SPDX-License-Identifier: Apache-2.0
"""Tests what time-conditioned networks compute, learn and refuse, and the running average of their weights."""

import pytest
import torch
from monai.inferers import DiffusionInferer
from monai.networks.nets import SwinUNETR

import medaccel
from medaccel.diffusion import (
    DDIMScheduler,
    DDPMScheduler,
    TimeConditionedSwinUNETR,
    running_average,
    small_unet,
)
from medaccel.layers import SwinTransformerBlock

SWIN = {"feature_size": 12, "spatial_dims": 2, "num_heads": (1, 2, 4, 8)}


def test_a_plain_swin_unetrs_weights_load_and_compute_the_same_at_any_time():
    plain, timed = SwinUNETR(1, 1, **SWIN).eval(), TimeConditionedSwinUNETR(**SWIN).eval()
    missing, unexpected = timed.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("time_") for name in missing)
    x = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        expected = plain(x)
        for timesteps in (torch.tensor([3, 700]), torch.tensor([5.0])):
            torch.testing.assert_close(timed(x, timesteps), expected, rtol=1e-4, atol=1e-4)


def test_the_time_changes_the_output_once_it_is_trained_and_every_modulation_has_a_gradient():
    net = TimeConditionedSwinUNETR(**SWIN)
    x = torch.randn(1, 1, 64, 64)
    net(x, torch.tensor([10])).square().mean().backward()
    modulations = [*net.time_encoder, *net.time_decoder]
    assert all(float(m.project.weight.grad.abs().max()) > 0 for m in modulations)
    with torch.no_grad():
        for modulation in modulations:
            torch.nn.init.normal_(modulation.project.weight, std=0.1)
        assert not torch.allclose(net(x, torch.tensor([10])), net(x, torch.tensor([500])))


def test_its_layers_are_medaccels():
    net = TimeConditionedSwinUNETR(**SWIN)
    assert sum(isinstance(m, SwinTransformerBlock) for m in net.modules()) == 8
    assert not medaccel.accelerate(net)


@pytest.mark.parametrize("kind", ["unet", "swin"])
def test_networks_serve_in_monais_inferer(kind: str):
    net = small_unet(2, channels=(8, 16)) if kind == "unet" else TimeConditionedSwinUNETR(**SWIN)
    for scheduler in (DDPMScheduler(), DDIMScheduler()):
        scheduler.set_timesteps(3)
        sample = DiffusionInferer(scheduler).sample(torch.randn(1, 1, 64, 64), net, scheduler, verbose=False)
        assert sample.shape == (1, 1, 64, 64)
        assert bool(sample.isfinite().all())


def test_a_small_unet_learns_to_predict_the_noise_with_targets_from_a_seed():
    torch.manual_seed(0)
    net, scheduler = small_unet(2, channels=(8, 16)), DDPMScheduler()
    average = running_average(net, decay=0.5)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    clean, losses = torch.zeros(4, 1, 8, 8), []  # all data is one image: the noise is what deviates from it
    for step in range(60):
        t = torch.randint(100, 1000, (4,))
        noisy = scheduler.add_noise(clean, None, t, seed=step)
        loss = (net(noisy, t) - scheduler.training_target(clean, None, t, seed=step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_the_running_average_is_exponential():
    net = torch.nn.Linear(1, 1, bias=False)
    average = running_average(net, decay=0.75)
    with torch.no_grad():
        for value in (1.0, 2.0, 4.0):
            net.weight.fill_(value)
            average.update_parameters(net)
    assert float(average.module.weight.detach()) == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4)


def test_bad_input_is_refused_in_a_sentence():
    net, x = TimeConditionedSwinUNETR(**SWIN), torch.zeros(2, 1, 32, 32)
    with pytest.raises(ValueError, match=r"timesteps has shape \(3,\); expected \(2,\)"):
        net(x, torch.zeros(3))
    with pytest.raises(ValueError, match="context is given; expected None"):
        net(x, torch.zeros(2), x)
    with pytest.raises(ValueError, match=r"running_average: decay is 1.0; expected a number in \[0, 1\)"):
        running_average(net, 1.0)
