# SPDX-License-Identifier: Apache-2.0
"""The suites' implementation "cuda" calls registered ops on a device, and their results come back."""

import pytest
import torch

from medaccel.ops import gaussian_filter, nt_xent_loss
from tests.ops.checks import IMPLEMENTATIONS, OnDevice, implementation


def test_an_op_is_called_on_the_device_forward_and_backward(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(1, 1, 9, 8, requires_grad=True)
    sigma = torch.tensor([1.0, 2.0], requires_grad=True)
    expected = gaussian_filter(x, sigma)
    called: list[str] = []
    with OnDevice(torch.device("cpu")) as there:  # stands in for a GPU
        serves = there._serves
        monkeypatch.setattr(there, "_serves", lambda func, args: called.append(str(func)) or serves(func, args))
        actual = gaussian_filter(x, sigma)
        grads = torch.autograd.grad(actual.sum(), (x, sigma))
    assert called == ["medaccel.gaussian_filter.default", "medaccel.gaussian_filter_backward.default"]
    assert torch.equal(actual, expected)
    for ours, truth in zip(grads, torch.autograd.grad(expected.sum(), (x, sigma)), strict=True):
        assert torch.equal(ours, truth)


def test_an_op_without_a_kernel_on_the_device_skips():
    with (
        OnDevice(torch.device("cuda")),
        pytest.raises(pytest.skip.Exception, match="no kernel on cuda"),
    ):
        nt_xent_loss(torch.ones(3, 4), torch.ones(3, 4))


def test_a_machine_without_a_gpu_skips():
    assert "cuda" in IMPLEMENTATIONS
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(pytest.skip.Exception, match="no GPU"), implementation("cuda"):
        pass
