# SPDX-License-Identifier: Apache-2.0
"""Fills a hole without any knowledge of anatomy: solves Laplace's equation between the hole's borders."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix, diags
from scipy.sparse.linalg import cg


def harmonic_fill(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fills a hole so that each of its voxels is the mean of its neighbours: the smoothest continuation.

    Args:
        image: any number of axes; its values in the hole are ignored.
        mask: bool, the image's shape, True in the hole. The image's own border is a mirror.

    Returns:
        The filled image, float64.

    Raises:
        ValueError: shapes differ, or the hole is the whole image.
    """
    if image.shape != mask.shape:
        raise ValueError(f"harmonic_fill: mask has shape {mask.shape}; expected the image's, {image.shape}")
    if mask.all():
        raise ValueError("harmonic_fill: the hole is the whole image; expected something around it")
    filled = np.array(image, dtype=np.float64)
    count = int(mask.sum())
    if count == 0:
        return filled
    number = np.full(mask.shape, -1)
    number[mask] = np.arange(count)
    degree, known = np.zeros(count), np.zeros(count)
    rows, columns = [], []
    for axis in range(mask.ndim):
        for step in (1, -1):
            here, there = [slice(None)] * mask.ndim, [slice(None)] * mask.ndim
            here[axis], there[axis] = (slice(1, None), slice(None, -1)) if step == 1 else (
                slice(None, -1), slice(1, None)
            )  # fmt: skip
            inside = mask[tuple(here)]
            own, other = number[tuple(here)][inside], number[tuple(there)][inside]
            degree[own] += 1
            bordering = other < 0
            known[own[bordering]] += filled[tuple(there)][inside][bordering]
            rows.append(own[~bordering])
            columns.append(other[~bordering])
    row, column = np.concatenate(rows), np.concatenate(columns)
    laplacian = diags(degree) - csr_matrix((np.ones(len(row)), (row, column)), shape=(count, count))
    start = np.full(count, filled[~mask].mean())
    filled[mask], _ = cg(laplacian.tocsr(), known, x0=start, rtol=1e-8, maxiter=10 * count, M=diags(1 / degree))
    return filled
