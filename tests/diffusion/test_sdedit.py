# SPDX-License-Identifier: Apache-2.0
"""Tests SDEdit: posterior samples of known data, masks, windows, the paper's conventions, interruption, refusals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medaccel.diffusion import VESDE, VPSDE, SDEdit, noised
from medaccel.diffusion.samplers import START
from tests.diffusion.mixture import Mixture

GUIDE = torch.linspace(-1, 1, 6 * 7 * 8, dtype=torch.float64).reshape(1, 1, 6, 7, 8)


def half(x: Tensor, time: Tensor) -> Tensor:
    """A network that is no network: bit-stable arithmetic alone."""
    return 0.4 * x + 0.001 * time.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def quiet(edit: SDEdit, guide: Tensor = GUIDE, mask: Tensor | None = None, **options: Any):
    return edit(guide, mask, progress=False, **options)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(0.01, 10.0, steps=400)], ids=["VP", "VE"])
def test_samples_are_draws_of_the_datas_posterior(sde: VPSDE | VESDE):
    """Mean and variance are known for one Gaussian, noised at level t0 and denoised by its exact score."""
    mean, std, t0 = 0.3, 0.5, sde.suggest_t0(0.8)
    data = Mixture((1.0,), (mean,), (std,))
    guide = torch.full((1, 1, 100, 200), 1.1, dtype=torch.float64)
    x = quiet(SDEdit(data.model(sde, "epsilon"), sde, t0), guide, seeds=[4]).samples
    alpha, sigma = sde.level(t0 - 1)
    gain = alpha * std**2 / ((alpha * std) ** 2 + sigma**2)  # E[x0 | x] = mean + gain · (x − alpha · mean)
    expected_mean = mean + gain * alpha * (1.1 - mean)
    expected_variance = std**2 - gain * alpha * std**2 + (gain * sigma) ** 2
    n = x.numel()
    assert abs(float(x.mean()) - expected_mean) < 5 * math.sqrt(expected_variance / n) + 0.01
    assert float(x.var()) == pytest.approx(expected_variance, rel=5 * math.sqrt(2 / n) + 0.04)


def test_mean_and_spread_are_those_of_the_samples_and_each_depends_on_its_seed_alone():
    edit = SDEdit(half, VPSDE(), 20, 5)
    result = quiet(edit, seeds=[7, 3, 9])
    assert result.samples.shape == (3, *GUIDE.shape)
    torch.testing.assert_close(result.mean, result.samples.mean(dim=0))
    torch.testing.assert_close(result.std, result.samples.std(dim=0))
    assert torch.equal(quiet(edit, seeds=[3]).samples[0], result.samples[1])
    assert torch.equal(quiet(edit, seeds=[3]).std, torch.zeros_like(GUIDE))
    assert not torch.equal(result.samples[0], result.samples[1])
    assert len(quiet(edit, seeds=2).samples) == 2


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["VP", "VE"])
@pytest.mark.parametrize("conventions", ["medaccel", "original"])
def test_kept_voxels_end_as_the_guide_and_the_others_do_not(conventions: str, sde: VPSDE | VESDE):
    guide = torch.randn(1, 2, 9, 10)
    mask = (torch.rand(1, 1, 9, 10) < 0.5).float()
    result = quiet(SDEdit(half, sde, 30, 6, conventions=conventions, repeats=2), guide, mask, seeds=1).samples[0]
    kept = (mask == 0 if conventions == "medaccel" else mask == 1).expand_as(guide)
    assert torch.equal(result[kept], guide[kept])
    assert not (result[~kept] == guide[~kept]).any()


def test_the_papers_code_is_reproduced():
    """The paper's loop (ermongroup/SDEdit, `image_editing_sample`) is repeated in plain PyTorch, with the same random
    numbers."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a = (1 - betas).cumprod(0)
    seed, t0, mask = 5, 12, (torch.rand(GUIDE.shape) < 0.4).double()
    e = noised(torch.zeros_like(GUIDE), 0.0, 1.0, seed=seed, offset=START)
    x = GUIDE * a[t0 - 1].sqrt() + e * (1 - a[t0 - 1]).sqrt()
    for i in reversed(range(t0)):
        m = half(x, torch.tensor([float(i)]))
        mean = (x - betas[i] / (1 - a[i]).sqrt() * m) / (1 - betas[i]).sqrt()
        before = a[i - 1] if i > 0 else torch.ones(())
        std = (betas[i] * (1 - before) / (1 - a[i])).sqrt()
        z = noised(torch.zeros_like(GUIDE), 0.0, 1.0, seed=seed, offset=i)
        x_ = mean + (std * z if i > 0 else 0)
        x = GUIDE * a[i].sqrt() + e * (1 - a[i]).sqrt()
        x[mask != 1] = x_[mask != 1]
    expected = torch.where(mask == 1, GUIDE, x)
    ours = quiet(SDEdit(half, VPSDE(), t0, conventions="original"), GUIDE, mask, seeds=[seed]).samples[0]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_windows_of_a_pointwise_network_leave_no_seam():
    """The noise belongs to the volume: windowed and whole give the same sample."""
    guide = torch.randn(1, 1, 20, 17, 12, dtype=torch.float64)
    whole = quiet(SDEdit(half, VPSDE(), 40, 8), guide, seeds=[2]).samples
    windowed = quiet(SDEdit(half, VPSDE(), 40, 8, roi_size=8, sw_batch_size=3), guide, seeds=[2]).samples
    torch.testing.assert_close(windowed, whole, rtol=1e-6, atol=1e-6)
    assert quiet(SDEdit(half, VPSDE(), 40, 8, roi_size=(8, 6)), guide[..., 0], seeds=[2]).samples.shape == (
        1,
        1,
        1,
        20,
        17,
    )


