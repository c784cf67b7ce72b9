# SPDX-License-Identifier: Apache-2.0
"""Lists names of tasks and presets for the command line, which avoids importing the tasks."""

from __future__ import annotations

from collections.abc import Mapping

TASK_NAMES = ("inpainting", "rotation", "instance", "pixel", "pixpro")
#: Presets weigh the tasks so. "nvidia" is the published Swin UNETR pretraining's, "instance_pixel" the study's L =
#: L_inst + mean L_pixel.
PRESETS: Mapping[str, Mapping[str, float]] = {
    "nvidia": {"inpainting": 1.0, "rotation": 1.0, "instance": 1.0},
    "instance": {"instance": 1.0},
    "instance_pixel": {"instance": 1.0, "pixel": 1.0},
    "pixpro": {"pixpro": 1.0},
    "all": dict.fromkeys(TASK_NAMES, 1.0),
}
