/* int4_linear with INT8 dot products: x is rounded to INT8, one scale for each row and group.
 *
 *   out[m][n] = sum_g sx[m][g] s[n][g] (sum_k xcode[m][k] code[n][k] - (8 + zero[n][g]) sum_k xcode[m][k]) + bias[n]
 *
 * The sums over a group are exact, in int32. Lane l of a vector is row l of sixteen rows of the weight, so that no sum
 * crosses lanes and one vector holds a group's scales: 512 columns of 32 rows are brought into that order at a time, a
 * panel of 16 KiB that stays in L1 for all rows of x.
 */
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#define LANES 16
#include "linear.h"

enum { PAIR = 2 * LANES, WIDE = 12, PANEL_WORDS = 64, X_BYTES = 1 << 21 };

typedef __v16si ints; /* what the dot product is about; as __m512i, GCC 12 copies every sum in every step */

/* Words of one group that lie in one panel. */
typedef struct {
    int64_t word, count, group;
} segment;

/* A few rows of x as codes. A tile is `wide` rows; their codes lie side by side, four columns of each at a time. */
typedef struct {
    const mq_linear *a;
    const segment *segments;
    int64_t count, rows, wide, tiles;
    int32_t *codes; /* [tile][word][2][wide], columns 0 2 4 6 and 1 3 5 7 of each word */
    int32_t *start; /* [tile][segment][wide], -8 times the sum of the segment's codes */
    float *scale;   /* [tile][segment][wide] */
} rounded;

static segment *new_segments(const mq_linear *a, int64_t *count) {
    const int64_t words = words_of(a), group = (groups_of(a) == 1 ? words * 8 : a->group) / 8;
    segment *all = malloc((ceil_div(words, least(group, PANEL_WORDS)) + ceil_div(words, group)) * sizeof *all);
    *count = 0;
    for (int64_t word = 0; all && word < words;) {
        const int64_t end = least((word / group + 1) * group, words);
        all[*count] = (segment){word, least(end - word, PANEL_WORDS), word / group};
        word += all[(*count)++].count;
    }
    return all;
}

/* ---- x ---- */

/* The largest magnitude of whole words, NaN if there is one: as integers, NaN is the largest. */
INLINE float largest(const float *v, int64_t count) {
    __m256i most = _mm256_setzero_si256(), sign = _mm256_set1_epi32(0x7fffffff);
    for (int64_t k = 0; k < count; k += 8)
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_loadu_si256((const void *)(v + k)), sign));
    uint32_t lane[8], all = 0;
    _mm256_storeu_si256((void *)lane, most);
    for (int i = 0; i < 8; i++) all = lane[i] > all ? lane[i] : all;
    float found;
    memcpy(&found, &all, 4);
    return found;
}

/* Row m of the tile's rows from v, which holds whole words. Scales are amax / 127, codes round(x (127 / amax)). */
static void round_row(const rounded *r, int64_t m, const float *v) {
    const int64_t tile = m / r->wide, at = m % r->wide, words = words_of(r->a);
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    int32_t *codes = r->codes + tile * words * 2 * r->wide + at;
    float scale = 0, inverse = 0;
    for (int64_t s = 0, group = -1; s < r->count; s++) {
        const segment *g = r->segments + s;
        if (g->group != group) {
            int64_t end = g->word;
            for (int64_t t = s; t < r->count && r->segments[t].group == g->group; t++) end += r->segments[t].count;
            float most = largest(v + g->word * 8, (end - g->word) * 8);
            scale = most / 127.0f, inverse = most < 1e-36f ? 0.0f : 127.0f / most, group = g->group;
        }
        __m256i sum = _mm256_setzero_si256();
        for (int64_t w = g->word; w < g->word + g->count; w++) {
            __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(v + w * 8), _mm256_set1_ps(inverse)));
            __m128i bytes = _mm_shuffle_epi8(_mm256_cvtsepi32_epi8(q), order);
            codes[w * 2 * r->wide] = _mm_extract_epi32(bytes, 0);
            codes[(w * 2 + 1) * r->wide] = _mm_extract_epi32(bytes, 1);
            sum = _mm256_add_epi32(sum, q);
        }
        int32_t lane[8], all = 0;
        _mm256_storeu_si256((void *)lane, sum);
        for (int i = 0; i < 8; i++) all += lane[i];
        r->start[(tile * r->count + s) * r->wide + at] = -8 * all;
        r->scale[(tile * r->count + s) * r->wide + at] = scale;
    }
}

static int round_x(const rounded *r, int64_t first) {
    const mq_linear *a = r->a;
    const int64_t words = words_of(a);
    int ready = 1;
#pragma omp parallel num_threads(a->threads) if (a->threads > 1) reduction(&& : ready)
    {
        float *v = calloc(words * 8, sizeof *v);
        ready = v != NULL;
#pragma omp for schedule(static)
        for (int64_t m = 0; m < r->rows; m++) {
            const char *row = (const char *)a->x + (first + m) * a->x_stride * size_of(a->x_type);
            int64_t k = 0;
            if (!v) continue;
            for (; k + 8 <= a->columns; k += 8) _mm256_storeu_ps(v + k, load8(row, a->x_type, k));
            for (; k < a->columns; k++) v[k] = load1(row, a->x_type, k);
            round_row(r, m, v);
        }
        free(v);
    }
    return ready;
}

