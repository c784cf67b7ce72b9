# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.gpu_prediction [--write]` predicts a training step of Swin UNETR on an H100, and writes the docs.

A *prediction*: nothing here ran on a GPU. MONAI's step is run on fake tensors, under autocast, which counts every
operation, its bytes and its FLOPs; times follow from these counts at the efficiencies stated in `Assumptions`. The
attention's instructions per score are gates of the project (`INSTRUCTIONS`).
"""

from __future__ import annotations

import collections
import functools
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tests.gpu_gates import GATES

DOCS = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
MARKS = "<!-- prediction: made by tests/gpu_prediction.py -->\n", "<!-- /prediction -->"

PASSES = ("forward_kernel", "query_kernel", "key_kernel", "bias_kernel")
# Thread-instructions per score, bf16, D = 16, by pass: the gates of the compiled kernels.
INSTRUCTIONS = {
    name: tuple(
        gate.instructions
        for kernel in PASSES
        for gate in GATES
        if (gate.call, gate.kernel, gate.shifted) == ("swin_unetr 48 bfloat16", kernel, shifted)
    )
    for name, shifted in (("shifted", True), ("not shifted", False))
}
TILE = 64  # scores are computed in tiles of 64 × 64, those beyond a window's tokens too


@dataclass(frozen=True)
class Assumptions:
    """Holds what the counts are divided by."""

    bytes_per_s: float = 3.0e12  # the data sheet has 3.35e12
    lanes_per_s: float = 132 * 128 * 1.755e9  # thread-instructions: multiprocessors · lanes · clock
    issue: float = 0.45  # share of them that attention kernels issue
    flops: float = 989e12  # dense bf16
    convolution_share: float = 0.10  # cuDNN, NCDHW, 3-D, few channels: 15–20 ms in all
    channels_last_share: float = 0.20  # the same, NDHWC
    product_share: float = 0.40  # linear layers; their bytes count if they take longer
    kernel_us: float = 3.0  # the least time of a kernel
    # torch's instance norm has one CTA a channel, which draws this many multiprocessors' share of the bandwidth.
    norm_share: float = 1.0
    # Products on rows of 343 elements, which are not aligned to 16 bytes, take so many times their bytes.
    odd_rows: float = 2.0
    fused_windows: float = 0.5  # torch.compile: share of the bytes that rolling, padding and cutting move
    fused_rest: float = 0.67  # torch.compile: share of the bytes of layer norms, GELU, residuals, casts


@dataclass
class Count:
    """Holds one operation's calls of one shape: their number, bytes and FLOPs together."""

    name: str
    shape: tuple[int, ...]
    channels: int
    calls: int = 0
    bytes: float = 0.0
    flops: float = 0.0


_FREE = ("_unsafe_view", "new_empty", "new_empty_strided", "empty", "empty_like", "empty_strided", "detach")


class _Counter(TorchDispatchMode):
    """Counts every operation that a GPU would launch a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[str, tuple[int, ...]], Count] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if function.namespace != "aten" or is_view or name in _FREE:
            return result
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if not tensors:
            return result
        largest = max(tensors, key=Tensor.numel)
        moved = sum(t.numel() * t.element_size() for t in tensors)
        # Both read their inputs twice: for the sums, and for the result.
        if name == "native_batch_norm":
            moved += args[0].numel() * args[0].element_size()
        if name == "native_batch_norm_backward":
            moved += sum(t.numel() * t.element_size() for t in args[:2])
        shape = tuple(largest.shape)
        channels = shape[1] if len(shape) > 1 else 1
        count = self.counts.setdefault((name, shape), Count(name, shape, channels))
        count.calls += 1
        count.bytes += moved
        if formula := flop_registry.get(function._overloadpacket):
            count.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


@functools.cache
def counted(features: int = 48, size: int = 96) -> tuple[list[Count], int]:
    """Returns the counts of MONAI's training step under bf16 autocast, and the number of parameters."""
    from monai.networks.nets import SwinUNETR
    from torch._subclasses.fake_tensor import FakeTensorMode

    net = SwinUNETR(1, 2, feature_size=features)
    parameters = sum(p.numel() for p in net.parameters())
    with FakeTensorMode():
        for module in net.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(p.shape))
            for name, b in list(module._buffers.items()):
                if b is not None:
                    module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
        x = torch.empty(1, 1, size, size, size)
        with _Counter() as counter:
            with torch.autocast("cpu", torch.bfloat16):
                y = net(x)
            y.float().sum().backward()
    return list(counter.counts.values()), parameters


