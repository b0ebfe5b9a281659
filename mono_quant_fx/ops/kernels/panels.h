/* int4_linear for many rows of x. Lane l of a vector is row l of LANES rows of the weight, so that no sum crosses lanes
 * and one vector holds the scales of a group. A panel is PANEL words of PAIR = 2 LANES rows in that order, with codes as
 * what the products want: 16 KiB, which stay in L1 while all rows of x pass by, a tile of WIDE rows at a time.
 *
 * The including file sets the target, LANES, vec, ivec and V(name), and defines, for one word of eight columns,
 *
 *   STEPS                      how many vectors its codes become
 *   unit                       what meets one lane of such a vector: 32 bits of x
 *   part, nothing, dot         sums of products within a group: part = dot(part, vector of codes, unit)
 *   spread(word, zero, to)     a word of LANES rows to to[0], to[2], ..., less the zero points unless NULL
 *   whole_part(p, ...)         a part as floats, times the scale of x if it has one; where the group ends
 *   row_of_x(j, m, row)        row m of those in order from x's memory: its units, and what else whole_part needs
 *   transpose                  LANES words of LANES rows
 *   load_some, store_some       the first n lanes: of words; of floats, to out
 */
#include "linear.h"

enum { PAIR = 2 * LANES, WIDE = 6, PANEL = (1 << 14) / (STEPS * PAIR * 4), X_BYTES = 1 << 22 };

/* Words of one group that lie in one panel. */
typedef struct {
    int64_t word, count, group;
} segment;

/* A product, and as many rows of x as are brought into order at a time. A tile is `wide` of them; the last may be less. */
typedef struct {
    const mq_linear *a;
    segment *segments;
    int64_t count, rows, wide, tiles;
    unit *x;           /* [panel][tile][word][wide][STEPS] */
    float *sum, *scale; /* [tile][segment][wide]: of the codes of x, where x is rounded to INT8; else NULL */
} job;

static segment *new_segments(const mq_linear *a, int64_t *count) {
    const int64_t words = words_of(a), group = groups_of(a) == 1 ? words : a->group / 8;
    segment *all = malloc((ceil_div(words, PANEL) + ceil_div(words, group)) * sizeof *all);
    *count = 0;
    for (int64_t word = 0; all && word < words; word += all[(*count)++].count) {
        const int64_t end = least(least((word / group + 1) * group, (word / PANEL + 1) * PANEL), words);
        all[*count] = (segment){word, end - word, word / group};
    }
    return all;
}

/* The units of a word of a row of x; the row's next word is j->wide * STEPS further, in the same panel. */
INLINE unit *x_at(const job *j, int64_t tile, int64_t row, int64_t word) {
    const int64_t panel = word / PANEL * PANEL, count = least(words_of(j->a) - panel, PANEL);
    return j->x + ((panel * j->tiles + count * tile + word - panel) * j->wide + row) * STEPS;
}

INLINE void spread(ivec word, const float *zero, ivec *to);
INLINE vec whole_part(part p, const job *j, int64_t at, const float *zero);
static void row_of_x(const job *j, int64_t m, const char *row);

/* Word w of a row of x, zeros behind the last column. */
INLINE __m256 word_of_x(const mq_linear *a, const char *row, int64_t w) {
    if (w * 8 + 8 <= a->columns) return load8(row, a->x_type, w * 8);
    float v[8] = {0};
    for (int64_t k = w * 8; k < a->columns; k++) v[k - w * 8] = load1(row, a->x_type, k);
    return _mm256_loadu_ps(v);
}

