# SPDX-License-Identifier: Apache-2.0
"""Names of the methods, and of the references that are scored beside them."""

from __future__ import annotations

from collections.abc import Mapping

IDENTITY, ORACLE, NOISE_FREE = "identity", "oracle", "noise_free"
REFERENCES = (IDENTITY, ORACLE, NOISE_FREE)
LABELS = {
    IDENTITY: "Identity (the input)",
    "gaussian1": "Gaussian, 1 layer",
    "gaussian3": "Gaussian, 3 layers",
    "gaussian_mix": "Gaussian mix",
    "nlm": "Non-local means",
    "tv": "Total variation",
    "bm4d": "BM4D",
    "bm4d_noise": "BM4D by noise level",
    "unet": "U-Net",
    "swin_unetr": "Swin UNETR",
    "diffusion_sdedit": "Diffusion, SDEdit",
    "diffusion_conditional": "Diffusion, conditional",
    ORACLE: "Oracle (knows the truth)",
    NOISE_FREE: "Noise-free truth",
}


def label(method: str, labels: Mapping[str, str]) -> str:
    """Returns a method's name for readers: the caller's, else the package's, else its key."""
    return labels.get(method) or LABELS.get(method) or method