def kind(count: Count) -> str:
    """Returns the part of the network that an operation belongs to."""
    name, shape = count.name, count.shape
    if name.startswith("convolution"):
        return "convolutions"
    if len(shape) >= 3 and shape[-1] == shape[-2] and shape[-1] in (343, 216):
        return "scores"
    if "batch_norm" in name or "leaky_relu" in name or name in ("add_", "copy_") or shape[2:] == (96, 96, 96):
        return "norms and activations"
    if name in ("mm", "addmm", "bmm"):
        return "linear layers"
    if len(shape) > 5 or name in ("roll", "constant_pad_nd", "slice_backward", "select_backward", "clone", "index"):
        return "windows"
    return "rest"


# --- times in ms -------------------------------------------------------------------------------------------------
def _traffic(count: Count, a: Assumptions, factor: float = 1.0) -> float:
    return 1e3 * max(factor * count.bytes / a.bytes_per_s, count.calls * a.kernel_us * 1e-6)


def _eager(count: Count, a: Assumptions) -> float:
    part = kind(count)
    if part == "convolutions":
        return max(1e3 * count.flops / (a.convolution_share * a.flops), _traffic(count, a))
    if part == "linear layers":
        return max(1e3 * count.flops / (a.product_share * a.flops), _traffic(count, a))
    if part == "scores":
        return _traffic(count, a, a.odd_rows if count.name == "bmm" else 1.0)
    if "batch_norm" in count.name:
        return _traffic(count, a) / min(1.0, a.norm_share * count.channels / 132)
    return _traffic(count, a)


def windows(features: int = 48, size: int = 96) -> list[tuple[int, int]]:
    """Returns the windows times heads and the tokens of each stage's two blocks."""
    found = []
    for stage, heads in enumerate((3, 6, 12, 24)):
        side = size // 2 // 2**stage
        window = min(7, side)
        found.append((math.ceil(side / window) ** 3 * heads, window**3))
    return found


def attention_ms(
    a: Assumptions, instructions: Mapping[str, tuple[float, ...]] = INSTRUCTIONS, size: int = 96
) -> float:
    """Returns the time of all attention kernels, forward and backward, from instructions per score."""
    total = 0.0
    for count, tokens in windows(size=size):
        padded = math.ceil(tokens / TILE) * TILE
        # The second block of a stage is shifted, unless one window holds the map.
        shifted = "shifted" if tokens == 343 and count > 24 else "not shifted"
        total += count * padded**2 * (sum(instructions["not shifted"]) + sum(instructions[shifted]))
    return 1e3 * total / (a.lanes_per_s * a.issue)


def predict(
    a: Assumptions | None = None, instructions: Mapping[str, tuple[float, ...]] = INSTRUCTIONS
) -> dict[str, dict[str, float]]:
    """Returns the milliseconds of each part of a training step, for each contender."""
    a = a or Assumptions()
    counts, parameters = counted()
    eager: dict[str, float] = collections.defaultdict(float)
    traffic: dict[str, float] = collections.defaultdict(float)
    flops: dict[str, float] = collections.defaultdict(float)
    norms = 0.0
    for count in counts:
        eager[kind(count)] += _eager(count, a)
        traffic[kind(count)] += 1e3 * count.bytes / a.bytes_per_s
        flops[kind(count)] += count.flops
        if count.name == "native_batch_norm":
            norms += count.calls * math.prod(count.shape) * 2  # bytes of one pass in bf16
    # Forward: x twice, the result; backward: x and the gradient twice each, the result. Ten of the 26 norms have a
    # residual besides, read forward and written backward; counted for all.
    fused_norms = 1e3 * (3 + 5 + 2) * norms / a.bytes_per_s
    optimizer = 1e3 * 7 * 4 * parameters / a.bytes_per_s
    scores = 2 * sum(count * tokens**2 for count, tokens in windows())
    # Six passes of softmax and bias, six of products, in bf16.
    compiled_scores = 1e3 * scores * 2 * (6 + 6 * a.odd_rows) / a.bytes_per_s
    layout = 8 * 2 * 2 * a.kernel_us * 1e-3  # two small kernels a block and direction
    common = {"linear layers": eager["linear layers"], "optimizer": optimizer}
    convolutions = eager["convolutions"]
    last = convolutions * a.convolution_share / a.channels_last_share
    ours = {
        "scores": attention_ms(a, instructions) + layout, "norms and activations": fused_norms, "windows": 0.0,
        "rest": eager["rest"],
    }  # fmt: skip
    return {
        "MONAI eager": {**dict(eager), **common},
        "torch.compile(MONAI)": {
            "convolutions": convolutions, "scores": compiled_scores, "norms and activations": fused_norms,
            "windows": a.fused_windows * traffic["windows"], "rest": a.fused_rest * traffic["rest"], **common,
        },
        "accelerated": {"convolutions": convolutions, **ours, **common},
        "accelerated, compiled": {
            "convolutions": convolutions, **ours, "rest": a.fused_rest * traffic["rest"], **common,
        },
        "accelerated, channels-last convolutions": {"convolutions": last, **ours, **common},
    }  # fmt: skip


