// SPDX-License-Identifier: Apache-2.0
// How the kernel walks a tensor: which axis is the line, and which are the two that rows are combined along.
#pragma once

#include <cstdint>
#include <utility>

#include "../common/shapes.h"

namespace medaccel::gaussian {

// Spatial axes in the kernel's order 0 = z (slowest), 1 = y, 2 = x (the line). A line holds `lanes`
// interleaved channels: 1 for contiguous tensors, C for channels-last ones, whose x-neighbours are C elements
// apart.
struct Layout {
    int64_t outer[2] = {1, 1};  // batch and channel (1 where the channels are lanes)
    int64_t in_outer[2] = {0, 0}, out_outer[2] = {0, 0};
    int64_t size[3] = {1, 1, 1};
    int64_t in_stride[3] = {0, 0, 0}, out_stride[3] = {0, 0, 0};
    int64_t lanes = 1;
    int axis[3] = {-1, -1, -1};  // the tensor's spatial axis; −1: none
};

// False where no axis is dense in both tensors.
inline bool make_layout(const Shape& shape, const Shape& in, const Shape& out, Layout& layout) {
    const int spatial = static_cast<int>(shape.size()) - 2;
    const auto runs_along = [&](int a, int64_t step) { return in[a + 2] == step && out[a + 2] == step; };
    const int64_t channels = shape[1];
    const bool interleaved = channels > 1 && in[1] == 1 && out[1] == 1;
    int line = -1;
    bool all_single = true;
    for (int a = spatial - 1; a >= 0; --a) {
        if (shape[a + 2] == 1) continue;  // its stride says nothing
        all_single = false;
        if (line < 0 && runs_along(a, 1)) line = a, layout.lanes = 1;
        if (line < 0 && interleaved && runs_along(a, channels)) line = a, layout.lanes = channels;
    }
    if (all_single) line = spatial - 1;
    if (line < 0) return false;

    layout.outer[0] = shape[0];
    layout.in_outer[0] = in[0];
    layout.out_outer[0] = out[0];
    if (layout.lanes == 1) {
        layout.outer[1] = channels;
        layout.in_outer[1] = in[1];
        layout.out_outer[1] = out[1];
    }
    const auto put = [&](int where, int a) {
        layout.axis[where] = a;
        layout.size[where] = shape[a + 2];
        layout.in_stride[where] = in[a + 2];
        layout.out_stride[where] = out[a + 2];
    };
    put(2, line);
    int rest[2], n = 0;
    for (int a = 0; a < spatial; ++a)
        if (a != line) rest[n++] = a;
    if (n == 2 && in[rest[0] + 2] < in[rest[1] + 2]) std::swap(rest[0], rest[1]);
    for (int i = 0; i < n; ++i) put(i, rest[i]);  // a single other axis becomes z: blocks of z are the parallel jobs
    return true;
}

}  // namespace medaccel::gaussian
