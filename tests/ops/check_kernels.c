/* Every kernel on buffers of exactly the size it may read and write, against plain loops; built with AddressSanitizer and
 * UndefinedBehaviorSanitizer by test_kernel_memory.py, which read and write past an end would stop.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../mono_quant_fx/ops/kernels/api.h"

static uint64_t state = 1;

static uint32_t draw(uint32_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

static float real(void) { return (float)draw(2001) / 1000.0f - 1.0f; }

static void *room(size_t bytes) { return malloc(bytes ? bytes : 1); }

static void put(void *to, int type, int64_t at, float v) {
    if (type == MQ_F32) {
        ((float *)to)[at] = v;
    } else if (type == MQ_F16) {
        ((_Float16 *)to)[at] = (_Float16)v;
    } else {
        uint32_t u;
        memcpy(&u, &v, 4);
        ((uint16_t *)to)[at] = (uint16_t)(u >> 16);
    }
}

static double get(const void *from, int type, int64_t at) {
    if (type == MQ_F32) return ((const float *)from)[at];
    if (type == MQ_F16) return (double)((const _Float16 *)from)[at];
    uint32_t u = (uint32_t)((const uint16_t *)from)[at] << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static int code(const uint8_t *packed, int64_t words, int64_t n, int64_t k) {
    uint8_t byte = packed[n * words * 4 + k / 2];
    return (k % 2 ? byte >> 4 : byte & 15) - 8;
}

typedef int (*kernel)(const mq_linear *);

/* `step`: how far, in parts of a row's largest magnitude, x itself may be rounded. */
static int check_linear(kernel multiply, int bits, double tolerance, double step) {
    static const int64_t groups_of[] = {8, 16, 24, 32, 40, 64, 128, 256, -1};
    mq_linear a = {0};
    a.rows = draw(8) ? draw(14) : 60 + draw(80), a.columns = 1 + draw(400), a.outputs = 1 + draw(40);
    a.group = groups_of[draw(9)];
    a.x_stride = a.columns + draw(3), a.out_stride = a.outputs + draw(3);
    a.x_type = draw(3), a.scale_type = draw(3), a.bias_type = draw(3), a.out_type = MQ_F32;
    a.threads = 1 + draw(3), a.few = draw(2) ? a.rows : 0;
    if (bits == 8) a.group = -1;
    int64_t words = (a.columns + 7) / 8, bytes = bits == 4 ? a.outputs * words * 4 : a.outputs * a.columns;
    int64_t groups = a.group < 0 ? 1 : (a.columns + a.group - 1) / a.group;
    int64_t x_size = a.rows ? (a.rows - 1) * a.x_stride + a.columns : 0;
    int64_t out_size = a.rows ? (a.rows - 1) * a.out_stride + a.outputs : 0;
    void *x = room(x_size * (a.x_type == MQ_F32 ? 4 : 2));
    uint8_t *packed = room(bytes);
    void *scale = room(a.outputs * groups * (a.scale_type == MQ_F32 ? 4 : 2));
    void *bias = room(a.outputs * (a.bias_type == MQ_F32 ? 4 : 2));
    int8_t *zero = room(a.outputs * groups);
    float *out = room(out_size * sizeof(float));
    for (int64_t i = 0; i < x_size; i++) put(x, a.x_type, i, real());
    for (int64_t i = 0; i < bytes; i++) packed[i] = (uint8_t)draw(256);
    for (int64_t i = 0; i < a.outputs * groups; i++) put(scale, a.scale_type, i, real()), zero[i] = (int8_t)draw(16) - 8;
    for (int64_t i = 0; i < a.outputs; i++) put(bias, a.bias_type, i, real());
    a.x = x, a.packed = packed, a.scale = scale, a.out = out;
    a.bias = draw(2) ? bias : NULL, a.zero = draw(2) ? zero : NULL;
    int wrong = multiply(&a) != 0;
    for (int64_t m = 0; m < a.rows; m++) {
        double most = 0;
        for (int64_t k = 0; k < a.columns; k++) most = fmax(most, fabs(get(x, a.x_type, m * a.x_stride + k)));
        for (int64_t n = 0; n < a.outputs; n++) {
            double rounded = 0, sum = a.bias ? get(bias, a.bias_type, n) : 0.0, size = fabs(sum);
            for (int64_t k = 0; k < a.columns; k++) {
                int64_t g = n * groups + (a.group < 0 ? 0 : k / a.group);
                int c = bits == 4 ? code(packed, words, n, k) : (int8_t)packed[n * a.columns + k];
                double w = (c - (a.zero ? zero[g] : 0)) * get(scale, a.scale_type, g);
                double product = get(x, a.x_type, m * a.x_stride + k) * w;
                sum += product, size += fabs(product), rounded += step * most * fabs(w);
            }
            wrong |= !(fabs(out[m * a.out_stride + n] - sum) <= tolerance * size + rounded + 1e-6);
        }
    }
    if (wrong) 
        printf("linear: INT%d, %ld x %ld by %ld, group %ld\n", bits, (long)a.rows, (long)a.columns, (long)a.outputs,
               (long)a.group);
    free(x), free(packed), free(scale), free(bias), free(zero), free(out);
    return wrong;
}

