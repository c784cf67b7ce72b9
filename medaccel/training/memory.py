# SPDX-License-Identifier: Apache-2.0
"""Estimates how much memory a pipeline needs: it is stated before the start, and refused if it can't fit.

Estimates are rough, within a factor of about two: only the large things are counted (a network's activations, a cache
of scans, the logits of all classes), with bytes per voxel that were measured once.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

#: If this environment variable is 1, nothing is refused for its memory.
IGNORE = "MEDACCEL_IGNORE_MEMORY"
#: Python needs so many bytes with torch, MONAI and Lightning, before any work.
BASE = 600e6
_GIB = 2**30
# These are bytes per voxel of a batch, measured on a CPU in fp32: in training with the gradients, without, and for
# each of the network's channels at full resolution.
_SWIN_TRAINING, _SWIN_TRAINING_CHANNEL = 920.0, 68.0
_SWIN_WINDOW, _SWIN_WINDOW_CHANNEL = 110.0, 45.0
_UNET_TRAINING_CHANNEL, _UNET_WINDOW_CHANNEL = 240.0, 66.0
# A class's logits need so much, with softmax, loss and gradients in training.
_CLASS_TRAINING, _CLASS_WINDOW = 40.0, 8.0
# A Swin UNETR has so many parameters at feature_size 1 (they grow with its square), and so many bytes for each in
# training.
_SWIN_PARAMETERS, _TRAINED = 28e3, 20
# Sums of windows may take this share of a GPU's free memory: the next window's network needs the rest.
_SUMS_SHARE = 0.5


@dataclass(frozen=True)
class Part:
    """Describes one of the things that need memory at the same time.

    Args:
        name: the thing in words.
        bytes: how much it needs.
        reduce: what to change if that is too much.
        network: True if it lies on the GPU of a machine that has one.
    """

    name: str
    bytes: float
    reduce: str
    network: bool = False


def swin_unetr(
    roi_size: Sequence[int], batch: float, feature_size: int, *, training: bool, classes: int = 1
) -> list[Part]:
    """Estimates the memory of a Swin UNETR for a batch of windows of `roi_size` voxels."""
    fixed, channel = (_SWIN_TRAINING, _SWIN_TRAINING_CHANNEL) if training else (_SWIN_WINDOW, _SWIN_WINDOW_CHANNEL)
    a_voxel = fixed + channel * feature_size + (_CLASS_TRAINING if training else _CLASS_WINDOW) * classes
    weights = _SWIN_PARAMETERS * feature_size**2 * (_TRAINED if training else 4)
    return [_activations(roi_size, batch, a_voxel, "feature_size", training), _weights(weights, "feature_size")]


def diffusion_unet(
    roi_size: Sequence[int], batch: float, channels: Sequence[int], shuffle: int, *, training: bool
) -> list[Part]:
    """Estimates the memory of the diffusion methods' U-Net for a batch of windows of `roi_size` voxels."""
    full = sum(count / 8**level for level, count in enumerate(channels)) / shuffle**3
    a_voxel = (_UNET_TRAINING_CHANNEL if training else _UNET_WINDOW_CHANNEL) * full
    # The way down has two residual blocks of two 3³ convolutions, the way up three.
    weights = sum(5 * 2 * 27 * count**2 for count in channels) * (_TRAINED if training else 4)
    return [_activations(roi_size, batch, a_voxel, "channels", training), _weights(weights, "channels")]


def _activations(roi_size: Sequence[int], batch: float, a_voxel: float, width: str, training: bool) -> Part:
    size = " × ".join(str(n) for n in roi_size)
    return Part(
        f"the network's work on {batch:g} × {size} voxels",
        prod(roi_size) * batch * a_voxel,
        f"reduce {'batch_size' if training else 'sw_batch_size'}, roi_size or {width}",
        network=True,
    )


def _weights(size: float, width: str) -> Part:
    return Part("the network's weights", size, f"reduce {width}", network=True)


class Expected(NamedTuple):
    """Holds the result of `expect`.

    Args:
        bytes: host memory that all processes together need.
        sentence: this need in words, beside the free memory.
    """

    bytes: float
    sentence: str


