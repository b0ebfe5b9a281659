/* int4_linear with AVX-512's bf16 dot products. Codes become bf16 as they are, which is exact, and sums meet their scale
 * in fp32.
 *
 * few rows    unpacked in registers, along K, 128 columns (16 words) at a time
 * many rows   unpacked into panels that stay in L1 (panels.h)
 *
 * For few rows, lane l of a 32-bit vector belongs to word l of the block, so that one vector of scales serves any group
 * size that is a multiple of 8. x is rounded to bf16 and brought into that order once a call: vector j holds columns
 * 4 i + j.
 */
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#include "avx512.h"

typedef int32_t unit; /* columns j and j + 4 of a word of x, as bf16 */
typedef __m512 part;
typedef __m512bh bh;

INLINE bh as_bh(__m512i v) { return (bh)v; }
INLINE part nothing(void) { return _mm512_setzero_ps(); }
INLINE part dot(part p, ivec codes, unit x) { return _mm512_dpbf16_ps(p, as_bh(codes), as_bh(_mm512_set1_epi32(x))); }

#define STEPS 4
#include "lanes.h"
#include "panels.h"

enum { BLOCK = 128, AHEAD_BYTES = 12 << 10 };

/* -8 .. 7 as bf16, twice: a permute reads five bits of a lane, and the code is the lower four. */
INLINE __m512i bf16_codes(void) {
    return _mm512_set_epi16(0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, 0xbf80, 0xc000, 0xc040, 0xc080,
                            0xc0a0, 0xc0c0, 0xc0e0, 0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0,
                            0xbf80, 0xc000, 0xc040, 0xc080, 0xc0a0, 0xc0c0, 0xc0e0, 0xc100);
}

INLINE __m512i load_words(const uint8_t *from, int64_t count) {
    if (count >= LANES) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi32((__mmask16)((1 << count) - 1), from);
}

INLINE __m512 of_lanes(const lanes *l, int kind, const float *values, const place *p) {
    if (kind == ONE) return _mm512_set1_ps(values[p->group]);
    if (kind == SPREAD)
        return _mm512_permutexvar_ps(_mm512_loadu_si512(l->spread), _mm512_loadu_ps(values + p->block * l->per_block));
    return _mm512_i32gather_ps(_mm512_loadu_si512(l->lookup + LANES * p->block), values, 4);
}

/* How far before its use a weight is fetched: past the rows that are used side by side, and far enough for memory. It is
 * fetched in the order in which the bytes lie, even where it is used in another: that is twice as fast.
 */
INLINE int64_t ahead_of(const mq_linear *a, int64_t height) {
    int64_t rows = height * words_of(a) * 4;
    return rows > AHEAD_BYTES ? rows : AHEAD_BYTES;
}

/* Vectors from a row of shuffled x to the next: odd, or the same columns of several rows would meet in one set of L1. */
INLINE int64_t pitch_of(const mq_linear *a) { return blocks_of(a) * 4 + 1; }

/* 128 columns of x from column `at`, in natural order; zeros behind the last column. */
INLINE void load_block(const mq_linear *a, const char *row, int64_t at, __m512i v[4]) {
    char copy[BLOCK * 4] __attribute__((aligned(64)));
    const char *from = row + at * size_of(a->x_type);
    if (at + BLOCK > a->columns) {
        memset(copy, 0, sizeof copy);
        memcpy(copy, from, (a->columns - at) * size_of(a->x_type));
        from = copy;
    }
    UNROLL for (int i = 0; i < 4; i++) {
        if (a->x_type == MQ_BF16) {
            v[i] = _mm512_loadu_si512(from + 64 * i);
        } else if (a->x_type == MQ_F32) {
            v[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 128 * i + 64), _mm512_loadu_ps(from + 128 * i));
        } else {
            __m512 lo = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(from + 64 * i)));
            __m512 hi = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(from + 64 * i + 32)));
            v[i] = (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
        }
    }
}

