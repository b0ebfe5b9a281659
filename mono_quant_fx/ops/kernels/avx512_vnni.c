/* int4_linear with INT8 dot products: x is rounded to INT8, one scale for each row and group.
 *
 *   out[m][n] = sum_g sx[m][g] s[n][g] (sum_k xcode[m][k] code[n][k] - (8 + zero[n][g]) sum_k xcode[m][k]) + bias[n]
 *
 * The sums over a group are exact: in int32, and as floats, since no panel is wide enough for more than 24 bits.
 */
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#include "avx512.h"

typedef int32_t unit; /* columns 0 2 4 6 of a word of x, and 1 3 5 7 */
typedef __v16si part; /* as __m512i, GCC 12 copies every sum in every step */

INLINE part nothing(void) { return (part)_mm512_setzero_si512(); }
INLINE part dot(part p, ivec codes, unit x) {
    return (part)_mm512_dpbusd_epi32((ivec)p, codes, _mm512_set1_epi32(x));
}

#define STEPS 2
#include "panels.h"

INLINE void spread(ivec word, const float *zero, ivec *to) {
    (void)zero; /* codes have no sign here, so zero points come later */
    to[0] = _mm512_and_si512(word, _mm512_set1_epi8(0x0f));
    to[2] = _mm512_and_si512(_mm512_srli_epi32(word, 4), _mm512_set1_epi8(0x0f));
}

INLINE vec whole_part(part p, const job *j, int64_t at, const float *zero) {
    const vec low = zero ? _mm512_add_ps(_mm512_loadu_ps(zero), _mm512_set1_ps(8)) : _mm512_set1_ps(8);
    const vec v = _mm512_fnmadd_ps(low, _mm512_set1_ps(j->sum[at]), _mm512_cvtepi32_ps((ivec)p));
    return _mm512_mul_ps(v, _mm512_set1_ps(j->scale[at]));
}

/* The largest magnitude of words [from, to), NaN if there is one: as integers, NaN is the largest. */
INLINE float largest(const mq_linear *a, const char *row, int64_t from, int64_t to) {
    __m256i most = _mm256_setzero_si256(), sign = _mm256_set1_epi32(0x7fffffff);
    for (int64_t w = from; w < to; w++)
        most = _mm256_max_epu32(most, _mm256_and_si256((__m256i)word_of_x(a, row, w), sign));
    uint32_t lane[8], all = 0;
    _mm256_storeu_si256((void *)lane, most);
    for (int i = 0; i < 8; i++) all = lane[i] > all ? lane[i] : all;
    float found;
    memcpy(&found, &all, 4);
    return found;
}

/* Scales are amax / 127 of a group, codes round(x (127 / amax)). */
static void row_of_x(const job *j, int64_t m, const char *row) {
    const int64_t tile = m / j->wide, at = m % j->wide;
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    float scale = 0, inverse = 0;
    for (int64_t s = 0, group = -1; s < j->count; s++) {
        const segment *g = j->segments + s;
        if (g->group != group) {
            int64_t end = g->word;
            for (int64_t t = s; t < j->count && j->segments[t].group == g->group; t++) end += j->segments[t].count;
            const float most = largest(j->a, row, g->word, end);
            scale = most / 127.0f, inverse = most < 1e-36f ? 0.0f : 127.0f / most, group = g->group;
        }
        __m256i sum = _mm256_setzero_si256();
        unit *to = x_at(j, tile, at, g->word);
        for (int64_t w = g->word; w < g->word + g->count; w++, to += j->wide * STEPS) {
            const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(word_of_x(j->a, row, w), _mm256_set1_ps(inverse)));
            _mm_storel_epi64((void *)to, _mm_shuffle_epi8(_mm256_cvtsepi32_epi8(q), order));
            sum = _mm256_add_epi32(sum, q);
        }
        uint32_t lane[8], all = 0; /* codes of NaN, which have no meaning, may overflow */
        _mm256_storeu_si256((void *)lane, sum);
        for (int i = 0; i < 8; i++) all += lane[i];
        j->sum[(tile * j->count + s) * j->wide + at] = (float)(int32_t)all;
        j->scale[(tile * j->count + s) * j->wide + at] = scale;
    }
}

int mq_int4_avx512_vnni(const mq_linear *a) { return a->rows ? watched(many_rows, a) : 0; }
