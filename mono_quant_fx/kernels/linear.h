/* What the ways of int4_linear share: the scales of a few weight rows as floats, and how lanes find their group. The
 * including file sets the target, and LANES, the 32-bit lanes of its vectors.
 */
#include "elements.h"

INLINE void store_result(const mq_linear *a, int64_t m, int64_t n, float sum) {
    if (a->bias) sum += load1(a->bias, a->bias_type, n);
    store1(a->out, a->out_type, m * a->out_stride + n, sum);
}

INLINE int64_t words_of(const mq_linear *a) { return ceil_div(a->columns, 8); }
INLINE int64_t groups_of(const mq_linear *a) { return a->group <= 0 ? 1 : ceil_div(a->columns, a->group); }
INLINE int64_t blocks_of(const mq_linear *a) { return ceil_div(a->columns, 8 * LANES); }

/* Scales and zero points of a few weight rows as floats; the space behind the last group may be read, and holds zeros. */
typedef struct {
    int64_t pitch;
    float *scale, *zero; /* [rows][pitch]; zero is NULL when symmetric */
} qparams;

static int new_qparams(const mq_linear *a, int64_t rows, qparams *q) {
    q->pitch = groups_of(a) + 16;
    q->scale = calloc(2 * rows * q->pitch, sizeof(float));
    q->zero = a->zero ? q->scale + rows * q->pitch : NULL;
    return q->scale != NULL;
}

static void load_qparams(const mq_linear *a, int64_t n, int64_t at, qparams *q) {
    int64_t groups = groups_of(a), from = n * groups, g = 0;
    float *scale = q->scale + at * q->pitch, *zero = q->zero + at * q->pitch;
    for (; g + 8 <= groups; g += 8) _mm256_storeu_ps(scale + g, load8(a->scale, a->scale_type, from + g));
    for (; g < groups; g++) scale[g] = load1(a->scale, a->scale_type, from + g);
    if (a->zero)
        for (g = 0; g < groups; g++) zero[g] = a->zero[from + g];
}

/* How the lanes of a block find their group: one for all, a few spread over the lanes, or looked up one by one. */
enum { ONE, SPREAD, LOOKUP };
typedef struct {
    int kind;
    int64_t span, per_block; /* blocks a group; groups a block */
    int32_t spread[16];
    int32_t *lookup; /* [blocks][LANES] */
} lanes;

/* A block and, for ONE, its group: counted, since a division a block would cost as much as the block. */
typedef struct {
    int64_t block, group, left;
} place;

INLINE place place_of(const lanes *l, int64_t block) {
    place p = {block, 0, 0};
    if (l->kind == ONE) p.group = block / l->span, p.left = l->span - block % l->span;
    return p;
}

INLINE void advance(const lanes *l, place *p) {
    p->block++;
    if (--p->left == 0) p->group++, p->left = l->span;
}

static int find_lanes(const mq_linear *a, lanes *l) {
    int64_t groups = groups_of(a), count = blocks_of(a) * LANES, group = groups == 1 ? a->columns : a->group;
    memset(l, 0, sizeof *l);
    if (groups == 1 || group % (8 * LANES) == 0) {
        l->kind = ONE, l->span = groups == 1 ? blocks_of(a) : group / (8 * LANES);
        return 1;
    }
    if (8 * LANES % group == 0) {
        l->kind = SPREAD, l->per_block = 8 * LANES / group;
        for (int i = 0; i < LANES; i++) l->spread[i] = 8 * i / group;
        return 1;
    }
    l->kind = LOOKUP, l->lookup = malloc(count * sizeof *l->lookup);
    if (!l->lookup) return 0;
    for (int64_t i = 0; i < count; i++) l->lookup[i] = least(8 * i / group, groups - 1);
    return 1;
}

/* The rows that thread t of many takes: [*from, *to), cut at multiples of `unit`. */
INLINE void share_of(const mq_linear *a, int64_t unit, int64_t t, int64_t *from, int64_t *to) {
    int64_t units = ceil_div(a->outputs, unit);
    *from = units * t / a->threads * unit;
    *to = least(units * (t + 1) / a->threads * unit, a->outputs);
}