/* x to xs[row][block][4], rows pitch_of(a) apart, and sums[row][block] of each word's eight columns unless NULL. */
static void shuffle_x(const mq_linear *a, __m512i *xs, __m512 *sums) {
    uint16_t pick[2][32];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 2; j++) pick[j][i] = 4 * i + 2 * j, pick[j][i + 16] = 4 * i + 2 * j + 1;
    const __m512i even = _mm512_loadu_si512(pick[0]), odd = _mm512_loadu_si512(pick[1]);
    const bh ones = as_bh(_mm512_set1_epi16(0x3f80));
    int64_t blocks = blocks_of(a);
    for (int64_t m = 0; m < a->rows; m++) {
        const char *row = (const char *)a->x + m * a->x_stride * size_of(a->x_type);
        for (int64_t b = 0; b < blocks; b++) {
            __m512i v[4], *to = xs + m * pitch_of(a) + b * 4;
            load_block(a, row, b * BLOCK, v);
            __m512i p = _mm512_permutex2var_epi16(v[0], even, v[1]), q = _mm512_permutex2var_epi16(v[0], odd, v[1]);
            __m512i r = _mm512_permutex2var_epi16(v[2], even, v[3]), s = _mm512_permutex2var_epi16(v[2], odd, v[3]);
            to[0] = _mm512_shuffle_i64x2(p, r, 0x44), to[1] = _mm512_shuffle_i64x2(p, r, 0xee);
            to[2] = _mm512_shuffle_i64x2(q, s, 0x44), to[3] = _mm512_shuffle_i64x2(q, s, 0xee);
            if (sums) {
                __m512 t = _mm512_setzero_ps();
                for (int j = 0; j < 4; j++) t = _mm512_dpbf16_ps(t, as_bh(to[j]), ones);
                sums[m * blocks + b] = t;
            }
        }
    }
}

INLINE __m128 sum_each(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 p = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 q = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 r = _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(r), _mm512_extractf32x8_ps(r, 1));
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

/* ---- few rows of x ---- */

typedef struct {
    const mq_linear *a;
    const lanes *l;
    const __m512i *xs;
    const __m512 *sums;
    const qparams *q;
} few_rows;

/* Adds one block of `rows` rows of x by `height` rows of the weight to the totals. `some` is the block's words, LANES but
 * at the end of a row. Fetches from `ahead`.
 */
INLINE void few_block(const few_rows *f, const place *p, const __m512i *x, const __m512 *sums, const uint8_t *weight,
                      const uint8_t *ahead, const int64_t some, __m512 total[6][4], const int rows, const int height,
                      const int kind, const int shifted) {
    const int64_t blocks = blocks_of(f->a), row_bytes = words_of(f->a) * 4, pitch = f->q->pitch;
    const __m512i codes = bf16_codes();
    __m512 part[6][4];
    __m512i w[4];
    UNROLL for (int h = 0; h < height; h++) {
        w[h] = load_words(weight + h * row_bytes, some);
        _mm_prefetch((const char *)(ahead + 64 * h), _MM_HINT_T1);
        UNROLL for (int i = 0; i < rows; i++) {
            part[i][h] = _mm512_setzero_ps();
            if (shifted)
                part[i][h] = _mm512_fnmadd_ps(of_lanes(f->l, kind, f->q->zero + h * pitch, p), sums[i * blocks],
                                              part[i][h]);
        }
    }
    UNROLL for (int j = 0; j < 4; j++) {
        bh q[4];
        UNROLL for (int h = 0; h < height; h++)
            q[h] = as_bh(_mm512_permutexvar_epi16(_mm512_srli_epi16(w[h], 4 * j), codes));
        UNROLL for (int i = 0; i < rows; i++) {
            bh v = as_bh(x[i * pitch_of(f->a) + j]);
            UNROLL for (int h = 0; h < height; h++) part[i][h] = _mm512_dpbf16_ps(part[i][h], q[h], v);
        }
    }
    UNROLL for (int h = 0; h < height; h++) {
        __m512 s = of_lanes(f->l, kind, f->q->scale + h * pitch, p);
        UNROLL for (int i = 0; i < rows; i++) total[i][h] = _mm512_fmadd_ps(part[i][h], s, total[i][h]);
    }
}