/* Words [first, first + count) of PAIR rows from n on (the last one again where there are fewer) to a panel. */
static void unpack(const job *j, int64_t n, const segment *s, const float *zero, int64_t first, int64_t count,
                   const uint8_t *ahead, ivec *panel) {
    const mq_linear *a = j->a;
    const int64_t row_bytes = words_of(a) * 4, last = a->outputs - 1;
    for (int half = 0; half < 2; half++, n += LANES, zero += zero ? LANES : 0) {
        const segment *at = s;
        const float *z = zero;
        ivec *to = panel + half;
        for (int64_t w = first; w < first + count; w += LANES) {
            const int64_t some = least(first + count - w, LANES);
            ivec v[LANES];
            for (int i = 0; i < LANES; i++, ahead += LANES * 4) {
                v[i] = load_some(a->packed + least(n + i, last) * row_bytes + w * 4, (int)some);
                _mm_prefetch((const char *)ahead, _MM_HINT_T1);
            }
            transpose(v);
            for (int64_t i = 0; i < some; i++, to += 2 * STEPS) {
                if (zero && w + i == at->word + at->count) at++, z += PAIR;
                spread(v[i], z, to);
            }
        }
    }
}

/* Scales and zero points of PAIR rows from n on: [segment][PAIR]. */
static void load_pair(const job *j, int64_t n, qparams *q, float *scale, float *zero) {
    for (int64_t i = 0; i < PAIR; i++) {
        load_qparams(j->a, least(n + i, j->a->outputs - 1), 0, q);
        for (int64_t s = 0; s < j->count; s++) scale[s * PAIR + i] = q->scale[j->segments[s].group];
        for (int64_t s = 0; zero && s < j->count; s++) zero[s * PAIR + i] = q->zero[j->segments[s].group];
    }
}

/* sums[row][PAIR] += a tile of x times a panel, which holds segments [from, to). */
INLINE void tile(const job *j, int64_t t, int64_t from, int64_t to, const ivec *panel, const float *scale,
                 const float *zero, float *sums, const int rows) {
    const unit *x = x_at(j, t, 0, j->segments[from].word);
    vec total[WIDE][2];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int h = 0; h < 2; h++)
        total[i][h] = V(loadu_ps)(sums + i * PAIR + h * LANES);
    for (int64_t s = from; s < to; s++) {
        part p[WIDE][2];
        UNROLL for (int i = 0; i < rows; i++) p[i][0] = p[i][1] = nothing();
        int64_t words = j->segments[s].count;
        do {
            UNROLL for (int k = 0; k < STEPS; k++) {
                const ivec w0 = panel[2 * k], w1 = panel[2 * k + 1];
                UNROLL for (int i = 0; i < rows; i++) {
                    p[i][0] = dot(p[i][0], w0, x[i * STEPS + k]);
                    p[i][1] = dot(p[i][1], w1, x[i * STEPS + k]);
                }
            }
            panel += 2 * STEPS, x += j->wide * STEPS;
        } while (--words);
        UNROLL for (int h = 0; h < 2; h++) {
            const vec sw = V(loadu_ps)(scale + s * PAIR + h * LANES);
            UNROLL for (int i = 0; i < rows; i++)
                total[i][h] = V(fmadd_ps)(whole_part(p[i][h], j, (t * j->count + s) * j->wide + i,
                                                     zero ? zero + s * PAIR + h * LANES : NULL), sw, total[i][h]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int h = 0; h < 2; h++)
        V(storeu_ps)(sums + i * PAIR + h * LANES, total[i][h]);
}

#define SIZE(ROWS)                                                                                                     \
    static void tile_##ROWS(const job *j, int64_t t, int64_t from, int64_t to, const ivec *panel, const float *scale,  \
                            const float *zero, float *sums) {                                                          \
        tile(j, t, from, to, panel, scale, zero, sums, ROWS);                                                          \
    }
SIZE(1) SIZE(2) SIZE(3) SIZE(4) SIZE(5) SIZE(6)
#undef SIZE