static int check_dequantize(void) {
    mq_dequantize a = {0};
    const int bits = draw(2) ? 4 : 8;
    a.columns = 1 + draw(200), a.outputs = 1 + draw(20), a.group = bits == 8 ? -1 : 8 * (1 + (int64_t)draw(9));
    a.out_stride = a.columns + draw(3), a.scale_type = draw(3), a.out_type = draw(3), a.threads = 1 + draw(3);
    int64_t words = (a.columns + 7) / 8, groups = a.group < 0 ? 1 : (a.columns + a.group - 1) / a.group;
    int64_t bytes = bits == 4 ? a.outputs * words * 4 : a.outputs * a.columns;
    uint8_t *codes = room(bytes);
    void *scale = room(a.outputs * groups * (a.scale_type == MQ_F32 ? 4 : 2));
    int8_t *zero = room(a.outputs * groups);
    void *out = room(((a.outputs - 1) * a.out_stride + a.columns) * (a.out_type == MQ_F32 ? 4 : 2));
    for (int64_t i = 0; i < bytes; i++) codes[i] = (uint8_t)draw(256);
    for (int64_t i = 0; i < a.outputs * groups; i++) put(scale, a.scale_type, i, real()), zero[i] = (int8_t)draw(16) - 8;
    a.codes = codes, a.scale = scale, a.out = out, a.zero = draw(2) ? zero : NULL;
    int wrong = (bits == 4 ? mq_dequantize_int4 : mq_dequantize_int8)(&a) != 0;
    for (int64_t n = 0; n < a.outputs; n++)
        for (int64_t k = 0; k < a.columns; k++) {
            int64_t g = n * groups + (a.group < 0 ? 0 : k / a.group);
            int c = bits == 4 ? code(codes, words, n, k) : (int8_t)codes[n * a.columns + k];
            double w = (c - (a.zero ? zero[g] : 0)) * get(scale, a.scale_type, g);
            double step = a.out_type == MQ_F32 ? 1e-7 : a.out_type == MQ_F16 ? 1e-3 : 1e-2;
            wrong |= !(fabs(get(out, a.out_type, n * a.out_stride + k) - w) <= step * fabs(w) + 1e-7);
        }
    if (wrong) printf("dequantize: INT%d, %ld by %ld, group %ld\n", bits, (long)a.outputs, (long)a.columns, (long)a.group);
    free(codes), free(scale), free(zero), free(out);
    return wrong;
}

int main(void) {
    static const kernel int4[] = {mq_int4_avx2, mq_int4_avx512, mq_int4_avx512_bf16};
    static const kernel int8[] = {mq_int8_avx2, mq_int8_avx512};
    static const double tolerances[] = {2e-6, 2e-6, 1.0 / 128};
    int wrong = 0, paths = mq_cpu();
    for (int i = 0; i < 400; i++) {
        for (int path = 0; path < paths; path++) wrong += check_linear(int4[path], 4, tolerances[path], 0);
        for (int path = 0; path < paths && path < 2; path++) wrong += check_linear(int8[path], 8, tolerances[path], 0);
        if (mq_vnni()) wrong += check_linear(mq_int4_avx512_vnni, 4, tolerances[0], 1.0 / 253);
        if (paths) wrong += check_dequantize();
    }
    printf("%d paths, %d wrong\n", paths, wrong);
    return wrong != 0;
}
