// SPDX-License-Identifier: Apache-2.0
// How the norm's GPU kernels share a tensor out, and how a block adds up. Part of cuda.cu.
//
// Memory is a number of planes: (sample, channel) in contiguous tensors, a sample in channels-last ones. A plane is
// cut into chunks of voxels, a block does a chunk. Its threads stand in rows and columns: channels last, a column is
// a vector of channels and a row a voxel; contiguous, there is one column, and a row is a vector of voxels. Either
// way a lane of a thread's vectors is one channel's in all of its items, and neighbouring threads read neighbouring
// memory.
#pragma once

#include <algorithm>
#include <climits>
#include <stdexcept>

#include "../common/cuda_portable.h"
#include "../common/cuda_storage.h"
#include "../common/shapes.h"
#include "cuda.h"

namespace medaccel::instance_norm {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

// A block reads 64 KiB in about 3 µs, which is what the two further launches of a shared instance cost.
constexpr int64_t kOneLaunch = 64 << 10;  // bytes of the input
// Channels that one block does then, as bytes: whole sectors of the cache, and few enough that there are many blocks.
constexpr int64_t kGroupBytes = 64;
// Else so many blocks, about four for each that a large GPU runs at a time, of a size within these limits: smaller
// ones spend their time on their sums, and in larger ones a thread's own sum of floats would become long.
constexpr int64_t kBlocks = 2048, kLeastChunk = 16 << 10, kLargestChunk = 256 << 10;  // bytes
constexpr int64_t kStep = 16;  // a chunk's voxels are a multiple: whole vectors

struct Plan {
    bool last;
    int64_t channels, voxels;
    int64_t planes, step, chunks;  // step: voxels of a chunk
    int columns, groups;           // of vectors in a block; blocks side by side
    int pitch;                     // elements from an item of a thread's column to the next
};

template <class T>
struct Pair {
    T a, b;
};
using Partial = Pair<double>;

inline int64_t bytes_of(Storage storage) {
    return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

// `width`: elements of a vector. What a chunk is does not depend on it.
inline Plan plan_of(const GpuProblem& g, int width) {
    const Problem& p = g.problem;
    const int64_t size = bytes_of(g.storage);
    Plan plan{p.channels_last,
              p.channels,
              p.voxels,
              p.channels_last ? p.batch : p.batch * p.channels,
              p.voxels,
              1,
              1,
              1,
              width};
    if (in_one_launch(g)) {
        if (plan.last) plan.columns = static_cast<int>(std::min(kGroupBytes / size, p.channels) / width);
    } else {
        const int64_t plane = p.voxels * size * (plan.last ? p.channels : 1);
        const int64_t chunk = std::clamp(plan.planes * plane / kBlocks, kLeastChunk, kLargestChunk);
        plan.step = ceil_div(ceil_div(p.voxels, ceil_div(plane, chunk)), kStep) * kStep;
        plan.chunks = ceil_div(p.voxels, plan.step);
        if (plan.last) plan.columns = static_cast<int>(std::min<int64_t>(p.channels / width, kThreads));
    }
    if (plan.last) {
        plan.groups = static_cast<int>(ceil_div(p.channels / width, plan.columns));
        plan.pitch = static_cast<int>(p.channels);
    }
    return plan;
}

inline unsigned blocks_of(const Plan& plan) {
    const int64_t blocks = plan.planes * plan.groups * plan.chunks;
    if (blocks > INT_MAX)
        throw std::invalid_argument("instance_norm_act: input has " + std::to_string(plan.planes) +
                                    " instances; expected fewer");
    return static_cast<unsigned>(blocks);
}

// Within a chunk, offsets are 32-bit numbers; `pitch` is the widest of the tensors'.
inline void check_offsets(const Plan& plan, int64_t pitch) {
    if (plan.last && (plan.step + kThreads * 4) * pitch > INT_MAX)
        throw std::invalid_argument("instance_norm_act: input has " + std::to_string(plan.channels) +
                                    " channels; expected fewer");
}

// One block's share, and this thread's part in it.
struct Block {
    int64_t plane, chunk;
    int64_t begin;         // the chunk's first voxel
    int64_t column;        // among the plane's
    int64_t place;         // this thread's element of item 0, within the plane
    int row, rows, items;  // a thread has the items row, row + rows, … below `end`
    int end;               // 0 for an idle thread
    int seat;              // this thread's column, among the block's
    bool idle;             // threads that don't fill a row, columns beyond the last

    template <int N>
    static __device__ Block of(const Plan& plan) {
        Block b;
        int64_t block = blockIdx.x;
        b.chunk = block % plan.chunks;
        block /= plan.chunks;
        const int group = static_cast<int>(block % plan.groups);
        b.plane = block / plan.groups;
        b.begin = b.chunk * plan.step;
        const int voxels = static_cast<int>(min(plan.step, plan.voxels - b.begin));
        b.items = plan.last ? voxels : voxels / N;
        b.rows = kThreads / plan.columns;
        b.row = static_cast<int>(threadIdx.x) / plan.columns;
        b.seat = static_cast<int>(threadIdx.x) - b.row * plan.columns;
        b.column = static_cast<int64_t>(group) * plan.columns + b.seat;
        b.idle = b.row >= b.rows || (plan.last && b.column * N >= plan.channels);
        b.end = b.idle ? 0 : b.items;
        b.place = plan.last ? b.begin * plan.channels + b.column * N : b.begin;
        return b;
    }
    // The number of items that the threads of a row have.
    __device__ int items_of(int of_row) const { return items / rows + (of_row < items % rows); }
    __device__ bool has(int item) const { return item < end; }
    // [batch][channels] and [channels] of a lane.
    template <int N>
    __device__ int64_t instance(const Plan& plan, int lane) const {
        return plan.last ? plane * plan.channels + column * N + lane : plane;
    }
    template <int N>
    __device__ int64_t channel(const Plan& plan, int lane) const {
        return plan.last ? column * N + lane : plane % plan.channels;
    }
};

// --- vectors ---------------------------------------------------------------------------------------------------
// N elements as they lie in memory: two to a register, where they are half as large.
template <class S, int N>
struct Vector {
    static_assert(sizeof(S) * N == kVectorBytes && sizeof(S) <= 4);
    unsigned words[4];

    static __device__ Vector at(const S* from) {
        const uint4 w = *reinterpret_cast<const uint4*>(from);
        return {{w.x, w.y, w.z, w.w}};
    }
    __device__ void store(S* to) const {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    __device__ auto operator[](int lane) const {
        S element;
        if constexpr (sizeof(S) == 4) {
            memcpy(&element, &words[lane], 4);
        } else {
            const auto half = static_cast<unsigned short>(lane % 2 ? words[lane / 2] >> 16 : words[lane / 2]);
            memcpy(&element, &half, 2);
        }
        return to_compute(element);
    }
    // Lanes are set in their order: the first of a word writes all of it.
    __device__ void set(int lane, float value) {
        const S element = to_storage<S>(value);
        if constexpr (sizeof(S) == 4) {
            memcpy(&words[lane], &element, 4);
        } else {
            unsigned short half;
            memcpy(&half, &element, 2);
            unsigned& word = words[lane / 2];
            word = lane % 2 ? (word & 0xffffu) | static_cast<unsigned>(half) << 16 : half;
        }
    }
};
template <class S>
struct Vector<S, 1> {
    S element;

    static __device__ Vector at(const S* from) { return {*from}; }
    __device__ void store(S* to) const { *to = element; }
    __device__ auto operator[](int) const { return to_compute(element); }
    template <class T>
    __device__ void set(int, T value) {
        element = to_storage<S>(value);
    }
};

// Reads the items i, i + rows, … of a thread, as far as there are any, all before the first is used.
template <int kBatch, class S, int N>
__device__ inline void load(const S* from, int pitch, const Block& b, int i, Vector<S, N> (&to)[kBatch]) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
        if (b.has(i + u * b.rows)) to[u] = Vector<S, N>::at(from + (i + u * b.rows) * pitch);
}

// visit(first item) for a thread's batches. The last pass goes backwards: what the pass before read last, the
// second-level cache still has.
template <int kBatch, class Visit>
__device__ inline void forwards(const Block& b, const Visit& visit) {
    for (int i = b.row; i < b.end; i += kBatch * b.rows) visit(i);
}
template <int kBatch, class Visit>
__device__ inline void backwards(const Block& b, const Visit& visit) {
    const int step = kBatch * b.rows;
    for (int i = b.row + (b.end - 1) / step * step; i >= 0; i -= step) visit(i);
}

// --- sums over a block -------------------------------------------------------------------------------------------
// A thread's results lie in shared memory: [row][seat][lane].
template <int N>
__device__ inline int entry_of(const Plan& plan, const Block& b, int lane) {
    return (b.row * plan.columns + b.seat) * N + lane;
}

// Adds up over `group` neighbouring lanes of a warp, a power of two; each gets the sum.
__device__ inline double sum_of_group(double value, int group) {
    for (int other = group / 2; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
    return value;
}

// A channel's entries: every stride-th from `first` on.
struct Entries {
    int first, stride, count;
};

// Calls finish(lane among the plane's channels, value) for each channel of the block; value = combine(entries, lane
// in the group, group) of the group of threads that adds it up.
template <int N, class Combine, class Finish>
__device__ inline void each_channel(const Plan& plan, const Block& b, const Combine& combine, const Finish& finish) {
    const int channels = plan.last ? plan.columns * N : 1;
    const int64_t first = plan.last ? (b.column - b.seat) * N : 0;  // among the plane's
    int group = 32;
    while (group > 1 && group * channels > kThreads) group /= 2;
    const int lane = static_cast<int>(threadIdx.x) % group;
    for (int from = 0; from < channels; from += kThreads / group) {
        const int k = from + static_cast<int>(threadIdx.x) / group;
        const bool there = k < channels && (!plan.last || first + k < plan.channels);
        // Threads without a channel take part in the warp's exchanges.
        const Entries e =
            plan.last ? Entries{k, channels, there ? b.rows : 0} : Entries{0, 1, there ? b.rows * N : 0};
        const Partial value = combine(e, lane, group);
        if (there && lane == 0) finish(first + k, value);
    }
}

// Mean and Σ (x − mean)² of a number of parts, without a division for each: n(i), mean and squares of part i.
template <class Count, class At>
__device__ inline Partial merged(int count, int lane, int group, const Count& n, const At& at) {
    double total = 0, sum = 0, squares = 0;
    for (int i = lane; i < count; i += group) {
        total += n(i);
        sum = fma(static_cast<double>(n(i)), at(i).a, sum);
    }
    const double mean = sum_of_group(sum, group) / sum_of_group(total, group);
    for (int i = lane; i < count; i += group) {
        const Partial part = at(i);
        const double d = part.a - mean;
        squares += fma(static_cast<double>(n(i)) * d, d, part.b);
    }
    return {mean, sum_of_group(squares, group)};
}

// The sums of both numbers of the parts.
template <class At>
__device__ inline Partial added(int count, int lane, int group, const At& at) {
    Partial sum{0, 0};
    for (int i = lane; i < count; i += group) {
        const Partial part = at(i);
        sum.a += part.a;
        sum.b += part.b;
    }
    return {sum_of_group(sum.a, group), sum_of_group(sum.b, group)};
}

}  // namespace
}  // namespace medaccel::instance_norm
