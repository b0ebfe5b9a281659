/* Vectors of AVX-512, for the files that include fp32.h, lanes.h or panels.h. The including file sets the target. */
#include "linear.h"

#define LANES 16
#define V(name) _mm512_##name

typedef __m512 vec;
typedef __m512i ivec;

INLINE ivec load_ints(const void *p) { return _mm512_loadu_si512(p); }
INLINE ivec load_some(const void *p, int n) { return _mm512_maskz_loadu_epi32((__mmask16)((1 << n) - 1), p); }

/* v[i] lane j becomes v[j] lane i. */
INLINE void transpose(ivec v[16]) {
    ivec t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 2; j++) {
        t[8 * j + i] = _mm512_shuffle_i32x4(v[8 * j + i], v[8 * j + 4 + i], 0x88);
        t[8 * j + 4 + i] = _mm512_shuffle_i32x4(v[8 * j + i], v[8 * j + 4 + i], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88), v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

/* The first `count` lanes to out[at...], rounded to nearest, halves to even. */
INLINE void store_some(const mq_linear *a, int64_t at, int count, vec v) {
    const __mmask16 mask = (__mmask16)((1 << count) - 1), nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const vec none = _mm512_sub_ps(v, v);
    note(a, _mm512_mask_cmp_ps_mask(mask, none, none, _CMP_UNORD_Q));
    if (a->out_type == MQ_F32) {
        _mm512_mask_storeu_ps((float *)a->out + at, mask, v);
    } else if (a->out_type == MQ_F16) {
        _mm256_mask_storeu_epi16((uint16_t *)a->out + at, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    } else {
        const ivec bits = (ivec)v, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const ivec half = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const ivec high = _mm512_mask_mov_epi32(_mm512_srli_epi32(half, 16), nan, _mm512_set1_epi32(0x7fc0));
        _mm512_mask_cvtepi32_storeu_epi16((uint16_t *)a->out + at, mask, high);
    }
}
