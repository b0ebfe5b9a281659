/* Elements of any type as floats, and back. The including file sets the target (at least AVX2, FMA and F16C). No torch,
 * no Python.
 */
#ifndef MQ_ELEMENTS_H
#define MQ_ELEMENTS_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t size_of(int type) { return type == MQ_F32 ? 4 : 2; }

/* Element `at` of an array of any type, as float. */
INLINE float load1(const void *from, int type, int64_t at) {
    if (type == MQ_F32) return ((const float *)from)[at];
    uint16_t h = ((const uint16_t *)from)[at];
    if (type == MQ_F16) return _cvtsh_ss(h);
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)((uint32_t)h << 16))));
}

/* Elements `at` to `at` + 7. */
INLINE __m256 load8(const void *from, int type, int64_t at) {
    if (type == MQ_F32) return _mm256_loadu_ps((const float *)from + at);
    __m128i h = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
    if (type == MQ_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* Rounds to nearest, halves to even. */
INLINE void store1(void *to, int type, int64_t at, float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    if (type == MQ_F32)
        ((float *)to)[at] = v;
    else if (type == MQ_F16)
        ((uint16_t *)to)[at] = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
    else
        ((uint16_t *)to)[at] = v != v ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

#endif
