/* int4_linear and int8_linear in fp32 with AVX-512. */
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "avx512.h"

INLINE vec load_codes(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE vec permute(ivec at, vec values) { return _mm512_permutexvar_ps(at, values); }
INLINE vec gather(ivec at, const float *values) { return _mm512_i32gather_ps(at, values, 4); }
INLINE float sum(vec v) { return _mm512_reduce_add_ps(v); }

/* The permute reads the lowest four bits of each lane only, so that nothing is masked. */
INLINE vec decode(ivec words, const int i) {
    const vec codes = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * i), codes);
}

#include "fp32.h"

int mq_int4_avx512(const mq_linear *a) { return watched(int4_linear, a); }
int mq_int8_avx512(const mq_linear *a) { return watched(int8_linear, a); }