/* out[m][n .. n + count), count at most 4. */
INLINE void store_four(const mq_linear *a, int64_t m, int64_t n, const int count, __m128 v) {
    const __mmask8 mask = (__mmask8)((1 << count) - 1);
    char *to = (char *)a->out + (m * a->out_stride + n) * size_of(a->out_type);
    if (a->bias) {
        float bias[4] = {0};
        for (int h = 0; h < count; h++) bias[h] = load1(a->bias, a->bias_type, n + h);
        v = _mm_add_ps(v, _mm_loadu_ps(bias));
    }
    const __m128 none = _mm_sub_ps(v, v);
    note(a, _mm_movemask_ps(_mm_cmpunord_ps(none, none)) & mask);
    if (a->out_type == MQ_F32)
        _mm_mask_storeu_ps(to, mask, v);
    else if (a->out_type == MQ_BF16)
        _mm_mask_storeu_epi16(to, mask, (__m128i)_mm_cvtneps_pbh(v));
    else
        _mm_mask_storeu_epi16(to, mask, _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

/* Rows m.. of x by rows n.. of the weight. */
INLINE void few(const few_rows *f, int64_t m, int64_t n, const int rows, const int height, const int kind,
                const int shifted) {
    const int64_t blocks = blocks_of(f->a), words = words_of(f->a), whole = words / LANES;
    const __m512i *x = f->xs + m * pitch_of(f->a);
    const __m512 *sums = shifted ? f->sums + m * blocks : NULL;
    const uint8_t *weight = f->a->packed + n * words * 4;
    const uint8_t *ahead = weight + ahead_of(f->a, height);
    place p = place_of(f->l, 0);
    __m512 total[6][4];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int h = 0; h < height; h++) total[i][h] = _mm512_setzero_ps();
    for (int64_t b = 0; b < whole; b++, x += 4, weight += 64, ahead += 64 * height, advance(f->l, &p))
        few_block(f, &p, x, shifted ? sums + b : NULL, weight, ahead, LANES, total, rows, height, kind, shifted);
    if (whole < blocks)
        few_block(f, &p, x, shifted ? sums + whole : NULL, weight, ahead, words % LANES, total, rows, height, kind,
                  shifted);
    UNROLL for (int i = 0; i < rows; i++) /* a sum that is not needed is one that is there */
        store_four(f->a, m + i, n, height,
                   sum_each(total[i][0], total[i][height > 1 ? 1 : 0], total[i][height > 2 ? 2 : 0],
                            total[i][height > 3 ? 3 : 0]));
}

#define SIZE(ROWS, HEIGHT)                                                                                             \
    static void few_##ROWS##_##HEIGHT(const few_rows *f, int64_t m, int64_t n) {                                       \
        if (f->l->kind == ONE && !f->a->zero)                                                                          \
            few(f, m, n, ROWS, HEIGHT, ONE, 0);                                                                        \
        else if (f->l->kind == ONE)                                                                                    \
            few(f, m, n, ROWS, HEIGHT, ONE, 1);                                                                        \
        else if (f->l->kind == SPREAD && !f->a->zero)                                                                  \
            few(f, m, n, ROWS, HEIGHT, SPREAD, 0);                                                                     \
        else if (f->l->kind == SPREAD)                                                                                 \
            few(f, m, n, ROWS, HEIGHT, SPREAD, 1);                                                                     \
        else                                                                                                           \
            few(f, m, n, ROWS, HEIGHT, LOOKUP, f->a->zero != NULL);                                                    \
    }
SIZE(1, 4) SIZE(2, 4) SIZE(3, 3) SIZE(4, 3) SIZE(4, 2) SIZE(5, 2) SIZE(6, 2)
SIZE(1, 1) SIZE(2, 1) SIZE(3, 1) SIZE(4, 1) SIZE(5, 1) SIZE(6, 1)

static int multiply_few(const mq_linear *a, const lanes *l, const __m512i *xs, const __m512 *sums, int64_t from,
                         int64_t to) {
    typedef void (*size)(const few_rows *, int64_t, int64_t);
    static const size sizes[5][7] = {[1] = {0, few_1_1, few_2_1, few_3_1, few_4_1, few_5_1, few_6_1},
                                     [2] = {[4] = few_4_2, few_5_2, few_6_2},
                                     [3] = {[3] = few_3_3, few_4_3},
                                     [4] = {[1] = few_1_4, few_2_4}};
    int64_t parts = ceil_div(a->rows, 6), most = ceil_div(a->rows, parts), height = most > 4 ? 2 : most > 2 ? 3 : 4;
    qparams q;
    few_rows f = {a, l, xs, sums, &q};
    if (!new_qparams(a, 4, &q)) return 0;
    for (int64_t n = from; n < to;) {
        int64_t rows = to - n < height ? 1 : height;
        for (int64_t h = 0; h < rows; h++) load_qparams(a, n + h, h, &q);
        for (int64_t m = 0, p = 0; p < parts; p++) {
            int64_t some = (a->rows - m) / (parts - p);
            sizes[rows][some](&f, m, n);
            m += some;
        }
        n += rows;
    }
    free(q.scale);
    return 1;
}

