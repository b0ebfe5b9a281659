/* int4_linear with AVX-512's bf16 dot products. Two ways to multiply, both along K, 128 columns (16 words) at a time:
 *
 * few rows    the codes become bf16 as they are (-8..7 is exact); a block's dot products are scaled in fp32
 * many rows   the codes are scaled and rounded to bf16, once for a panel of weight rows that stays in L1
 *
 * Lane l of a 32-bit vector belongs to word l of the block, so that one vector of scales serves any group size that is a
 * multiple of 8. x is rounded to bf16 and brought into that order once a call: vector j holds columns 4 i + j.
 */
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#define LANES 16
#include "lanes.h"

enum {
    BLOCK = 128,
    PANEL = 16, /* blocks in a panel: with TALL rows 24 KiB, which leaves room in L1 for x */
    TALL = 6,
    WIDE = 4,
    STACK = 8,  /* panels that are scaled before x is read, where x has more rows than CHUNK: 192 KiB */
    CHUNK = 64, /* rows of x that meet one panel after the other: 256 KiB at a time */
    X_BYTES = 1 << 22, /* of x that are shuffled at a time */
    AHEAD_BYTES = 12 << 10,
};

typedef __m512bh bh;
INLINE bh as_bh(__m512i v) { return (bh)v; }

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

/* Rows [first, first + rows) of x: xs[row][block][4], rows pitch_of(a) apart, and sums[row][block] of each word's eight
 * columns unless NULL.
 */
static void shuffle_x(const mq_linear *a, int64_t first, int64_t rows, __m512i *xs, __m512 *sums) {
    uint16_t pick[2][32];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 2; j++) pick[j][i] = 4 * i + 2 * j, pick[j][i + 16] = 4 * i + 2 * j + 1;
    const __m512i even = _mm512_loadu_si512(pick[0]), odd = _mm512_loadu_si512(pick[1]);
    const bh ones = as_bh(_mm512_set1_epi16(0x3f80));
    int64_t blocks = blocks_of(a);
    for (int64_t m = 0; m < rows; m++) {
        const char *row = (const char *)a->x + (first + m) * a->x_stride * size_of(a->x_type);
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
    const __m512i codes = _mm512_set_epi16( /* -8 .. 7 as bf16, twice */
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, 0xbf80, 0xc000, 0xc040, 0xc080, 0xc0a0, 0xc0c0,
        0xc0e0, 0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, 0xbf80, 0xc000, 0xc040, 0xc080,
        0xc0a0, 0xc0c0, 0xc0e0, 0xc100);
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

/* Blocks [first, last) of a weight row, scaled, as bf16: to[block][4], TALL vectors apart. Fetches from `ahead`. */
INLINE void scale_row(const mq_linear *a, const lanes *l, int64_t n, int64_t first, int64_t last, const float *scale,
                      const float *zero, const uint8_t *ahead, __m512i *to, const int kind) {
    const int64_t words = words_of(a);
    const uint8_t *row = a->packed + n * words * 4;
    const __m512 codes = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    __m512i table = _mm512_setzero_si512();
    uint16_t order[32];
    for (int i = 0; i < 16; i++) order[2 * i] = i, order[2 * i + 1] = i + 16;
    const __m512i weave = _mm512_loadu_si512(order);
    place p = place_of(l, first);
    for (int64_t b = first; b < last; b++, advance(l, &p), ahead += 64, to += 4 * TALL) {
        __m512i w = load_words(row + b * 64, words - b * LANES);
        _mm_prefetch((const char *)ahead, _MM_HINT_T1);
        if (kind == ONE) { /* sixteen values are all there are, until the group ends */
            if (b == first || p.left == l->span) {
                __m512 v = zero ? _mm512_sub_ps(codes, _mm512_set1_ps(zero[p.group])) : codes;
                v = _mm512_mul_ps(v, _mm512_set1_ps(scale[p.group]));
                table = (__m512i)_mm512_cvtne2ps_pbh(v, v);
            }
            UNROLL for (int j = 0; j < 4; j++)
                to[j * TALL] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4 * j), table);
            continue;
        }
        __m512 s = of_lanes(l, kind, scale, &p), z = zero ? of_lanes(l, kind, zero, &p) : _mm512_setzero_ps();
        UNROLL for (int j = 0; j < 4; j++) {
            __m512 lo = _mm512_sub_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * j), codes), z);
            __m512 hi = _mm512_sub_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * j + 16), codes), z);
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(hi, s), _mm512_mul_ps(lo, s));
            to[j * TALL] = _mm512_permutexvar_epi16(weave, both);
        }
    }
}

