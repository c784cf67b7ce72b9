# SPDX-License-Identifier: Apache-2.0
"""The sanitizers and drivers catch what is planted in each CPU kernel: a step beyond a tail, a race between jobs."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compiled import compiler_is_missing, execute
from tests.native.kernel_drivers import ADDRESS, THREAD, build, exchanged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler_is_missing() is not None, reason=str(compiler_is_missing())),
]

OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
RACE = "ThreadSanitizer: data race"


@dataclass(frozen=True)
class Planted:
    """A line of csrc and what it is exchanged for; what the checker must say."""

    op: str
    file: str
    old: str
    new: str
    finding: str


BUGS = {
    # --- beyond a tail -----------------------------------------------------------------------------------------
    "attention: a row is copied to one past its end where 3 channels are left": Planted(
        "window_attention",
        "csrc/window_attention/cpu.cpp",
        "for (; c < p_.head_dim; ++c) to[c] = from[c];",
        "for (; c < p_.head_dim + (p_.head_dim % 4 == 3); ++c) to[c] = from[c];",
        OVERFLOW,
    ),
    "attention: one past a row's end is read and dropped where 3 channels are left": Planted(
        "window_attention",
        "csrc/window_attention/cpu.cpp",
        "for (; c < p_.head_dim; ++c) to[c] = from[c];",
        "for (; c < p_.head_dim; ++c) to[c] = from[c];\n"
        "        if (c % 4 == 3) [[maybe_unused]] volatile T beyond = from[c];",
        OVERFLOW,
    ),
    "contrast: the last tile of keys is taken for a whole one": Planted(
        "pixel_contrast",
        "csrc/pixel_contrast/all_pairs.h",
        "const int n = static_cast<int>(std::min<int64_t>(kKeys, key_last - k));",
        "const int n = kKeys;",
        OVERFLOW,
    ),
    "contrast: the last job's rows go on to a whole job's": Planted(
        "pixel_contrast",
        "csrc/pixel_contrast/unit_rows.h",
        "const int64_t end = std::min(n, (job + 1) * kRowsPerJob);",
        "const int64_t end = (job + 1) * kRowsPerJob;",
        OVERFLOW,
    ),
    "NT-Xent: one weight too many is written": Planted(
        "nt_xent",
        "csrc/nt_xent/cpu.cpp",
        "for (int64_t i = 0; i < n; ++i) {",
        "for (int64_t i = 0; i <= n; ++i) {",
        OVERFLOW,
    ),
    "consistency: one sum too many is written": Planted(
        "pixel_consistency",
        "csrc/pixel_consistency/cpu.cpp",
        "for (int64_t i = 0; i < n; ++i) sums[i] =",
        "for (int64_t i = 0; i <= n; ++i) sums[i] =",
        OVERFLOW,
    ),
    "propagation: the last tile of pixels is taken for a whole one": Planted(
        "propagation",
        "csrc/propagation/cpu.cpp",
        "call(sample * p.pixels + i, std::min<int64_t>(kLanes<T>, last - i), (i - first) / kLanes<T>);",
        "call(sample * p.pixels + i, kLanes<T>, (i - first) / kLanes<T>);",
        OVERFLOW,
    ),
    "norm: a chunk's tail is one element longer": Planted(
        "instance_norm",
        "csrc/instance_norm/cpu.cpp",
        "n / lanes_, lanes_, n % lanes_};",
        "n / lanes_, lanes_, n % lanes_ + (n % lanes_ == 3)};",
        OVERFLOW,
    ),
    "gaussian: a line's last register is written whole": Planted(
        "gaussian",
        "csrc/gaussian/rows.h",
        "std::memcpy(out[j] + i, last[j], (n - i) * sizeof(T));",
        "std::memcpy(out[j] + i, last[j], W * sizeof(T));",
        OVERFLOW,
    ),
    "diffusion: a block's last register is read and written whole": Planted(
        "diffusion_step",
        "csrc/diffusion_step/cpu.cpp",
        "whole_ = n % width == 0;",
        "whole_ = n % width == 0 || n % width == 3;",
        OVERFLOW,
    ),
    # --- between jobs ------------------------------------------------------------------------------------------
    "attention: jobs of a head share the sums of its table's gradient": Planted(
        "window_attention",
        "csrc/window_attention/cpu.cpp",
        "grad_table ? table_sums.data() + j * rows : nullptr",
        "grad_table ? table_sums.data() + jobs_[j].head * rows : nullptr",
        RACE,
    ),
    "contrast: all jobs of a turn have the same chunk of keys": Planted(
        "pixel_contrast",
        "csrc/pixel_contrast/all_pairs.h",
        "theirs = (mine + turn) % chunks;",
        "theirs = turn;",
        RACE,
    ),
    "NT-Xent: all jobs of a turn have the same chunk of keys": Planted(
        "nt_xent",
        "csrc/pixel_contrast/all_pairs.h",
        "theirs = (mine + turn) % chunks;",
        "theirs = turn;",
        RACE,
    ),
    "consistency: keys' gradients are added up by query": Planted(
        "pixel_consistency",
        "csrc/pixel_consistency/cpu.cpp",
        "each_pair(keys, queries, radius, p.threads, true, [&](int64_t b, int64_t j, int64_t i) {",
        "each_pair(queries, keys, radius, p.threads, true, [&](int64_t b, int64_t i, int64_t j) {",
        RACE,
    ),
    "propagation: the groups share their scratch": Planted(
        "propagation",
        "csrc/propagation/cpu.cpp",
        "[&](int64_t job, Scratch<T>& s) {",
        "[&](int64_t job, Scratch<T>&) {\n            static Scratch<T> s;",
        RACE,
    ),
    "norm: a plane's chunks share their statistics": Planted(
        "instance_norm",
        "csrc/instance_norm/cpu.cpp",
        "double *mean = stats + chunk * 2 * channels,",
        "double *mean = stats + layout.plane_of(chunk) * 2 * channels,",
        RACE,
    ),
    "gaussian: jobs share the sums of sigma's gradient": Planted(
        "gaussian",
        "csrc/gaussian/cpu.cpp",
        "partial.data() + 3 * job, scratch);",
        "partial.data() + 3 * (job / 2), scratch);",
        RACE,
    ),
    "gaussian: tiles overlap by a column": Planted(
        "gaussian",
        "csrc/gaussian/cpu.cpp",
        "r.x1 = layout.size[2] * (tile + 1) / tiles;",
        "r.x1 = std::min(layout.size[2], layout.size[2] * (tile + 1) / tiles + 1);",
        RACE,
    ),
    "diffusion: jobs overlap by an element": Planted(
        "diffusion_step",
        "csrc/diffusion_step/cpu.cpp",
        "end = std::min(begin + kJob, p.size);",
        "end = std::min(begin + kJob + 1, p.size);",
        RACE,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, tmp_path: Path):
    bug = BUGS[name]
    root = exchanged(tmp_path, bug.file, bug.old, bug.new)
    races = bug.finding == RACE
    driver = build(bug.op, THREAD if races else ADDRESS, "-DMEDACCEL_REGISTER_BYTES=16", root=root)
    result = execute([str(driver), *(["races"] if races else [])])
    assert (result.finding or "nothing was found").startswith(bug.finding), result.output[-2000:]