static void store_sums(const mq_linear *a, int64_t first, int64_t rows, int64_t n, int64_t count, const float *sums) {
    float bias[LANES] = {0};
    if (a->bias)
        for (int64_t i = 0; i < count; i++) bias[i] = load1(a->bias, a->bias_type, n + i);
    for (int64_t m = 0; m < rows; m++)
        store_some(a, (first + m) * a->out_stride + n, (int)count,
                   V(add_ps)(V(loadu_ps)(sums + m * PAIR), V(loadu_ps)(bias)));
}

/* The rows of x that are in order, from `first` on, by rows [from, to) of the weight. */
static int multiply_panels(const job *j, int64_t first, int64_t from, int64_t to) {
    typedef void (*size)(const job *, int64_t, int64_t, int64_t, const ivec *, const float *, const float *, float *);
    static const size sizes[WIDE + 1] = {NULL, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};
    const mq_linear *a = j->a;
    const int64_t rows = j->tiles * j->wide;
    qparams q;
    const int have = new_qparams(a, 1, &q);
    float *sums = aligned_alloc(64, rows * PAIR * sizeof *sums);
    float *scale = aligned_alloc(64, 2 * j->count * PAIR * sizeof *scale);
    float *zero = a->zero && scale ? scale + j->count * PAIR : NULL;
    ivec *panel = aligned_alloc(64, PANEL * STEPS * 2 * sizeof *panel);
    const int ready = have && sums && scale && panel;
    for (int64_t n = from; ready && n < to; n += PAIR) {
        const uint8_t *ahead = a->packed + (n + PAIR) * words_of(a) * 4;
        load_pair(j, n, &q, scale, zero);
        memset(sums, 0, rows * PAIR * sizeof *sums);
        for (int64_t s = 0, end; s < j->count; s = end) {
            int64_t count = 0;
            for (end = s; end < j->count && count < PANEL; end++) count += j->segments[end].count;
            unpack(j, n, j->segments + s, zero ? zero + s * PAIR : NULL, j->segments[s].word, count, ahead, panel);
            ahead += 2 * ceil_div(count, LANES) * LANES * LANES * 4;
            for (int64_t t = 0; t < j->tiles; t++)
                sizes[least(j->wide, j->rows - t * j->wide)](j, t, s, end, panel, scale, zero, sums + t * j->wide * PAIR);
        }
        for (int64_t h = 0; n + h < to && h < PAIR; h += LANES)
            store_sums(a, first, j->rows, n + h, least(to - n - h, LANES), sums + h);
    }
    free(q.scale), free(sums), free(scale), free(panel);
    return ready;
}

static int many_rows(const mq_linear *a) {
    const int64_t words = words_of(a), fitting = X_BYTES / (words * STEPS * sizeof(unit)) / WIDE * WIDE;
    const int64_t chunk = least(a->rows, fitting < WIDE ? WIDE : fitting);
    job j = {.a = a, .wide = ceil_div(chunk, ceil_div(chunk, WIDE))};
    j.tiles = ceil_div(chunk, j.wide), j.segments = new_segments(a, &j.count);
    const int64_t most = j.tiles * j.wide;
    j.x = aligned_alloc(64, ceil_div(most * words * STEPS * sizeof *j.x, 64) * 64);
    j.sum = calloc(2 * most * j.count, sizeof *j.sum), j.scale = j.sum + most * j.count;
    int ready = j.segments && j.x && j.sum;
    for (int64_t m = 0; ready && m < a->rows; m += chunk) {
        j.rows = least(chunk, a->rows - m), j.tiles = ceil_div(j.rows, j.wide);
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->threads > 1)
        for (int64_t i = 0; i < j.rows; i++)
            row_of_x(&j, i, (const char *)a->x + (m + i) * a->x_stride * size_of(a->x_type));
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->threads > 1) reduction(&& : ready)
        for (int t = 0; t < a->threads; t++) {
            int64_t from, to;
            share_of(a, PAIR, t, &from, &to);
            ready = ready && multiply_panels(&j, m, from, to);
        }
    }
    free(j.segments), free(j.x), free(j.sum);
    return ready ? 0 : -1;
}