PARTS = (
    *("convolutions", "scores", "norms and activations", "linear layers", "windows", "rest", "optimizer"),
)  # fmt: skip


def total(parts: Mapping[str, float]) -> float:
    """Returns the milliseconds of a step."""
    return sum(parts[part] for part in PARTS)


def share(a: Assumptions, contender: str = "accelerated, channels-last convolutions") -> float:
    """Returns a contender's step as a share of MONAI eager's."""
    predicted = predict(a)
    return total(predicted[contender]) / total(predicted["MONAI eager"])


def worst_share(factor: float = 1.5) -> tuple[float, str]:
    """Returns the largest share that one assumption makes by being off by a factor, and its name."""
    found = []
    for field in fields(Assumptions):
        for scale in (factor, 1 / factor):
            found.append(
                (
                    share(replace(Assumptions(), **{field.name: getattr(Assumptions(), field.name) * scale})),
                    field.name,
                )
            )
    return max(found)


def table(a: Assumptions | None = None) -> str:
    """Returns the docs' tables: the counts, the assumptions and the predicted times."""
    a = a or Assumptions()
    counts, parameters = counted()
    predicted = predict(a)
    lines = ["| part | operations | GB | TFLOP |", "|---|---:|---:|---:|"]
    for part in PARTS[:-1]:
        mine = [c for c in counts if kind(c) == part]
        calls, moved, flops = (sum(getattr(c, key) for c in mine) for key in ("calls", "bytes", "flops"))
        lines.append(f"| {part} | {calls} | {moved / 1e9:.1f} | {flops / 1e12:.2f} |")
    lines += [f"| optimizer | – | {28 * parameters / 1e9:.1f} | – |", ""]
    lines += ["| assumed | value |", "|---|---:|"]
    lines += [f"| {field.name} | {getattr(a, field.name):.4g} |" for field in fields(a)]
    for name, passes in INSTRUCTIONS.items():
        lines.append(f"| instructions per score, {name} | {' / '.join(map(str, passes))} |")
    names = list(predicted)
    lines += ["", "| predicted ms | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for part in PARTS:
        lines.append(f"| {part} | " + " | ".join(f"{predicted[name][part]:.1f}" for name in names) + " |")
    sums = [total(predicted[name]) for name in names]
    lines.append("| **step** | " + " | ".join(f"**{value:.1f}**" for value in sums) + " |")
    lines.append("| × MONAI eager | " + " | ".join(f"{value / sums[0]:.2f}" for value in sums) + " |")
    worst, name = worst_share()
    lines += [
        "",
        f"With channels-last convolutions the share is {worst:.2f} at most where any one assumption is off by 1.5",
    ]
    lines[-1] += f" ({name})."
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Prints the tables, or writes them into the docs."""
    made = table()
    if argv != ["--write"]:
        print(made)
        return 0
    text = DOCS.read_text(encoding="utf-8")
    pattern = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    DOCS.write_text(re.sub(pattern, MARKS[0] + made + MARKS[1], text, flags=re.DOTALL), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
