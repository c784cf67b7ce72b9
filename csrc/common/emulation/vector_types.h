// SPDX-License-Identifier: Apache-2.0
// CUDA's vector types, with CUDA's alignments: a vector load through a misaligned pointer is what UBSan
// reports.
#pragma once

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define MEDACCEL_EMU_VECTOR_2(type, name, alignment) \
    struct alignas(alignment) name {                 \
        type x, y;                                   \
    };                                               \
    inline name make_##name(type x, type y) { return {x, y}; }

#define MEDACCEL_EMU_VECTOR_3(type, name) \
    struct name {                         \
        type x, y, z;                     \
    };                                    \
    inline name make_##name(type x, type y, type z) { return {x, y, z}; }

#define MEDACCEL_EMU_VECTOR_4(type, name, alignment) \
    struct alignas(alignment) name {                 \
        type x, y, z, w;                             \
    };                                               \
    inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

MEDACCEL_EMU_VECTOR_2(float, float2, 8)
MEDACCEL_EMU_VECTOR_3(float, float3)
MEDACCEL_EMU_VECTOR_4(float, float4, 16)
MEDACCEL_EMU_VECTOR_2(double, double2, 16)
MEDACCEL_EMU_VECTOR_2(int, int2, 8)
MEDACCEL_EMU_VECTOR_3(int, int3)
MEDACCEL_EMU_VECTOR_4(int, int4, 16)
MEDACCEL_EMU_VECTOR_2(unsigned, uint2, 8)
MEDACCEL_EMU_VECTOR_3(unsigned, uint3)
MEDACCEL_EMU_VECTOR_4(unsigned, uint4, 16)
MEDACCEL_EMU_VECTOR_2(unsigned short, ushort2, 4)
MEDACCEL_EMU_VECTOR_4(unsigned short, ushort4, 8)
MEDACCEL_EMU_VECTOR_2(long long, longlong2, 16)

#undef MEDACCEL_EMU_VECTOR_2
#undef MEDACCEL_EMU_VECTOR_3
#undef MEDACCEL_EMU_VECTOR_4
