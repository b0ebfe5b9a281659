/* int4_linear and int8_linear in fp32, for any length of vectors. The including file sets the target and defines
 *
 *   LANES, vec, ivec       32-bit lanes, and their float and integer vectors
 *   V(name)                the intrinsic of that name: V(add_ps)
 *   load_ints              LANES integers
 *   decode(words, i)       code i of each word, -8..7, as float
 *   load_codes(p)          LANES int8 as floats
 *   permute, gather, sum   values[index of each lane], from a vector or from memory; the sum of the lanes
 *
 * A block is LANES words, 8 LANES columns; lane l belongs to word l, so that one vector of scales serves any group size
 * that is a multiple of 8. x becomes fp32 in that order once a call: vector i of a block holds columns 8 l + i.
 */
typedef float unit;
typedef vec part;

INLINE part nothing(void) { return V(setzero_ps)(); }
INLINE part dot(part p, ivec codes, unit x) { return V(fmadd_ps)((vec)codes, V(set1_ps)(x), p); }

#define STEPS 8
#include "lanes.h"
#include "panels.h"

enum { FEW = 4 };

INLINE vec of_lanes(const lanes *l, int kind, const float *values, const place *p) {
    if (kind == ONE) return V(set1_ps)(values[p->group]);
    if (kind == SPREAD) return permute(load_ints(l->spread), V(loadu_ps)(values + p->block * l->per_block));
    return gather(load_ints(l->lookup + LANES * p->block), values);
}

/* x to xs[row][block][8][LANES], zeros behind the last column. */
static void shuffle_x(const mq_linear *a, float *xs) {
    const int64_t whole = a->columns / 8, words = blocks_of(a) * LANES;
    for (int64_t m = 0; m < a->rows; m++, xs += words * 8) {
        const char *row = (const char *)a->x + m * a->x_stride * size_of(a->x_type);
        for (int64_t w = 0; w < words; w++) {
            float v[8] = {0};
            if (w < whole)
                _mm256_storeu_ps(v, load8(row, a->x_type, w * 8));
            else
                for (int64_t k = w * 8; k < a->columns; k++) v[k - w * 8] = load1(row, a->x_type, k);
            for (int i = 0; i < 8; i++) xs[(w / LANES * 8 + i) * LANES + w % LANES] = v[i];
        }
    }
}

typedef struct {
    const mq_linear *a;
    const lanes *l;
    const float *xs;
    const qparams *q;
} task;

/* Rows m.. of xs by rows n.. of the weight. */
INLINE void multiply(const task *t, int64_t m, int64_t n, const int rows, const int height, const int kind,
                     const int shifted) {
    const mq_linear *a = t->a;
    const int64_t blocks = blocks_of(a), words = words_of(a), pitch = t->q->pitch;
    vec total[FEW][2];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int h = 0; h < height; h++) total[i][h] = V(setzero_ps)();
    place p = place_of(t->l, 0);
    for (int64_t b = 0; b < blocks; b++, advance(t->l, &p)) {
        const float *x = t->xs + (m * blocks + b) * 8 * LANES;
        vec scale[2], zero[2];
        ivec w[2];
        UNROLL for (int h = 0; h < height; h++) {
            const uint8_t *at = a->packed + ((n + h) * words + b * LANES) * 4;
            w[h] = (b + 1) * LANES <= words ? load_ints(at) : load_some(at, (int)(words - b * LANES));
            _mm_prefetch((const char *)(at + height * words * 4), _MM_HINT_T0);
            scale[h] = of_lanes(t->l, kind, t->q->scale + h * pitch, &p);
            if (shifted) zero[h] = of_lanes(t->l, kind, t->q->zero + h * pitch, &p);
        }
        UNROLL for (int i = 0; i < 8; i++) {
            vec q[2];
            UNROLL for (int h = 0; h < height; h++) {
                q[h] = decode(w[h], i);
                if (shifted) q[h] = V(sub_ps)(q[h], zero[h]);
                q[h] = V(mul_ps)(q[h], scale[h]);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                vec v = V(loadu_ps)(x + (r * blocks * 8 + i) * LANES);
                UNROLL for (int h = 0; h < height; h++) total[r][h] = V(fmadd_ps)(q[h], v, total[r][h]);
            }
        }
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int h = 0; h < height; h++)
        store_result(a, m + i, n + h, sum(total[i][h]));
}

#define SIZE(ROWS, HEIGHT)                                                                                             \
    static void multiply_##ROWS##_##HEIGHT(const task *t, int64_t m, int64_t n) {                                      \
        if (t->l->kind == ONE && !t->a->zero)                                                                          \
            multiply(t, m, n, ROWS, HEIGHT, ONE, 0);                                                                   \
        else if (t->l->kind == ONE)                                                                                    \
            multiply(t, m, n, ROWS, HEIGHT, ONE, 1);                                                                   \
        else if (t->l->kind == SPREAD)                                                                                 \
            multiply(t, m, n, ROWS, HEIGHT, SPREAD, t->a->zero != NULL);                                               \
        else                                                                                                           \
            multiply(t, m, n, ROWS, HEIGHT, LOOKUP, t->a->zero != NULL);                                               \
    }
