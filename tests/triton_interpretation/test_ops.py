# SPDX-License-Identifier: Apache-2.0
"""The two small ops run interpreted: the pattern that the tests of the package's Triton ops follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted here")

from . import kernels

if TYPE_CHECKING:
    from .interpret import Interpreter

pytestmark = [pytest.mark.slow, pytest.mark.interpreted]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).abs().max()) if truth.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (41, 100), (2, 3, 512), (0, 5)], ids=str)
def test_scale_bias_is_as_exact_as_torch(
    interpreter: Interpreter, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    scale, bias = (torch.randn(shape[-1], generator=generator).to(dtype) for _ in range(2))
    y = kernels.scale_bias(x, scale, bias)
    interpreter.assert_written(y=y)
    truth = x.double() * scale.double() + bias.double()
    assert y.dtype == dtype
    assert error(y, truth) <= 2 * error(x * scale + bias, truth) + 1e-7


def test_scale_bias_takes_a_strided_slice_of_a_larger_tensor(interpreter: Interpreter) -> None:
    whole = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    x, scale, bias = whole[3:17:2, 5:42], whole[18, :37], whole[19, :37]
    y = kernels.scale_bias(x, scale, bias)
    interpreter.assert_written(y=y)
    assert error(y, (x * scale + bias).double()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (33, 50, 65), (64, 32, 128), (70, 7, 3)], ids=str)
def test_matmul_is_as_exact_as_torch(
    interpreter: Interpreter, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, k, n = size
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(m, k, generator=generator).to(dtype), torch.randn(k, n, generator=generator).to(dtype)
    c = kernels.matmul(a, b)
    interpreter.assert_written(c=c)
    truth = a.double() @ b.double()
    assert c.dtype == dtype
    # The floor is one rounding of float32 accumulation: torch's CPU product of half types may be luckier.
    assert error(c, truth) <= 2 * error(a @ b, truth) + 1e-6 * k


def test_matmul_gives_the_same_bits_with_the_tiles_of_every_architecture(interpreter: Interpreter) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-4, 5, (66, 66), generator=generator).to(torch.bfloat16) for _ in range(2))
    first, *others = (kernels.matmul(a, b, arch) for arch in kernels.TILES)
    assert all(torch.equal(first, other) for other in others)
    assert interpreter.launches == ["matmul_kernel"] * 3
