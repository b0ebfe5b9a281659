/* The library's functions, as Python calls them through ctypes. Each returns 0, or -1 when memory ran out. Those of
 * mq_linear return 1 when a result is infinite or NaN: by x, or by a sum that overflows before it meets its scale.
 */
#ifndef MQ_API_H
#define MQ_API_H

#include <stdint.h>

enum { MQ_F32 = 0, MQ_BF16 = 1, MQ_F16 = 2 };

/* out[m][n] = sum_k x[m][k] (code[n][k] - 8 - zero[n][g]) scale[n][g] + bias[n], with g = k / group */
typedef struct {
    /* what a weight has */
    const uint8_t *packed; /* [outputs][4 ceil(columns / 8)] bytes, low nibble = even column */
    const void *scale;     /* [outputs][groups] */
    const int8_t *zero;    /* [outputs][groups], or NULL */
    const void *bias;      /* [outputs], or NULL */
    int64_t columns, outputs, group;
    int32_t scale_type, bias_type;
    /* what a call has */
    const void *x; /* [rows][columns], x_stride elements from row to row */
    void *out;     /* [rows][outputs], out_stride elements from row to row */
    int64_t rows, x_stride, out_stride;
    int32_t x_type, out_type, threads;
    int32_t few; /* rows of x up to which a kernel that has two ways takes the one for few */
    int *odd;    /* the library's own: becomes 1 with a result that is not finite */
} mq_linear;

/* out[n][k] = (code[n][k] - zero[n][g]) scale[n][g] */
typedef struct {
    const void *codes; /* INT4 as in mq_linear; INT8 [outputs][columns], one group a row */
    const void *scale; /* [outputs][groups] */
    const int8_t *zero; /* [outputs][groups], or NULL */
    void *out; /* [outputs][columns], out_stride elements from row to row */
    int64_t columns, outputs, group, out_stride;
    int32_t scale_type, out_type, threads;
} mq_dequantize;

#define MQ_EXPORT __attribute__((visibility("default")))

/* The best of the paths that this CPU can run: 0 none, 1 AVX2 with FMA, 2 AVX-512, 3 AVX-512 with bf16 dot products. */
MQ_EXPORT int mq_cpu(void);
/* Whether it has INT8 dot products for AVX-512 as well. */
MQ_EXPORT int mq_vnni(void);

MQ_EXPORT int mq_int4_avx512_bf16(const mq_linear *a);
MQ_EXPORT int mq_int4_avx512(const mq_linear *a);
MQ_EXPORT int mq_int4_avx2(const mq_linear *a);
/* x rounded to INT8, one scale for each row and group: amax / 127. */
MQ_EXPORT int mq_int4_avx512_vnni(const mq_linear *a);
/* The same with INT8 codes [outputs][columns] at `packed`, and one group a row. */
MQ_EXPORT int mq_int8_avx512(const mq_linear *a);
MQ_EXPORT int mq_int8_avx2(const mq_linear *a);

MQ_EXPORT int mq_dequantize_int4(const mq_dequantize *a);
MQ_EXPORT int mq_dequantize_int8(const mq_dequantize *a);

#endif