@pytest.mark.parametrize(
    "options",
    [{"method": "dpm_solver_2m"}, {"repeats": 2}, {"conventions": "original", "repeats": 2}, {"corrector_steps": 1}],
    ids=str,
)
def test_an_interrupted_call_goes_on_to_the_same_bits(tmp_path: Path, options: dict[str, Any]):
    mask = (torch.rand(GUIDE.shape) < 0.5).double()
    expected = quiet(SDEdit(half, VPSDE(), 40, 9, **options), GUIDE, mask, seeds=[1, 2, 3]).samples
    calls = 0

    def interrupted(x: Tensor, time: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 13 == 0:
            raise KeyboardInterrupt
        return half(x, time)

    edit = SDEdit(interrupted, VPSDE(), 40, 9, **options)
    for _ in range(30):
        try:
            result = quiet(edit, GUIDE, mask, seeds=[1, 2, 3], folder=tmp_path, save_every=2)
            break
        except KeyboardInterrupt:
            continue
    assert torch.equal(result.samples, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"sample_{s}.pt" for s in (1, 2, 3)), "sdedit.json"]
    before = calls
    assert torch.equal(quiet(edit, GUIDE, mask, seeds=[3, 1], folder=tmp_path).samples, expected[[2, 0]])
    assert calls == before  # nothing is computed twice


@pytest.mark.parametrize("name", ["sample_1.pt", "running.pt"])
def test_a_damaged_file_is_made_again_to_the_same_bits(tmp_path: Path, name: str):
    edit = SDEdit(half, VPSDE(), 40, 9)
    expected = quiet(edit, GUIDE, seeds=[1, 2], folder=tmp_path).samples
    whole = (tmp_path / "sample_1.pt").read_bytes()
    (tmp_path / "sample_1.pt").unlink()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    for content in (bytes(flipped), whole[:-50], b""):
        (tmp_path / name).write_bytes(content)
        assert torch.equal(quiet(edit, GUIDE, seeds=[1, 2], folder=tmp_path).samples, expected)
        (tmp_path / "sample_1.pt").unlink()


def test_a_progress_bar_names_the_sample(capsys: pytest.CaptureFixture[str]):
    SDEdit(half, VPSDE(), 4)(GUIDE, seeds=2)
    assert "sample 2 of 2" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------------------------
def test_bad_input_is_refused_in_a_sentence(tmp_path: Path):
    good = SDEdit(half, VPSDE(), 4)
    cases = [
        (lambda: SDEdit(half, VPSDE(), 2000), "VPSDE: t0 is 2000; expected 1 to 1000 of the schedule's levels"),
        (lambda: SDEdit(half, VPSDE(), 4, 5), "VPSDE: steps is 5; expected 1 to 4"),
        (lambda: SDEdit(half, VPSDE(), 4, conventions="paper"), "SDEdit: conventions is 'paper'; expected one of"),
        (lambda: SDEdit(half, VPSDE(), 4, repeats=0), "SDEdit: repeats is 0; expected at least 1"),
        (lambda: SDEdit(half, VPSDE(), 4, overlap=1.0), r"SDEdit: overlap is 1.0; expected a share in \[0, 1\)"),
        (lambda: quiet(good, GUIDE[0, 0]), r"guide is torch.float64 of shape \(6, 7, 8\); expected floating-point"),
        (lambda: quiet(good, GUIDE.int()), "guide is torch.int32 of shape"),
        (lambda: quiet(good, seeds=[1, 1]), r"SDEdit: seeds is \[1, 1\]; expected at least one, all different"),
        (lambda: quiet(good, seeds=0), "SDEdit: seeds is 0; expected at least one"),
        (lambda: quiet(good, seeds=1, folder=tmp_path, save_every=0), "save_every is 0; expected at least 1"),
        (lambda: quiet(good, mask=GUIDE[..., :3], seeds=1), r"mask has shape \(1, 1, 6, 7, 3\); expected one that"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()
    quiet(good, seeds=1, folder=tmp_path)
    with pytest.raises(ValueError, match="holds samples of another guide, mask or setting"):
        quiet(good, GUIDE + 1, seeds=1, folder=tmp_path)
    with pytest.raises(ValueError, match=r"at level 3 \(time 3\); expected finite numbers"):
        quiet(SDEdit(lambda x, t: x / 0, VPSDE(), 4, check_finite=True), seeds=1)
