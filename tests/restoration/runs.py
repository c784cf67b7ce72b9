# SPDX-License-Identifier: Apache-2.0
"""Settings of runs that are small enough for a test."""

from typing import Any

GAUSSIANS = ("gaussian1", "gaussian3", "gaussian_mix")
# The smallest networks that there are: what is tested is the way from studies to a report.
TINY: dict[str, Any] = {
    "channels": [8, 16],
    "roi_size": [16, 16, 16],
    "steps": 2,
    "steps_per_epoch": 2,
    "samples": 3,
    "sampling_steps": 2,
    "validation_samples": 1,
    "accelerator": "cpu",
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"epochs": 3} for name in GAUSSIANS},
    "diffusion_sdedit": TINY | {"t0": [5, 20]},
    "diffusion_conditional": TINY,
}