/* ---- the weight ---- */

INLINE void transpose(__m512i v[16]) {
    __m512i t[16];
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

/* `count` words of sixteen rows from n on (the last one again where there are fewer) to panel[word][2][2 vectors]. */
static void unpack(const mq_linear *a, int64_t n, int64_t word, int64_t count, const uint8_t *ahead, __m512i *panel) {
    const int64_t row_bytes = words_of(a) * 4, last = a->outputs - 1;
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    for (int64_t w = 0; w < count; w += LANES) {
        const int64_t some = least(count - w, LANES);
        const __mmask16 mask = (__mmask16)((1 << some) - 1);
        __m512i v[16];
        for (int i = 0; i < 16; i++, ahead += 64) {
            v[i] = _mm512_maskz_loadu_epi32(mask, a->packed + least(n + i, last) * row_bytes + (word + w) * 4);
            _mm_prefetch((const char *)ahead, _MM_HINT_T1);
        }
        transpose(v);
        for (int64_t i = 0; i < some; i++, panel += 4) {
            panel[0] = _mm512_and_si512(v[i], nibble);
            panel[2] = _mm512_and_si512(_mm512_srli_epi32(v[i], 4), nibble);
        }
    }
}

/* Scales and zero points of PAIR rows from n on: [segment][PAIR]. */
static void load_pair(const rounded *r, int64_t n, qparams *q, float *scale, float *zero) {
    for (int64_t i = 0; i < PAIR; i++) {
        load_qparams(r->a, least(n + i, r->a->outputs - 1), 0, q);
        for (int64_t s = 0; s < r->count; s++) scale[s * PAIR + i] = q->scale[r->segments[s].group];
        for (int64_t s = 0; zero && s < r->count; s++) zero[s * PAIR + i] = q->zero[r->segments[s].group];
    }
}

/* ---- the product ---- */

/* sums[lane] += sx sw (dot + zw start / 8): start is -8 times the sum of x's codes. */
INLINE void add_dot(ints dot, int32_t start, float sx, const float *sw, const float *zw, float *sums) {
    __m512 v = _mm512_cvtepi32_ps((__m512i)dot);
    if (zw) v = _mm512_fmadd_ps(_mm512_loadu_ps(zw), _mm512_set1_ps((float)start * 0.125f), v);
    v = _mm512_mul_ps(v, _mm512_set1_ps(sx));
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(v, _mm512_loadu_ps(sw), _mm512_loadu_ps(sums)));
}

/* sums[row][PAIR] += a tile of x times a panel that holds segments [from, to). */
INLINE void tile(const rounded *r, int64_t tile, int64_t from, int64_t to, const __m512i *panel, const float *scale,
                 const float *zero, float *sums, const int rows) {
    const int64_t wide = r->wide, at = tile * r->count;
    const int32_t *x = r->codes + (tile * words_of(r->a) + r->segments[from].word) * 2 * wide;
    for (int64_t s = from; s < to; s++) {
        const int32_t *start = r->start + (at + s) * wide;
        ints dot[WIDE][2];
        UNROLL for (int i = 0; i < rows; i++) dot[i][0] = dot[i][1] = (ints)_mm512_set1_epi32(start[i]);
        int64_t k = 2 * r->segments[s].count;
        do {
            const __m512i w0 = panel[0], w1 = panel[1];
            UNROLL for (int i = 0; i < rows; i++) {
                const __m512i v = _mm512_set1_epi32(x[i]);
                dot[i][0] = (ints)_mm512_dpbusd_epi32((__m512i)dot[i][0], w0, v);
                dot[i][1] = (ints)_mm512_dpbusd_epi32((__m512i)dot[i][1], w1, v);
            }
            panel += 2, x += wide;
        } while (--k);
        const float *sw = scale + s * PAIR, *zw = zero ? zero + s * PAIR : NULL, *sx = r->scale + (at + s) * wide;
        UNROLL for (int i = 0; i < rows; i++) {
            add_dot(dot[i][0], start[i], sx[i], sw, zw, sums + i * PAIR);
            add_dot(dot[i][1], start[i], sx[i], sw + LANES, zw ? zw + LANES : NULL, sums + i * PAIR + LANES);
        }
    }
}

typedef void (*size)(const rounded *, int64_t, int64_t, int64_t, const __m512i *, const float *, const float *, float *);
#define SIZE(ROWS)                                                                                                     \
    static void tile_##ROWS(const rounded *r, int64_t t, int64_t from, int64_t to, const __m512i *panel,               \
                            const float *scale, const float *zero, float *sums) {                                      \
        tile(r, t, from, to, panel, scale, zero, sums, ROWS);                                                          \
    }
