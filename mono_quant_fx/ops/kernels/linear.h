/* What the ways of int4_linear share: the scales of a few weight rows as floats, and a thread's share. The including file
 * sets the target.
 */
#ifndef MQ_LINEAR_H
#define MQ_LINEAR_H

#include "elements.h"

/* One store for all threads, and only where there is something to note. */
INLINE void note(const mq_linear *a, int is_odd) {
    if (__builtin_expect(is_odd, 0)) __atomic_store_n(a->odd, 1, __ATOMIC_RELAXED);
}

/* A kernel, and whether all that it stored is finite. */
INLINE int watched(int (*kernel)(const mq_linear *), const mq_linear *a) {
    int odd = 0;
    mq_linear copy = *a;
    copy.odd = &odd;
    const int failed = kernel(&copy);
    return failed ? failed : odd;
}

INLINE void store_result(const mq_linear *a, int64_t m, int64_t n, float sum) {
    if (a->bias) sum += load1(a->bias, a->bias_type, n);
    note(a, sum - sum != 0);
    store1(a->out, a->out_type, m * a->out_stride + n, sum);
}

INLINE int64_t words_of(const mq_linear *a) { return ceil_div(a->columns, 8); }
INLINE int64_t groups_of(const mq_linear *a) { return a->group <= 0 ? 1 : ceil_div(a->columns, a->group); }

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

/* The rows that thread t of many takes: [*from, *to), cut at multiples of `unit`. */
INLINE void share_of(const mq_linear *a, int64_t unit, int64_t t, int64_t *from, int64_t *to) {
    int64_t units = ceil_div(a->outputs, unit);
    *from = units * t / a->threads * unit;
    *to = least(units * (t + 1) / a->threads * unit, a->outputs);
}

#endif
