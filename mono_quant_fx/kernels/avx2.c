/* int4_linear and int8_linear in fp32 with AVX2 and FMA. */
#pragma GCC target("avx2,fma,f16c")
#define LANES 8
#define V(name) _mm256_##name
#include <immintrin.h>
#include <stdint.h>

typedef __m256 vec;
typedef __m256i ivec;
static inline ivec load_ints(const void *p) { return _mm256_loadu_si256(p); }
static inline ivec load_some(const void *p, int n) {
    const ivec lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_maskload_epi32(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
static inline vec load_codes(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline vec permute(ivec at, vec values) { return _mm256_permutevar8x32_ps(values, at); }
static inline vec gather(ivec at, const float *values) { return _mm256_i32gather_ps(values, at, 4); }
static inline float sum(vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

/* The code's bits in the mantissa of 2^23 * 1.0 make 2^23 + code; less 2^23 + 8 that is -8..7, exactly. */
static inline __attribute__((always_inline)) vec decode(ivec words, const int i) {
    ivec code = _mm256_and_si256(_mm256_srli_epi32(words, 4 * i), _mm256_set1_epi32(15));
    ivec bits = _mm256_or_si256(code, _mm256_set1_epi32(0x4b000000));
    return _mm256_sub_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(8388616.0f));
}

#include "fp32.h"

int mq_int4_avx2(const mq_linear *a) { return int4_linear(a); }
int mq_int8_avx2(const mq_linear *a) { return int8_linear(a); }