/* ---- many rows of x ---- */

/* Codes less zero points that no code has, -8 .. 7: exact in bf16 as well, but too many for a table. */
static void spread_far(ivec word, __m512i zero, ivec *to) {
    const __m512i less = _mm512_add_epi32(zero, _mm512_set1_epi32(8)), low = _mm512_set1_epi32(15);
    for (int j = 0; j < STEPS; j++) {
        const __m512i even = _mm512_and_si512(_mm512_srli_epi32(word, 4 * j), low);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 4 * j + 16), low);
        const __m512i first = (__m512i)_mm512_cvtepi32_ps(_mm512_sub_epi32(even, less));
        const __m512i second = (__m512i)_mm512_cvtepi32_ps(_mm512_sub_epi32(odd, less));
        to[2 * j] = _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
    }
}

/* Codes are exact in bf16, with and without their zero point, so that scales meet sums in fp32. */
INLINE void spread(ivec word, const float *zero, ivec *to) {
    if (!zero) {
        UNROLL for (int j = 0; j < STEPS; j++)
            to[2 * j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * j), bf16_codes());
        return;
    }
    const __m512i less = _mm512_set_epi16( /* -15 .. 15 */
        0, 0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110, 0x4100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040,
        0x4000, 0x3f80, 0, 0xbf80, 0xc000, 0xc040, 0xc080, 0xc0a0, 0xc0c0, 0xc0e0, 0xc100, 0xc110, 0xc120, 0xc130,
        0xc140, 0xc150, 0xc160, 0xc170);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_loadu_ps(zero)), low = _mm512_sub_epi32(_mm512_set1_epi32(7), whole);
    if (__builtin_expect(_mm512_cmpgt_epu32_mask(low, _mm512_set1_epi32(15)), 0)) {
        spread_far(word, whole, to);
        return;
    }
    const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(low, 16));
    UNROLL for (int j = 0; j < STEPS; j++) {
        const __m512i code = _mm512_and_si512(_mm512_srli_epi16(word, 4 * j), _mm512_set1_epi16(15));
        to[2 * j] = _mm512_permutexvar_epi16(_mm512_add_epi16(code, both), less);
    }
}

INLINE vec whole_part(part p, const job *j, int64_t at, const float *zero) {
    (void)j, (void)at, (void)zero;
    return p;
}

static void row_of_x(const job *j, int64_t m, const char *row) {
    const int64_t words = words_of(j->a), whole = j->a->columns / 8, bf16 = j->a->x_type == MQ_BF16;
    const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t first = 0; first < words; first += PANEL) {
        unit *to = x_at(j, m / j->wide, m % j->wide, first);
        for (int64_t w = first; w < least(first + PANEL, words); w++, to += j->wide * STEPS) {
            const __m128i v = bf16 && w < whole ? _mm_loadu_si128((const void *)(row + w * 16))
                                                : (__m128i)_mm256_cvtneps_pbh(word_of_x(j->a, row, w));
            _mm_store_si128((void *)to, _mm_shuffle_epi8(v, order));
        }
    }
}

static int few_rows_of_x(const mq_linear *a) {
    lanes l;
    int ready = find_lanes(a, &l);
    __m512i *xs = aligned_alloc(64, a->rows * pitch_of(a) * 64);
    __m512 *sums = a->zero ? aligned_alloc(64, a->rows * blocks_of(a) * sizeof *sums) : NULL;
    ready = ready && xs && (sums || !a->zero);
    if (ready) {
        shuffle_x(a, xs, sums);
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->threads > 1) reduction(&& : ready)
        for (int t = 0; t < a->threads; t++) {
            int64_t from, to;
            share_of(a, 12, t, &from, &to);
            ready = ready && multiply_few(a, &l, xs, sums, from, to);
        }
    }
    free(xs), free(sums), free(l.lookup);
    return ready ? 0 : -1;
}

int mq_int4_avx512_bf16(const mq_linear *a) {
    if (a->rows == 0) return 0;
    return watched(a->rows <= a->few ? few_rows_of_x : many_rows, a);
}
