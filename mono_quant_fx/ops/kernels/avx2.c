/* int4_linear and int8_linear in fp32 with AVX2 and FMA. */
#pragma GCC target("avx2,fma,f16c")
#define LANES 8
#define V(name) _mm256_##name
#include "linear.h"

typedef __m256 vec;
typedef __m256i ivec;
INLINE ivec load_ints(const void *p) { return _mm256_loadu_si256(p); }
INLINE ivec load_some(const void *p, int n) {
    const ivec lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_maskload_epi32(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
INLINE vec load_codes(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE vec permute(ivec at, vec values) { return _mm256_permutevar8x32_ps(values, at); }
INLINE vec gather(ivec at, const float *values) { return _mm256_i32gather_ps(values, at, 4); }
INLINE float sum(vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

/* The code's bits in the mantissa of 2^23 * 1.0 make 2^23 + code; less 2^23 + 8 that is -8..7, exactly. */
INLINE vec decode(ivec words, const int i) {
    ivec code = _mm256_and_si256(_mm256_srli_epi32(words, 4 * i), _mm256_set1_epi32(15));
    ivec bits = _mm256_or_si256(code, _mm256_set1_epi32(0x4b000000));
    return _mm256_sub_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(8388616.0f));
}

/* v[i] lane j becomes v[j] lane i. */
INLINE void transpose(ivec v[8]) {
    ivec t[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20), t[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
    }
    UNROLL for (int i = 0; i < 8; i++) v[i] = t[i];
}

/* The first `count` lanes to out[at...]. */
INLINE void store_some(const mq_linear *a, int64_t at, int count, vec v) {
    float lane[8];
    const vec none = _mm256_sub_ps(v, v);
    note(a, _mm256_movemask_ps(_mm256_cmp_ps(none, none, _CMP_UNORD_Q)) & ((1 << count) - 1));
    _mm256_storeu_ps(lane, v);
    if (a->out_type == MQ_F32 && count == 8)
        _mm256_storeu_ps((float *)a->out + at, v);
    else
        for (int i = 0; i < count; i++) store1(a->out, a->out_type, at + i, lane[i]);
}

#include "fp32.h"

int mq_int4_avx2(const mq_linear *a) { return watched(int4_linear, a); }
int mq_int8_avx2(const mq_linear *a) { return watched(int8_linear, a); }
