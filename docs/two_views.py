# SPDX-License-Identifier: Apache-2.0
"""Draws two_views.png: two views of a slice, and lines between the feature pixels that are positives of each other.

    python docs/two_views.py IMAGE.nii.gz docs/two_views.png

Also the slice they come from, with each view's outline, by the same affines.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import ConnectionPatch
from monai.data import MetaTensor
from torch import Tensor

from medaccel.data import TwoViews, feature_affine, read_nifti, voxel_spacing
from medaccel.losses import default_radius, pixel_centres
from medaccel.ops.pixel_contrast.reference import near

ROI, FEATURES, LINES, SEED = (80, 80), (10, 10), 9, 5


def outline(affine: Tensor) -> np.ndarray:
    """The corners of a view in mm, closed, (5, 2)."""
    h, w = ROI
    corners = torch.tensor([[0, 0], [h - 1, 0], [h - 1, w - 1], [0, w - 1], [0, 0]], dtype=torch.float64)
    points: np.ndarray = (corners @ affine[:2, :2].T + affine[:2, 2]).numpy()
    return points


def main() -> None:
    """Reads the volume, makes the views, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="a CT in Hounsfield units (NIfTI)")
    parser.add_argument("target", type=Path, help="the picture")
    arguments = parser.parse_args()
    image = read_nifti(arguments.image)
    volume = np.asarray(image.dataobj, dtype=np.float32)
    spacing = voxel_spacing(image)
    whole = np.clip((volume[:, :, volume.shape[2] // 2] + 200) / 600, 0, 1)
    affine = torch.diag(torch.tensor([spacing[0], spacing[1], 1.0], dtype=torch.float64))
    slice_ = MetaTensor(torch.from_numpy(whole)[None], affine=affine)
    views = TwoViews(ROI, scale=(0.7, 1.2), rotate=0.3, intensity=None).set_random_state(SEED)(slice_)

    maps = [feature_affine(views[f"affine{n}"][None], ROI, FEATURES) for n in (1, 2)]
    at = [pixel_centres(FEATURES, a) for a in maps]
    pairs = near(*at, default_radius(*maps))[0].nonzero().tolist()
    chosen = [pairs[i] for i in np.linspace(0, len(pairs) - 1, LINES).astype(int)]

    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    extent = (0.0, whole.shape[1] * spacing[1], whole.shape[0] * spacing[0], 0.0)
    axes[0].imshow(whole, cmap="gray", extent=extent)
    colours = ("tab:orange", "tab:cyan")
    for n, colour in enumerate(colours):
        points = outline(views[f"affine{n + 1}"])
        axes[0].plot(points[:, 1], points[:, 0], color=colour, label=f"view {n + 1}")
        axes[0].plot(*points[0, ::-1], "o", color=colour)
        axes[n + 1].imshow(views[f"view{n + 1}"][0], cmap="gray", vmin=0, vmax=1)
        axes[n + 1].plot(0, 0, "o", color=colour, clip_on=False)
        axes[n + 1].set_title(f"view {n + 1}")
    axes[0].legend(loc="lower left", fontsize=8)
    axes[0].set_title("the slice; dots: the views' first voxels")
    step = [ROI[a] / FEATURES[a] for a in (0, 1)]
    for number, (i, j) in enumerate(chosen):
        colour = plt.get_cmap("turbo")(number / (LINES - 1))
        ends = []
        for index in (i, j):
            row, column = divmod(index, FEATURES[1])
            ends.append(((column + 0.5) * step[1] - 0.5, (row + 0.5) * step[0] - 0.5))
        axes[0].plot(*(float(at[0][0, i, a]) for a in (1, 0)), "+", color=colour)
        line = ConnectionPatch(*ends, "data", "data", axesA=axes[1], axesB=axes[2], color=colour, lw=1.2)
        figure.add_artist(line)
        for axis, end in zip(axes[1:], ends, strict=True):
            axis.plot(*end, "s", color=colour, ms=5, fillstyle="none")
    for axis in axes:
        axis.axis("off")
    figure.savefig(arguments.target, dpi=110)


if __name__ == "__main__":
    main()