def expect(what: str, *stages: Iterable[Part], gpu: bool = False, processes: int = 1) -> Expected:
    """Adds up the greatest need, and refuses one that can't fit.

    Args:
        what: the thing that needs the memory; the sentence begins with it.
        stages: parts that need memory at the same time; stages follow one another.
        gpu: whether networks are computed on the current CUDA device.
        processes: number of processes on this machine that need that much each.

    Raises:
        ValueError: more is expected than is free, and MEDACCEL_IGNORE_MEMORY is not 1.
    """
    parts = [list(stage) for stage in stages] or [[]]
    host = [[part for part in stage if not (gpu and part.network)] for stage in parts]
    most = max(host, key=_total)
    expected = (BASE + _total(most)) * processes
    free = free_memory()
    sentence = f"{what} expects about {_gib(expected)} of memory"
    if free is not None:
        sentence += f"; {_gib(free)} are free"
        _refuse(what, expected, expected - resident(), free, "memory", most)
    if gpu:
        there = max(([part for part in stage if part.network] for stage in parts), key=_total)
        import torch

        free_there = torch.cuda.mem_get_info()[0]
        sentence += f", and {_gib(_total(there))} of the GPU's, of which {_gib(free_there)} are free"
        _refuse(what, _total(there), _total(there), free_there, "GPU memory", there)
    return Expected(expected, sentence)


def place_of_sums(device: torch.device, size: float) -> tuple[torch.device, str]:
    """Chooses where sums of a network's windows lie: on its GPU if they fit beside its work, else on the CPU.

    Sums on the CPU cost a copy of every window's result, for which the GPU waits.

    Args:
        device: where the network computes.
        size: bytes of the sums.

    Returns:
        The device, and the choice in words.
    """
    import torch

    cpu = torch.device("cpu")
    if device.type != "cuda":
        return cpu, "windows are added up on the CPU"
    free = torch.cuda.mem_get_info(device)[0]
    fits = size <= _SUMS_SHARE * free
    reason = f"{_gib(size)} of {device}'s {_gib(free)} free"
    if fits:
        return device, f"windows are added up on {device} ({reason})"
    return cpu, f"windows are added up on the CPU (it would take {reason})"


def _refuse(what: str, expected: float, more: float, free: float, kind: str, parts: Sequence[Part]) -> None:
    if more <= free or os.environ.get(IGNORE) == "1":
        return
    remedy = ""
    if parts:
        largest = max(parts, key=lambda part: part.bytes)
        remedy = f"; {_gib(largest.bytes)} are for {largest.name}: {largest.reduce}"
    raise ValueError(
        f"{what} expects about {_gib(expected)} of {kind}, but {_gib(free)} are free{remedy} "
        f"({IGNORE}=1 tries it anyway)"
    )


def _total(parts: Iterable[Part]) -> float:
    return sum(part.bytes for part in parts)


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def local_processes() -> int:
    """Returns how many processes torchrun has started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def resident() -> int:
    """Returns the bytes of memory that this process has now; 0 if the system doesn't say."""
    return _status("VmRSS") or 0


def free_memory() -> int | None:
    """Returns the bytes that this process can still get, by the free memory, its control groups and its limits; None
    if unknown."""
    found = [_meminfo("MemAvailable"), _group_memory(), _address_space()]
    known = [value for value in found if value is not None]
    return max(min(known), 0) if known else None


def _meminfo(key: str) -> int | None:
    return _kilobytes(Path("/proc/meminfo"), key)


def _status(key: str) -> int | None:
    return _kilobytes(Path("/proc/self/status"), key)


def _kilobytes(path: Path, key: str) -> int | None:
    for line in _lines(path):
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _address_space() -> int | None:
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], _status("VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else limit - used


def _group_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Returns the bytes that the tightest of this process's control groups leaves, of either version."""
    left = []
    for line in _lines(membership):
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, limit, usage, stat = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage, stat = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        folder = top / group.strip("/")
        # In a container the group's path may be the host's, of which the container sees only the end.
        for at in (folder, *folder.parents):
            known = [_number(at / name) for name in (limit, usage)]
            if known[0] is not None and known[1] is not None:
                # Cached files give way to new allocations.
                cached = next((int(s.split()[1]) for s in _lines(at / "memory.stat") if s.split()[0] == stat), 0)
                left.append(known[0] - known[1] + cached)
            if at == top:
                break
    return min(left) if left else None


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None  # "max": no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