/* sums[row][8] += `rows` rows of x times the TALL rows of a panel. */
INLINE void tile(const __m512i *xs, int64_t pitch, const __m512i *panel, int64_t vectors, float *sums, const int rows) {
    __m512 total[WIDE][TALL];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int h = 0; h < TALL; h++) total[i][h] = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; v++, panel += TALL) {
        bh x[WIDE];
        UNROLL for (int i = 0; i < rows; i++) x[i] = as_bh(xs[i * pitch + v]);
        UNROLL for (int h = 0; h < TALL; h++) {
            bh w = as_bh(panel[h]);
            UNROLL for (int i = 0; i < rows; i++) total[i][h] = _mm512_dpbf16_ps(total[i][h], x[i], w);
        }
    }
    UNROLL for (int i = 0; i < rows; i++, sums += 8) {
        __m128 lo = sum_each(total[i][0], total[i][1], total[i][2], total[i][3]);
        __m128 hi = sum_each(total[i][4], total[i][5], total[i][4], total[i][5]);
        _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), lo));
        _mm_storeu_ps(sums + 4, _mm_add_ps(_mm_loadu_ps(sums + 4), hi));
    }
}

static void tiles(const __m512i *xs, int64_t pitch, const __m512i *panel, int64_t vectors, float *sums, int64_t rows) {
    for (; rows >= WIDE; rows -= WIDE, xs += WIDE * pitch, sums += 8 * WIDE) tile(xs, pitch, panel, vectors, sums, WIDE);
    if (rows == 3) tile(xs, pitch, panel, vectors, sums, 3);
    if (rows == 2) tile(xs, pitch, panel, vectors, sums, 2);
    if (rows == 1) tile(xs, pitch, panel, vectors, sums, 1);
}

/* Blocks [first, last) of the rows from n on, `height` of them, to a panel. */
static void scale_panel(const mq_linear *a, const lanes *l, const qparams *q, int64_t at, int64_t n, int64_t height,
                        int64_t first, int64_t last, const uint8_t *ahead, __m512i *panel) {
    for (int64_t h = 0; h < height; h++, ahead += (last - first) * 64) {
        const float *scale = q->scale + (at + h) * q->pitch, *zero = q->zero ? q->zero + (at + h) * q->pitch : NULL;
        if (l->kind == ONE)
            scale_row(a, l, n + h, first, last, scale, zero, ahead, panel + h, ONE);
        else if (l->kind == SPREAD)
            scale_row(a, l, n + h, first, last, scale, zero, ahead, panel + h, SPREAD);
        else
            scale_row(a, l, n + h, first, last, scale, zero, ahead, panel + h, LOOKUP);
    }
}