SIZE(1, 2) SIZE(2, 2) SIZE(3, 2) SIZE(4, 2) SIZE(1, 1) SIZE(2, 1) SIZE(3, 1) SIZE(4, 1)

static int multiply_few(const mq_linear *a, const lanes *l, const float *xs, int64_t from, int64_t to) {
    typedef void (*size)(const task *, int64_t, int64_t);
    static const size sizes[2][FEW] = {{multiply_1_1, multiply_2_1, multiply_3_1, multiply_4_1},
                                        {multiply_1_2, multiply_2_2, multiply_3_2, multiply_4_2}};
    qparams q;
    task t = {a, l, xs, &q};
    if (!new_qparams(a, 2, &q)) return 0;
    for (int64_t n = from; n < to; n += 2) {
        const int height = to - n < 2 ? 1 : 2;
        for (int h = 0; h < height; h++) load_qparams(a, n + h, h, &q);
        for (int64_t m = 0; m < a->rows; m += FEW) sizes[height - 1][least(FEW, a->rows - m) - 1](&t, m, n);
    }
    free(q.scale);
    return 1;
}

/* INT8: x in its own order, each row padded with zeros to whole vectors. */
static void copy_x(const mq_linear *a, int64_t rows, float *xs, int64_t pitch) {
    memset(xs, 0, rows * pitch * sizeof *xs);
    for (int64_t m = 0; m < rows; m++, xs += pitch) {
        const char *row = (const char *)a->x + m * a->x_stride * size_of(a->x_type);
        int64_t k = 0;
        for (; k + 8 <= a->columns; k += 8) _mm256_storeu_ps(xs + k, load8(row, a->x_type, k));
        for (; k < a->columns; k++) xs[k] = load1(row, a->x_type, k);
    }
}

INLINE void int8_rows(const mq_linear *a, const float *xs, int64_t pitch, int64_t m, int64_t n, const int rows) {
    const int8_t *row = (const int8_t *)a->packed + n * a->columns;
    const vec zero = V(set1_ps)(a->zero ? a->zero[n] : 0.0f);
    vec total[FEW];
    UNROLL for (int i = 0; i < rows; i++) total[i] = V(setzero_ps)();
    for (int64_t k = 0; k < a->columns; k += LANES) {
        int8_t some[LANES] = {0};
        const int8_t *at = row + k;
        if (k + LANES > a->columns) at = (const int8_t *)memcpy(some, at, a->columns - k);
        vec q = V(sub_ps)(load_codes(at), zero);
        UNROLL for (int i = 0; i < rows; i++)
            total[i] = V(fmadd_ps)(q, V(loadu_ps)(xs + (m + i) * pitch + k), total[i]);
    }
    const float scale = load1(a->scale, a->scale_type, n);
    UNROLL for (int i = 0; i < rows; i++) store_result(a, m + i, n, sum(total[i]) * scale);
}

static int int8_linear(const mq_linear *a) {
    const int64_t pitch = ceil_div(a->columns, 16) * 16;
    float *xs = aligned_alloc(64, a->rows * pitch * sizeof *xs);
    if (!xs) return -1;
    copy_x(a, a->rows, xs, pitch);
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->threads > 1)
    for (int64_t n = 0; n < a->outputs; n++) {
        int64_t m = 0;
        for (; m + 4 <= a->rows; m += 4) int8_rows(a, xs, pitch, m, n, 4);
        if (a->rows - m == 3) int8_rows(a, xs, pitch, m, n, 3);
        if (a->rows - m == 2) int8_rows(a, xs, pitch, m, n, 2);
        if (a->rows - m == 1) int8_rows(a, xs, pitch, m, n, 1);
    }
    free(xs);
    return 0;
}

/* ---- many rows of x ---- */

INLINE void spread(ivec word, const float *zero, ivec *to) {
    UNROLL for (int i = 0; i < STEPS; i++) {
        const vec code = decode(word, i);
        to[2 * i] = (ivec)(zero ? V(sub_ps)(code, V(loadu_ps)(zero)) : code);
    }
}

INLINE vec whole_part(part p, const job *j, int64_t at, const float *zero) {
    (void)j, (void)at, (void)zero;
    return p;
}

static void row_of_x(const job *j, int64_t m, const char *row) {
    const int64_t words = words_of(j->a);
    for (int64_t first = 0; first < words; first += PANEL) {
        unit *to = x_at(j, m / j->wide, m % j->wide, first);
        for (int64_t w = first; w < least(first + PANEL, words); w++, to += j->wide * STEPS)
            _mm256_store_ps(to, word_of_x(j->a, row, w));
    }
}

static int few_rows(const mq_linear *a) {
    lanes l;
    float *xs = aligned_alloc(64, a->rows * blocks_of(a) * 8 * LANES * 4);
    int ready = find_lanes(a, &l) && xs;
    if (ready) {
        shuffle_x(a, xs);
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->threads > 1) reduction(&& : ready)
        for (int t = 0; t < a->threads; t++) {
            int64_t from, to;
            share_of(a, 4, t, &from, &to);
            ready = ready && multiply_few(a, &l, xs, from, to);
        }
    }
    free(xs), free(l.lookup);
    return ready ? 0 : -1;
}

static int int4_linear(const mq_linear *a) {
    if (a->rows == 0) return 0;
    return a->rows <= a->few ? few_rows(a) : many_rows(a);
}
