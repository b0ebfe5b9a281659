/* Stored codes to floats, in the order of the columns: (code - zero) in whole numbers, times scale, rounded once. */
#pragma GCC target("avx2,fma,f16c")
#include "elements.h"

/* Eight floats to elements `at`.. of any type; the first `count` of them. */
INLINE void store8(void *to, int type, int64_t at, __m256 v, int64_t count) {
    char *p = (char *)to + at * size_of(type);
    if (count < 8) {
        float some[8];
        _mm256_storeu_ps(some, v);
        for (int64_t i = 0; i < count; i++) store1(to, type, at + i, some[i]);
    } else if (type == MQ_F32) {
        _mm256_storeu_ps((float *)p, v);
    } else if (type == MQ_F16) {
        _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    } else { /* halves to even; the sum would carry a NaN's bits over into a number's */
        const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
        __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        u = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        u = _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
        u = _mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0x08);
        _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(u));
    }
}

static void int4_row(const mq_dequantize *a, int64_t n) {
    const int64_t words = ceil_div(a->columns, 8), group = a->group <= 0 ? words * 8 : a->group;
    const int64_t groups = ceil_div(a->columns, group), at = n * a->out_stride;
    const int32_t *row = (const int32_t *)a->codes + n * words;
    const __m256i shifts = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0), mask = _mm256_set1_epi32(15);
    for (int64_t g = 0, w = 0; g < groups; g++) {
        const __m256 scale = _mm256_set1_ps(load1(a->scale, a->scale_type, n * groups + g));
        const __m256i zero = _mm256_set1_epi32(8 + (a->zero ? a->zero[n * groups + g] : 0));
        for (int64_t end = least((g + 1) * group / 8, words); w < end; w++) {
            __m256i code = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(row[w]), shifts), mask);
            __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero)), scale);
            store8(a->out, a->out_type, at + w * 8, v, a->columns - w * 8);
        }
    }
}

static void int8_row(const mq_dequantize *a, int64_t n) {
    const int8_t *row = (const int8_t *)a->codes + n * a->columns;
    const float scale = load1(a->scale, a->scale_type, n);
    const int zero = a->zero ? a->zero[n] : 0;
    int64_t k = 0;
    for (; k + 8 <= a->columns; k += 8) {
        __m256i code = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(row + k)));
        __m256 v = _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(zero)));
        store8(a->out, a->out_type, n * a->out_stride + k, _mm256_mul_ps(v, _mm256_set1_ps(scale)), 8);
    }
    for (; k < a->columns; k++) store1(a->out, a->out_type, n * a->out_stride + k, (float)(row[k] - zero) * scale);
}

int mq_dequantize_int4(const mq_dequantize *a) {
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->threads > 1)
    for (int64_t n = 0; n < a->outputs; n++) int4_row(a, n);
    return 0;
}

int mq_dequantize_int8(const mq_dequantize *a) {
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->threads > 1)
    for (int64_t n = 0; n < a->outputs; n++) int8_row(a, n);
    return 0;
}