SIZE(1) SIZE(2) SIZE(3) SIZE(4) SIZE(6) SIZE(8) SIZE(10) SIZE(12)

/* The rows that a tile of at least so many computes, and its function. */
static const int64_t rounded_up[WIDE + 1] = {0, 1, 2, 3, 4, 6, 6, 8, 8, 10, 10, 12, 12};
static const size sizes[WIDE + 1] = {[1] = tile_1, tile_2, tile_3, tile_4, [6] = tile_6, [8] = tile_8,
                                     [10] = tile_10, [12] = tile_12};

static void store_sums(const mq_linear *a, int64_t first, int64_t rows, int64_t n, int64_t count, const float *sums) {
    const __mmask16 mask = (__mmask16)((1 << count) - 1);
    float bias[LANES] = {0};
    if (a->bias)
        for (int64_t i = 0; i < count; i++) bias[i] = load1(a->bias, a->bias_type, n + i);
    const __m512 added = _mm512_loadu_ps(bias);
    for (int64_t m = 0; m < rows; m++) {
        const __m512 v = _mm512_add_ps(_mm512_loadu_ps(sums + m * PAIR), added);
        const int64_t at = (first + m) * a->out_stride + n;
        if (a->out_type == MQ_F32) {
            _mm512_mask_storeu_ps((float *)a->out + at, mask, v);
        } else if (a->out_type == MQ_F16) {
            const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
            _mm256_mask_storeu_epi16((uint16_t *)a->out + at, mask, h);
        } else {
            float lane[LANES];
            _mm512_storeu_ps(lane, v);
            for (int64_t i = 0; i < count; i++) store1(a->out, MQ_BF16, at + i, lane[i]);
        }
    }
}

static int multiply(const rounded *r, int64_t first, int64_t from, int64_t to) {
    const mq_linear *a = r->a;
    const int64_t rows = r->tiles * r->wide;
    qparams q;
    const int have = new_qparams(a, 1, &q);
    float *sums = aligned_alloc(64, rows * PAIR * sizeof *sums);
    float *scale = aligned_alloc(64, 2 * r->count * PAIR * sizeof *scale);
    float *zero = a->zero && scale ? scale + r->count * PAIR : NULL;
    __m512i *panel = aligned_alloc(64, PANEL_WORDS * 4 * sizeof *panel);
    const int ready = have && sums && scale && panel;
    for (int64_t n = from; ready && n < to; n += PAIR) {
        const uint8_t *ahead = a->packed + (n + PAIR) * words_of(a) * 4;
        load_pair(r, n, &q, scale, zero);
        memset(sums, 0, rows * PAIR * sizeof *sums);
        for (int64_t s = 0, end; s < r->count; s = end) {
            const int64_t word = r->segments[s].word;
            int64_t count = 0;
            for (end = s; end < r->count && count + r->segments[end].count <= PANEL_WORDS; end++)
                count += r->segments[end].count;
            for (int j = 0; j < 2; j++, ahead += ceil_div(count, LANES) * LANES * 64)
                unpack(a, n + j * LANES, word, count, ahead, panel + j);
            for (int64_t t = 0; t < r->tiles; t++)
                sizes[rounded_up[least(r->wide, r->rows - t * r->wide)]](r, t, s, end, panel, scale, zero,
                                                                          sums + t * r->wide * PAIR);
        }
        for (int64_t j = 0; n + j < to && j < PAIR; j += LANES)
            store_sums(a, first, r->rows, n + j, least(to - n - j, LANES), sums + j);
    }
    free(q.scale), free(sums), free(scale), free(panel);
    return ready;
}

int mq_int4_avx512_vnni(const mq_linear *a) {
    if (a->rows == 0) return 0;
    const int64_t words = words_of(a), chunk = least(a->rows, ceil_div(X_BYTES / (words * 8) + 1, WIDE) * WIDE);
    const int64_t wide = rounded_up[ceil_div(chunk, ceil_div(chunk, WIDE))], tiles = ceil_div(chunk, wide);
    rounded r = {.a = a, .wide = wide};
    segment *segments = new_segments(a, &r.count);
    r.segments = segments;
    r.codes = calloc(tiles * wide * words * 2, sizeof *r.codes);
    r.start = calloc(tiles * wide * r.count, sizeof *r.start), r.scale = calloc(tiles * wide * r.count, sizeof *r.scale);
    int ready = segments && r.codes && r.start && r.scale;
    for (int64_t m = 0; ready && m < a->rows; m += chunk) {
        r.rows = least(chunk, a->rows - m), r.tiles = ceil_div(r.rows, wide);
        ready = round_x(&r, m);
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->threads > 1) reduction(&& : ready)
        for (int t = 0; t < a->threads; t++) {
            int64_t from, to;
            share_of(a, PAIR, t, &from, &to);
            ready = ready && multiply(&r, m, from, to);
        }
    }
    free(segments), free(r.codes), free(r.start), free(r.scale);
    return ready ? 0 : -1;
}