/* out[first..][n .. n + count) from sums[row][8]. */
static void store_results(const mq_linear *a, int64_t first, int64_t rows, int64_t n, int64_t count, const float *sums) {
    const __mmask8 mask = (__mmask8)((1 << count) - 1);
    float bias[8] = {0};
    if (a->bias)
        for (int64_t h = 0; h < count; h++) bias[h] = load1(a->bias, a->bias_type, n + h);
    const __m256 added = _mm256_loadu_ps(bias);
    for (int64_t m = 0; m < rows; m++) {
        const __m256 v = _mm256_add_ps(_mm256_loadu_ps(sums + 8 * m), added);
        char *to = (char *)a->out + ((first + m) * a->out_stride + n) * size_of(a->out_type);
        if (a->out_type == MQ_F32)
            _mm256_mask_storeu_ps(to, mask, v);
        else if (a->out_type == MQ_BF16)
            _mm_mask_storeu_epi16(to, mask, (__m128i)_mm256_cvtneps_pbh(v));
        else
            _mm_mask_storeu_epi16(to, mask, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
}

/* Rows [first, first + rows) of x, which lie at xs, by rows [from, to) of the weight. */
static int multiply_many(const mq_linear *a, const lanes *l, const __m512i *xs, int64_t first, int64_t rows,
                         int64_t from, int64_t to) {
    const int64_t blocks = blocks_of(a), size = PANEL * 4 * TALL, stack = rows > CHUNK ? STACK : 1;
    qparams q;
    float *sums = malloc(stack * rows * 8 * sizeof *sums);
    __m512i *panels = aligned_alloc(64, stack * size * sizeof *panels);
    const int ready = new_qparams(a, stack * TALL, &q) && sums && panels;
    if (ready) memset(panels, 0, stack * size * sizeof *panels);
    for (int64_t n = from; ready && n < to; n += stack * TALL) {
        const int64_t height = least(to - n, stack * TALL), some = ceil_div(height, TALL);
        const uint8_t *ahead = a->packed + (n + stack * TALL) * words_of(a) * 4;
        for (int64_t h = 0; h < height; h++) load_qparams(a, n + h, h, &q);
        memset(sums, 0, some * rows * 8 * sizeof *sums);
        for (int64_t b = 0; b < blocks; b += PANEL) {
            const int64_t last = least(b + PANEL, blocks);
            for (int64_t s = 0, h = 0; s < some; s++, h += TALL, ahead += TALL * (last - b) * 64)
                scale_panel(a, l, &q, h, n + h, least(height - h, TALL), b, last, ahead, panels + s * size);
            for (int64_t m = 0; m < rows; m += CHUNK)
                for (int64_t s = 0; s < some; s++)
                    tiles(xs + m * pitch_of(a) + b * 4, pitch_of(a), panels + s * size, (last - b) * 4,
                          sums + (s * rows + m) * 8, least(rows - m, CHUNK));
        }
        for (int64_t s = 0, h = 0; s < some; s++, h += TALL)
            store_results(a, first, rows, n + h, least(height - h, TALL), sums + s * rows * 8);
    }
    free(q.scale), free(sums), free(panels);
    return ready;
}

int mq_int4_avx512_bf16(const mq_linear *a) {
    const int64_t blocks = blocks_of(a), row_bytes = pitch_of(a) * 64;
    const int is_few = a->rows <= a->few;
    int64_t chunk = X_BYTES / row_bytes / CHUNK * CHUNK;
    chunk = is_few ? a->rows : least(a->rows, chunk < CHUNK ? CHUNK : chunk);
    lanes l;
    int ready = find_lanes(a, &l);
    __m512i *xs = aligned_alloc(64, chunk * row_bytes);
    __m512 *sums = is_few && a->zero ? aligned_alloc(64, chunk * blocks * sizeof *sums) : NULL;
    ready = ready && xs && (sums || !(is_few && a->zero));
    for (int64_t m = 0; ready && m < a->rows; m += chunk) {
        int64_t rows = least(chunk, a->rows - m);
        shuffle_x(a, m, rows, xs, sums);
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->threads > 1) reduction(&& : ready)
        for (int t = 0; t < a->threads; t++) {
            int64_t from, to;
            share_of(a, 12, t, &from, &to);
            ready = ready && (is_few ? multiply_few(a, &l, xs, sums, from, to)
                                     : multiply_many(a, &l, xs, m, rows, from, to));
        }
    }
    free(xs), free(sums), free(l.lookup);
    return ready ? 0 : -1;
}
